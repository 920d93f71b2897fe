"""How a model is asked to fill blanks and how it answers: one format for each way of training.

Token ids in, token ids out; text is t5like/inference/infill.py's. Objectives that teach a format
return it from `Objective.infilling()`. The host half only: nothing here needs JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

Ids = np.ndarray


class InfillFormat(Protocol):
    """What every format has; all ids are int32.

    For any n spans, `parse(answer(spans), n)` is (spans, True), and where the objective hides
    just these spans, what it trains on is `prompt(parts)` followed by `answer(spans)` (on an
    encoder-decoder the one is the encoder's, the other the decoder's).

    Attributes:
      stop_id: the token that ends an answer, at its `stops(blanks)`-th occurrence.
      most_blanks: most blanks of one prompt.
      bidirectional_inputs: whether a decoder was trained with prompts seen in both directions.
    """

    stop_id: int
    most_blanks: int
    bidirectional_inputs: bool

    @property
    def marks(self) -> Ids:
        """int32, the tokens that stand for a blank, in order of use; empty where none does."""

    def prompt(self, parts: Sequence[Ids]) -> Ids:
        """The model's input: n + 1 parts of a text, any of them empty, around n blanks."""

    def answer(self, spans: Sequence[Ids]) -> Ids:
        """What a perfect model says for the n blanks, its end mark included."""

    def stops(self, blanks: int) -> int:
        """How many `stop_id` an answer for so many blanks has, the last of which ends it."""

    def parse(self, ids: Ids, blanks: int) -> tuple[list[Ids], bool]:
        """A span for each blank from generated ids, with or without the end mark.

        Whatever the model wrote is survived: a blank it left out is empty.

        Returns:
          (the spans, whether the answer has one for each blank, in order, and nothing else).
        """


def parse_spans(
    ids: np.ndarray, marks: np.ndarray, blanks: int, close_id: int | None = None
) -> tuple[list[np.ndarray], bool]:
    """Splits generated tokens [n] at the marks that open a span.

    A blank that was left out is empty, of two spans for one blank the first counts, and what
    stands in no span or in the span of no blank is dropped.

    Args:
      ids: int32 [n].
      marks: int32, marks[k] opens the span of blank k.
      close_id: closes a span, if the format has such a token; the last span may do without.

    Returns:
      (a span for each blank, whether there was exactly one for each, in order).
    """
    number = {int(mark): k for k, mark in enumerate(marks)}
    stray: list[int] = []
    order, spans, current, well_formed = [], {}, stray, True
    for token in np.asarray(ids).tolist():
        if token in number:
            well_formed &= close_id is None or current is stray
            current = []
            order.append(number[token])
            spans.setdefault(number[token], current)
        elif token == close_id:
            well_formed &= current is not stray
            current = stray
        else:
            current.append(token)
    found = [np.array(spans.get(k, []), np.int32) for k in range(blanks)]
    return found, well_formed and order == list(range(blanks)) and not stray


