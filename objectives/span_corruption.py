"""Span corruption."""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import numpy as np

from objectives import noise
from objectives.base import Setting
from objectives.next_token import (
    NextToken,
    append_last,
    check_range,
    check_targets_length,
    several_documents,
    usual_predictions,
)
from t5like.data.examples import Document, Lengths, Record, Seq2Seq, Unit, Window
from t5like.errors import UserError
from t5like.inference.infill_formats import Sentinels


@functools.lru_cache(maxsize=256)
def _fill(
    architecture: str, length: int, density: float, mean_span: float, random_roll: bool
) -> tuple[int, int]:
    """The raw tokens that fill a row of `length` tokens, and their targets.

    An encoder-decoder's row holds the inputs; a decoder's row holds inputs and targets. A rolled
    mask may cut one span in two, for which both sides keep a place.
    """
    spare = int(random_roll)
    if architecture == "encoder_decoder":
        raw, targets = noise.random_spans_lengths(length - spare, density, mean_span)
        return raw, targets + spare

    def row(raw: int) -> int:
        return raw + 2 * (noise.noise_counts(raw, density, mean_span)[1] + spare) + 2

    raw = noise.longest_raw(lambda n: row(n) <= length, 0)
    tokens, spans = noise.noise_counts(raw, density, mean_span)
    return raw, tokens + spans + spare + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption(NextToken):
    """Replaces spans by sentinels and predicts what they held (Raffel et al. 2020, section 3.3.4).

    Inputs: what is kept, span i as sentinel i, EOS. Targets: for each span its sentinel and its
    tokens, then EOS; no last sentinel (the paper's figure 2 draws one, T5's code makes none). Raw
    windows over concatenated documents, without separators, are of the length whose inputs fill
    the row exactly.

    On a decoder inputs and targets share the row, the inputs as a prefix.

    Otherwise than T5's preprocessor:
    - lengths and masks round alike, in float64, so targets never overflow (see noise.py);
    - more spans than sentinels is an error, where T5's ids run on into ordinary vocabulary;
    - with random_roll, both sides number the noise spans, and there is room for the span that
      the roll cuts in two; T5's sentinels no longer match then, and its tail is trimmed;
    - a text of one token has no noise, and its target is EOS alone.

    Attributes:
      noise_density: share of noise tokens.
      mean_noise_span_length: mean tokens of a noise span.
      random_roll: rotate the mask, so that the first token may be noise and the last need not.
      bidirectional_inputs: on a decoder, whether the inputs see each other in both directions.
    """

    architectures = ("encoder_decoder", "decoder")

    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0
    random_roll: bool = False
    bidirectional_inputs: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "noise_density", 0.0, 0.999)
        check_range(self, "mean_noise_span_length", 1.0, 1e6)

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        if bound.raw_length < 2:
            raise UserError(f"train.length is {setting.length}; SpanCorruption needs at least 6")
        who = f"SpanCorruption with noise_density={self.noise_density}"
        check_targets_length(bound, bound.targets_needed, who)
        sentinels, spans = len(setting.vocabulary.sentinels), bound.sentinels_needed
        if spans > sentinels:
            raise UserError(
                f"SpanCorruption with train.length={setting.length}, noise_density="
                f"{self.noise_density} and mean_noise_span_length={self.mean_noise_span_length} "
                f"needs {spans} sentinels; the vocabulary has {sentinels}: raise its extra_ids to "
                f"{spans}, or mean_noise_span_length"
            )
        return bound

    @property
    def _has_encoder(self) -> bool:
        return self.setting.architecture == "encoder_decoder"

    @property
    def _raw_and_targets(self) -> tuple[int, int]:
        return _fill(
            self.setting.architecture,
            self.setting.length,
            self.noise_density,
            self.mean_noise_span_length,
            self.random_roll,
        )

    @property
    def raw_length(self) -> int:
        """Tokens of a record that fills a row."""
        return self._raw_and_targets[0]

    @property
    def targets_needed(self) -> int:
        """Most tokens of the targets."""
        return self._raw_and_targets[1]

    @property
    def sentinels_needed(self) -> int:
        """Most noise spans of a record."""
        return self._counts(self.raw_length)[1]

    @property
    def keeps_documents_apart(self) -> bool:
        """A window's noise spans may cross documents, and a decoder reads its inputs only once."""
        return self.cut == "document"

    @property
    def usual_predictions(self) -> int | None:
        return None if self._has_encoder else usual_predictions(self.targets_needed)

    @property
    def reads_both_ways(self) -> bool:
        return not self._has_encoder and self.bidirectional_inputs

    def infilling(self) -> Sentinels:
        return Sentinels(
            self.setting.vocabulary.sentinels[: self.sentinels_needed],
            self._eos,
            bidirectional_inputs=self.bidirectional_inputs,
        )

    def _counts(self, length: int) -> tuple[int, int]:
        """Noise tokens and, at most, noise spans of `length` raw tokens."""
        tokens, spans = noise.noise_counts(length, self.noise_density, self.mean_noise_span_length)
        return tokens, spans + (self.random_roll and spans > 0)

    @property
    def unit(self) -> Unit:
        return Document(self.raw_length) if self.cut == "document" else Window(self.raw_length)

    @property
    def lengths(self) -> Lengths:
        if not self._has_encoder:
            return Lengths(self.setting.length)
        return Lengths(self.setting.length, self.setting.targets_length or self.targets_needed)

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        tokens, spans = self._counts(raw_length)
        return Lengths(raw_length - tokens + spans + 1, tokens + spans + 1)

    def _spans(self, length: int, rng: np.random.Generator) -> noise.Spans:
        arguments = (length, self.noise_density, self.mean_noise_span_length, rng)
        if self.random_roll:
            return noise.spans_of(noise.random_spans_noise_mask(*arguments, random_roll=True))
        return noise.random_spans(*arguments)

    def corrupt(self, record: Record, rng: np.random.Generator) -> Seq2Seq:
        spans = self._spans(len(record.tokens), rng)
        split = noise.split_at_spans(spans, len(record.tokens))
        sentinels = self.setting.vocabulary.sentinels[: len(spans.starts)]

        def side(source: np.ndarray, slots: np.ndarray) -> np.ndarray:
            tokens = np.empty(len(source) + 1, np.int32)
            tokens[:-1] = record.tokens[source]
            tokens[slots] = sentinels
            tokens[-1] = self._eos
            return tokens

        documents = several_documents(record)
        input_documents = target_documents = None
        if documents is not None:
            input_documents = append_last(documents[split.inputs])
            target_documents = append_last(documents[split.targets])
        return Seq2Seq(
            side(split.inputs, split.input_sentinels),
            side(split.targets, split.target_sentinels),
            input_documents,
            target_documents,
            bidirectional_inputs=self.bidirectional_inputs,
        )
