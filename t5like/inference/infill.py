"""Filling blanks in a text with a model trained on span corruption.

"Thank you ____ me to your party ____ week." is encoded with a sentinel for each blank and EOS,
as the objective's inputs are (Raffel et al. 2020, section 3.1.4); the model answers
"<extra_id_0> for inviting <extra_id_1> last", which is put back where the blanks were.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5like.errors import UserError
from t5like.inference.compiled import DEFAULT, Decoding
from t5like.inference.generate import Completion, Generator
from t5like.inference.text import decode_after, encode_after

BLANK = "____"


@dataclasses.dataclass(frozen=True)
class Infill:
    """One way to fill a text.

    Attributes:
      text: the text with its blanks filled.
      fills: what was put into each blank; "" where the model said nothing for it.
      well_formed: whether the model gave exactly one span for each blank, in order.
      completion: what the model generated.
    """

    text: str
    fills: tuple[str, ...]
    well_formed: bool
    completion: Completion


def split_blanks(text: str, blank: str = BLANK) -> list[str]:
    """The n + 1 parts of a text around its n blanks.

    A blank is `blank` or any `<extra_id_k>`; blanks are filled in the order they stand in.

    Raises:
      UserError: there is no blank.
    """
    parts = re.split(rf"{re.escape(blank)}|<extra_id_\d+>", text)
    if len(parts) == 1:
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise UserError(f"{shown!r} has no blank to fill: write {blank} or <extra_id_0> in it")
    return parts


def encode_parts(vocabulary: Any, parts: Sequence[str]) -> np.ndarray:
    """Inputs of the model, int32 [n]: parts with sentinels between them, and EOS.

    Tokens carry the space before a word, so one space before a blank is left for the model to
    say, as it was in training.

    Raises:
      UserError: there are more blanks than sentinels.
    """
    vocabulary.require_sentinels(len(parts) - 1, f"a text with {len(parts) - 1} blanks")
    ids = [_encode_before_blank(vocabulary, parts, 0)]
    for k in range(1, len(parts)):
        ids += [vocabulary.sentinels[k - 1 : k], _encode_before_blank(vocabulary, parts, k)]
    if vocabulary.eos_id is not None:
        ids.append([vocabulary.eos_id])
    return np.concatenate(ids).astype(np.int32)


def _encode_before_blank(vocabulary: Any, parts: Sequence[str], k: int) -> np.ndarray:
    part = parts[k] if k == len(parts) - 1 else parts[k].removesuffix(" ")
    return encode_after(vocabulary, part, start=k == 0)


def parse_spans(
    ids: np.ndarray, sentinels: np.ndarray, blanks: int
) -> tuple[list[np.ndarray], bool]:
    """Splits generated tokens [n] at their sentinels.

    Whatever the model wrote is survived: a blank it left out is empty, of two spans for one
    blank the first counts, and what stands before the first sentinel or after the sentinel of
    no blank is dropped.

    Returns:
      (a span for each blank, whether there was exactly one for each, in order).
    """
    number = {int(sentinel): k for k, sentinel in enumerate(sentinels)}
    stray: list[int] = []
    order, spans, current = [], {}, stray
    for token in np.asarray(ids).tolist():
        if token in number:
            current = []
            order.append(number[token])
            spans.setdefault(number[token], current)
        else:
            current.append(token)
    found = [np.array(spans.get(k, []), np.int32) for k in range(blanks)]
    return found, order == list(range(blanks)) and not stray


def fill(vocabulary: Any, parts: Sequence[str], spans: Sequence[np.ndarray]) -> tuple[str, ...]:
    """The text of each span as it reads after the part before it, less a doubled space."""
    return tuple(_fill_one(vocabulary, parts, k, span) for k, span in enumerate(spans))


def _fill_one(vocabulary: Any, parts: Sequence[str], k: int, span: np.ndarray) -> str:
    context = _encode_before_blank(vocabulary, parts, k)
    text = decode_after(vocabulary, context, span)
    before = parts[k]
    # The space that was left for the model to say, or a line break that the vocabulary cannot
    # write, so that the model says a space for it.
    written = before.endswith(" ") or (k == 0 and not before)
    unseen = before[-1:].isspace() and not vocabulary.decode(context).endswith(before[-1])
    return text.removeprefix(" ") if written or unseen else text


def join(parts: Sequence[str], fills: Sequence[str]) -> str:
    """parts[0] fills[0] parts[1] ... parts[n]."""
    return parts[0] + "".join(f + p for f, p in zip(fills, parts[1:], strict=True))


def infill(
    generator: Generator,
    texts: Sequence[str],
    decoding: Decoding = DEFAULT,
    *,
    seed: int = 0,
    blank: str = BLANK,
) -> list[list[Infill]]:
    """Fills the blanks of each text.

    Args:
      generator: of an encoder-decoder or a prefix decoder trained on span corruption.
      texts: n texts with blanks.
      decoding, seed: as for `Generator.complete`.
      blank: how a blank is written, besides <extra_id_k>.

    Returns:
      for each text its samples, or its beams with the best first.

    Raises:
      UserError: a text has no blank, or more than the vocabulary has sentinels.
    """
    vocabulary = generator.vocabulary
    split = [split_blanks(text, blank) for text in texts]
    results = generator.generate(
        [encode_parts(vocabulary, parts) for parts in split], decoding, seed=seed
    )

    def one(parts: Sequence[str], completion: Completion) -> Infill:
        spans, well_formed = parse_spans(completion.tokens, vocabulary.sentinels, len(parts) - 1)
        fills = fill(vocabulary, parts, spans)
        return Infill(join(parts, fills), fills, well_formed, completion)

    return [
        [one(parts, completion) for completion in completions]
        for parts, completions in zip(split, results, strict=True)
    ]
