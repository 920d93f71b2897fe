"""CodeGen2's mixture of causal language modelling and span infilling."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Self

import numpy as np

from objectives import noise
from objectives.base import Setting
from objectives.next_token import (
    CausalText,
    all_predicted,
    append,
    check_range,
    several_documents,
)
from objectives.segments import rewritten, segments
from objectives.special_tokens import sentinels_left, special_tokens
from t5like.data.examples import Lengths, Record, Seq2Seq
from t5like.errors import UserError
from t5like.inference.infill_formats import MaskedSpans

_NAMES = ("<sep>", "<eom>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeGen2(CausalText):
    """Half causal language modelling, half infilling of spans that are moved to the end.

    Nijkamp et al. 2023 ("CodeGen2: Lessons for Training LLMs on Programming and Natural
    Languages", arXiv 2305.02309) and the model card of CodeGen2. With probability `infill_rate`
    the documents of a record are infilled one by one, else the record is the causal stream. Of a
    document `a s1 b s2 c`, the spans s1 and s2 are hidden:

        a <mask_1> b <mask_2> c EOS <sep> <mask_1> s1 <eom> <mask_2> s2 <eom>

    EOS plays <|endoftext|> and stands before <sep>; masks are numbered anew in each document.
    Attention is causal and every token has loss.

    A share of the record is drawn uniformly from [min_ratio, max_ratio], then span lengths
    uniformly from [min_span_length, max_span_length] until they make up that share (the last one
    is cut to fit), then places, uniform over all that leave a token between two spans. A span
    that would cross a document's end stops there, so that nothing crosses documents; a document
    in which no span begins stays as it is.

    `<mask_N>`, `<sep>` and `<eom>` are the vocabulary's own pieces, else sentinels.

    Nothing is ever cut. What a record grows by is known before it is read: its spans come from
    (raw length, rng) alone, each takes two marks and <eom>, no more than `max_spans` documents
    get a <sep>, and only the last may lack its EOS. Raw windows leave room for the worst case;
    the price is that rows of the causal half end in as much padding.

    Otherwise than the reference: no training code is public and no source that could be read
    states the ranges of ratio and lengths, so they are settings; one ratio is drawn for a record,
    not one for each of its documents, since the budget must be known before documents are; the
    card shows a single mask, more are its natural extension; nothing is truncated.

    Attributes:
      cut: "window": documents that share a window are infilled separately. "document": pieces of
        one document; a piece that is infilled ends its text in EOS, also where the document goes
        on, as every prompt does.
      infill_rate: share of records that are infilled.
      min_ratio, max_ratio: of hidden tokens.
      min_span_length, max_span_length: tokens of a hidden span.
      max_spans: most spans of a record, and so the masks that the model learns. None: one more
        than max_ratio asks for on average, as far as the vocabulary has masks.
    """

    infill_rate: float = 0.5
    min_ratio: float = 0.05
    max_ratio: float = 0.5
    min_span_length: int = 1
    max_span_length: int = 64
    max_spans: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "infill_rate", 0.0, 1.0)
        check_range(self, "max_ratio", 0.0, 0.999)
        check_range(self, "min_ratio", 0.0, self.max_ratio)
        check_range(self, "min_span_length", 1, 1e6)
        check_range(self, "max_span_length", self.min_span_length, 1e6)
        if self.max_spans is not None:
            check_range(self, "max_spans", 1, 1e6)

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        special_tokens(setting.vocabulary, _NAMES, "CodeGen2")
        masks = len(bound._masks)
        if bound._spans > masks:
            raise UserError(
                f"CodeGen2 with max_spans={self.max_spans} needs {bound._spans} masks besides "
                f"<sep> and <eom>, and the vocabulary has {masks}: raise "
                f"{type(setting.vocabulary).__name__}.extra_ids by {bound._spans - masks}, or set "
                "CodeGen2.max_spans to what there is"
            )
        if bound._raw_length < 2:
            raise UserError(
                f"train.length is {setting.length}; CodeGen2 needs at least {bound._worst_case(2)}"
            )
        return bound

    # --- tokens ---

    @functools.cached_property
    def _special(self) -> Mapping[str, int]:
        return special_tokens(self.setting.vocabulary, _NAMES, "CodeGen2")

    @functools.cached_property
    def _masks(self) -> np.ndarray:
        """int32, `<mask_N>` in order of use: all that there are."""
        vocabulary = self.setting.vocabulary
        own: list[int] = []
        while (token := vocabulary.named_id(f"<mask_{len(own) + 1}>")) is not None:
            own.append(token)
        if own:
            return np.array(own, np.int32)
        return vocabulary.sentinels[: sentinels_left(vocabulary, _NAMES)]

    @functools.cached_property
    def _spans(self) -> int:
        """`max_spans`, resolved."""
        if self.max_spans is not None:
            return self.max_spans
        mean = (self.min_span_length + self.max_span_length) / 2
        usual = 1 + math.ceil(self.max_ratio * self.setting.length / mean)
        return max(1, min(len(self._masks), usual))

    @functools.cached_property
    def _format(self) -> MaskedSpans:
        sep, eom = (self._special[name] for name in _NAMES)
        return MaskedSpans(self._masks[: self._spans], sep, eom, self._eos)

    def infilling(self) -> MaskedSpans:
        return self._format

    @property
    def named_tokens(self) -> Mapping[int, str]:
        masks = {int(mask): f"<mask_{k}>" for k, mask in enumerate(self._format.masks, 1)}
        return masks | {token: name for name, token in self._special.items()}

    # --- lengths ---

    def _most_spans(self, raw_length: int) -> int:
        """Most spans of so many tokens, whatever is drawn."""
        most = max(1, round(self.max_ratio * raw_length))
        return min(self._spans, -(-most // self.min_span_length))

    def _grown(self, raw_length: int, spans: int) -> int:
        """Most tokens that a record becomes; with the stream's EOS of a window already in it."""
        if self.cut == "document":
            return raw_length + 1 + (1 + 3 * spans if spans else 0)
        return raw_length + (1 + 4 * spans if spans else 0)

    def _worst_case(self, raw_length: int) -> int:
        spans = self._most_spans(raw_length) if self.infill_rate else 0
        return self._grown(raw_length, spans)

    @functools.cached_property
    def _raw_length(self) -> int:
        return noise.longest_raw(lambda n: self._worst_case(n) <= self.setting.length, 0)

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        return Lengths(0, self._grown(raw_length, len(self._wanted(raw_length, rng))))

    # --- corruption ---

    def _wanted(self, raw_length: int, rng: np.random.Generator) -> np.ndarray:
        """Lengths of the spans to hide in so many tokens, int64 [S]; none: a causal record."""
        if rng.random() >= self.infill_rate or raw_length == 0:
            return np.empty(0, np.int64)
        ratio = rng.uniform(self.min_ratio, self.max_ratio)
        hidden = max(1, round(ratio * raw_length))
        lengths = rng.integers(
            self.min_span_length, self.max_span_length, self._most_spans(raw_length), endpoint=True
        )
        ends = lengths.cumsum()
        count = min(int(ends.searchsorted(hidden)) + 1, len(lengths), raw_length - hidden + 1)
        lengths = lengths[:count]
        lengths[-1] -= max(0, int(ends[count - 1]) - hidden)
        return lengths

    def corrupt(self, record: Record, rng: np.random.Generator) -> Seq2Seq:
        tokens, documents = record.tokens, several_documents(record)
        lengths = self._wanted(len(tokens), rng)
        if self.cut == "document" and record.ends_document:
            tokens = append(tokens, self._eos)
        if len(lengths):
            spans = _placed(lengths, len(record.tokens), rng)
            tokens, documents = self._infilled(tokens, documents, spans)
        return all_predicted(tokens, documents)

    def _infilled(
        self, tokens: np.ndarray, documents: np.ndarray | None, spans: noise.Spans
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The record with each document that holds spans rearranged, and its document ids."""
        found = segments(tokens, documents, self._eos)
        owners = found.stops.searchsorted(spans.starts, "right")
        ends = np.minimum(spans.ends, found.ends[owners])
        inside = ends > spans.starts
        texts = {}
        for d in np.unique(owners[inside]).tolist():
            mine = inside & (owners == d)
            edges = np.stack([spans.starts[mine], ends[mine]], axis=1).ravel()
            pieces = np.split(tokens[: found.ends[d]], [found.starts[d], *edges.tolist()])[1:]
            parts, hidden = pieces[::2], pieces[1::2]
            texts[d] = np.concatenate([self._format.prompt(parts), self._format.answer(hidden)])
        return rewritten(tokens, documents, found, texts)


def _placed(lengths: np.ndarray, raw_length: int, rng: np.random.Generator) -> noise.Spans:
    """Spans of these lengths, int64 [S], in order, at places uniform over all with gaps between."""
    spans = len(lengths)
    free = raw_length - int(lengths.sum()) - (spans - 1)
    # The i-th of S sorted distinct numbers below free + S has as many free tokens before its span
    # as it is above i, and there are i gaps of one token before it.
    starts = rng.choice(free + spans, spans, replace=False, shuffle=False)
    starts.sort()
    starts += lengths.cumsum() - lengths
    return noise.Spans(starts, starts + lengths)