@dataclasses.dataclass(frozen=True, eq=False)
class Sentinels:
    """Span corruption's: `a <0> b <1> c EOS`, answered by `<0> s0 <1> s1 EOS`.

    Raffel et al. 2020, section 3.1.4; UL2 puts its mode's tokens first (Tay et al. 2023, section
    3.1.3).

    Attributes:
      sentinels: int32, in order of use.
      eos_id: ends both sides.
      mode_ids: stand before the text.
      bidirectional_inputs: see InfillFormat.
    """

    sentinels: np.ndarray
    eos_id: int
    mode_ids: Sequence[int] | np.ndarray = ()
    bidirectional_inputs: bool = True

    @property
    def marks(self) -> Ids:
        return self.sentinels

    @property
    def stop_id(self) -> int:
        return self.eos_id

    @property
    def most_blanks(self) -> int:
        return len(self.sentinels)

    def stops(self, blanks: int) -> int:
        return 1

    def prompt(self, parts: Sequence[Ids]) -> Ids:
        pieces = [self.mode_ids]
        for k, part in enumerate(parts):
            pieces += [self.sentinels[k - 1 : k], part] if k else [part]
        return _joined(*pieces, [self.eos_id])

    def answer(self, spans: Sequence[Ids]) -> Ids:
        pieces = []
        for k, span in enumerate(spans):
            pieces += [self.sentinels[k : k + 1], span]
        return _joined(*pieces, [self.eos_id])

    def parse(self, ids: Ids, blanks: int) -> tuple[list[Ids], bool]:
        return parse_spans(_until(ids, self.eos_id), self.sentinels, blanks)


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedSpans:
    """CodeGen2's (Nijkamp et al. 2023; as its model card writes it).

    `a <mask_1> b <mask_2> c EOS <sep> <mask_1>` is answered by `s1 <eom> <mask_2> s2 <eom>`: the
    prompt opens the first span, the answer all others. The model card shows one blank; more are
    the natural extension.

    Attributes:
      masks: int32, `<mask_N>` in order of use; as many as the model was trained with.
      sep_id, eom_id, eos_id: `<sep>`, `<eom>` and what plays <|endoftext|>.
    """

    masks: np.ndarray
    sep_id: int
    eom_id: int
    eos_id: int
    bidirectional_inputs: bool = False

    @property
    def marks(self) -> Ids:
        return self.masks

    @property
    def stop_id(self) -> int:
        return self.eom_id

    @property
    def most_blanks(self) -> int:
        return len(self.masks)

    def stops(self, blanks: int) -> int:
        return blanks

    def prompt(self, parts: Sequence[Ids]) -> Ids:
        pieces = []
        for k, part in enumerate(parts):
            pieces += [self.masks[k - 1 : k], part] if k else [part]
        return _joined(*pieces, [self.eos_id, self.sep_id], self.masks[:1])

    def answer(self, spans: Sequence[Ids]) -> Ids:
        pieces = []
        for k, span in enumerate(spans):
            pieces += [self.masks[k : k + 1] if k else [], span, [self.eom_id]]
        return _joined(*pieces)

    def parse(self, ids: Ids, blanks: int) -> tuple[list[Ids], bool]:
        opened = _joined(self.masks[:1], _until(ids, self.eos_id))
        return parse_spans(opened, self.masks, blanks, self.eom_id)


@dataclasses.dataclass(frozen=True)
class PrefixSuffixMiddle:
    """Fill-in-the-middle's PSM: `<PRE> prefix <SUF> suffix <MID>`, answered by `middle EOS`.

    Bavarian et al. 2022, section 3.

    Attributes:
      prefix_id, suffix_id, middle_id: the three marks.
      eos_id: ends a middle.
    """

    prefix_id: int
    suffix_id: int
    middle_id: int
    eos_id: int
    bidirectional_inputs: bool = False
    most_blanks: int = 1

    @property
    def marks(self) -> Ids:
        return np.empty(0, np.int32)

    @property
    def stop_id(self) -> int:
        return self.eos_id

    def stops(self, blanks: int) -> int:
        return 1

    def prompt(self, parts: Sequence[Ids]) -> Ids:
        prefix, suffix = parts
        return _joined([self.prefix_id], prefix, [self.suffix_id], suffix, [self.middle_id])

    def answer(self, spans: Sequence[Ids]) -> Ids:
        (middle,) = spans
        return _joined(middle, [self.eos_id])

    def parse(self, ids: Ids, blanks: int) -> tuple[list[Ids], bool]:
        said = _until(ids, self.eos_id)
        marks = np.isin(said, (self.prefix_id, self.suffix_id, self.middle_id)).nonzero()[0]
        middle = said[: marks[0]] if len(marks) else said
        return [middle], not len(marks)


def _joined(*pieces: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces])


def _until(ids: np.ndarray, end_id: int) -> np.ndarray:
    """int32, what stands before the first end_id."""
    ids = np.asarray(ids, np.int32)
    ends = (ids == end_id).nonzero()[0]
    return ids[: ends[0]] if len(ends) else ids
