"""Filling blanks in a text with a model whose objective teaches that.

"Thank you ____ me to your party ____ week." is put to the model as its objective's format has it
(see t5like/inference/infill_formats.py): span corruption's reads a sentinel for each blank, and
the model answers "<extra_id_0> for inviting <extra_id_1> last", which is put back where the
blanks were.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5like.errors import UserError
from t5like.inference.compiled import DEFAULT, Decoding
from t5like.inference.decoding import Stop
from t5like.inference.generate import Completion, Generator
from t5like.inference.infill_formats import InfillFormat
from t5like.inference.text import decode_after, encode_after

BLANK = "____"


@dataclasses.dataclass(frozen=True)
class Infill:
    """One way to fill a text.

    Attributes:
      text: the text with its blanks filled.
      fills: what was put into each blank; "" where the model said nothing for it.
      well_formed: whether the model gave exactly one span for each blank, in order.
      completion: what the model generated; `ended` says whether the answer's end mark came.
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
        raise UserError(f"{_shown(text)} has no blank to fill: write {blank} or <extra_id_0> in it")
    return parts


def encode_parts(vocabulary: Any, parts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each part, int32 [n], as they stand between blanks.

    Tokens carry the space before a word, so one space before a blank is left for the model to
    say, as it was in training.
    """
    return [_encode_before_blank(vocabulary, parts, k) for k in range(len(parts))]


def _encode_before_blank(vocabulary: Any, parts: Sequence[str], k: int) -> np.ndarray:
    part = parts[k] if k == len(parts) - 1 else parts[k].removesuffix(" ")
    return encode_after(vocabulary, part, start=k == 0)


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
    infill_format: InfillFormat,
    decoding: Decoding = DEFAULT,
    *,
    seed: int = 0,
    blank: str = BLANK,
) -> list[list[Infill]]:
    """Fills the blanks of each text.

    Args:
      generator: of a model trained with the format.
      texts: n texts with blanks.
      infill_format: how blanks are asked for: `Objective.infilling()` of a bound objective.
      decoding, seed: as for `Generator.complete`; the answer's end mark counts among its tokens.
      blank: how a blank is written, besides <extra_id_k>.

    Returns:
      for each text its samples, or its beams with the best first.

    Raises:
      UserError: a text has no blank, or more than the format can fill.
    """
    vocabulary = generator.vocabulary
    split = [split_blanks(text, blank) for text in texts]
    for text, parts in zip(texts, split, strict=True):
        _check_blanks(text, len(parts) - 1, infill_format.most_blanks)
    prompts = [infill_format.prompt(encode_parts(vocabulary, parts)) for parts in split]
    counts = np.array([infill_format.stops(len(parts) - 1) for parts in split], np.int32)
    if generator.bidirectional_inputs != infill_format.bidirectional_inputs:
        generator = dataclasses.replace(
            generator, bidirectional_inputs=infill_format.bidirectional_inputs
        )
    results = generator.generate(
        prompts, decoding, seed=seed, stop=Stop(infill_format.stop_id, counts)
    )

    def one(parts: Sequence[str], completion: Completion) -> Infill:
        spans, well_formed = infill_format.parse(completion.tokens, len(parts) - 1)
        fills = fill(vocabulary, parts, spans)
        return Infill(join(parts, fills), fills, well_formed, completion)

    return [
        [one(parts, completion) for completion in completions]
        for parts, completions in zip(split, results, strict=True)
    ]


def _check_blanks(text: str, blanks: int, most: int) -> None:
    if blanks > most:
        raise UserError(
            f"{_shown(text)} has {blanks} blanks, and this model was trained to fill at most "
            f"{most} at once: ask for fewer in one prompt"
        )


def _shown(text: str) -> str:
    """The beginning of a text, for an error."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
