"""Prefix language modelling."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

from objectives import noise
from objectives.base import Setting
from objectives.next_token import (
    NextToken,
    append,
    append_last,
    check_range,
    check_targets_length,
    prepend,
    prepend_first,
    several_documents,
)
from t5like.data.examples import Document, Lengths, Record, Seq2Seq, Unit, Window
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM(NextToken):
    """Predicts the rest of a text from its beginning, which is seen in both directions.

    Raffel et al. 2020, section 3.2.1 (attention) and 3.3.1 (objective). The prefix is uniform
    over `noise.prefix_range`: of n tokens, 1 to n - 1 at noise_density 0.5, half of them or more
    at 0.25.

    - encoder_decoder: T5's `prefix_lm`: raw pieces of `length - 1`, EOS on both sides. T5 cuts
      documents one by one: set cut="document" for that.
    - decoder: T5's `pack_prefix_lm_decoder_only`: rows of `length` from the causal stream, loss
      on the suffix, no EOS between prefix and suffix. With cut="document" a document ends in EOS.

    T5's `pack_prefix_lm_encoder_decoder`, which joins two pieces so that both rows are full, is not
    there: train.pack fills rows.

    Otherwise than T5: targets are never trimmed to fit (`append_eos_after_trim` eats the tail);
    a targets_length that is too short is an error. A text of one token has an empty prefix. A
    noise_density above 0.5, which T5 refuses, keeps its meaning: shorter prefixes.

    Attributes:
      noise_density: expected share of the suffix.
      loss_on_inputs: on a decoder, whether the prefix is predicted too. It then sees each token
        that it is asked for, unless bidirectional_inputs is off.
      bidirectional_inputs: on a decoder, whether the prefix sees itself in both directions.
      sentinel: whether a sentinel ends the prefix and begins the rest, as if the rest were the
        one noise span of span corruption.
    """

    architectures = ("encoder_decoder", "decoder")

    noise_density: float = 0.5
    loss_on_inputs: bool = False
    bidirectional_inputs: bool = True
    sentinel: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "noise_density", 0.0, 0.999)

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        if bound.raw_length < 2:
            least = setting.length + 2 - bound.raw_length
            raise UserError(f"train.length is {setting.length}; PrefixLM needs at least {least}")
        if bound.sentinels_needed > len(setting.vocabulary.sentinels):
            raise UserError(
                "PrefixLM.sentinel is True, but the vocabulary has no sentinel: set its extra_ids "
                "to at least 1"
            )
        who = f"PrefixLM with noise_density={self.noise_density}"
        check_targets_length(bound, bound.targets_needed, who)
        return bound

    @property
    def _has_encoder(self) -> bool:
        return self.setting.architecture == "encoder_decoder"

    @property
    def raw_length(self) -> int:
        """Tokens of a record that fills a row."""
        if self._has_encoder:  # at most all but one are inputs: a sentinel has that one's place
            return self.setting.length - 1
        return self.setting.length - (self.cut == "document") - 2 * self.sentinel

    @property
    def targets_needed(self) -> int:
        """Most tokens of the targets."""
        least, _ = noise.prefix_range(self.raw_length, self.noise_density)
        return self.raw_length - least + self.sentinel + 1

    @property
    def sentinels_needed(self) -> int:
        """Most sentinels of an example."""
        return int(self.sentinel)

    @property
    def reads_both_ways(self) -> bool:
        return not self._has_encoder and self.bidirectional_inputs

    @property
    def unit(self) -> Unit:
        if self.cut == "document":
            return Document(self.raw_length)
        separator = None if self._has_encoder else self._eos
        return Window(self.raw_length, separator)

    @property
    def lengths(self) -> Lengths:
        if not self._has_encoder:
            return Lengths(self.setting.length)
        return Lengths(self.setting.length, self.setting.targets_length or self.targets_needed)

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        prefix = noise.random_prefix_length(raw_length, self.noise_density, rng)
        inputs, suffix = prefix + self.sentinel, raw_length - prefix + self.sentinel
        if self._has_encoder:
            return Lengths(inputs + 1, suffix + 1)
        return Lengths(inputs, suffix + (self.cut == "document"))

    def corrupt(self, record: Record, rng: np.random.Generator) -> Seq2Seq:
        prefix = noise.random_prefix_length(len(record.tokens), self.noise_density, rng)
        documents = several_documents(record)
        ends = self._has_encoder or (self.cut == "document" and record.ends_document)
        if documents is None:
            return self._example(record.tokens[:prefix], record.tokens[prefix:], ends)
        return self._example(
            record.tokens[:prefix], record.tokens[prefix:], ends,
            documents[:prefix], documents[prefix:],
        )  # fmt: skip

    def continuation(self, prefix: np.ndarray, rest: np.ndarray) -> Seq2Seq:
        example = self._example(prefix, rest, ends=True)
        return dataclasses.replace(example, loss_on_inputs=False)

    def _example(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        ends: bool,
        input_documents: np.ndarray | None = None,
        target_documents: np.ndarray | None = None,
    ) -> Seq2Seq:
        """Prefix and rest with what stands between and behind them."""
        if self.sentinel:
            first = self.setting.vocabulary.sentinels[:1]
            inputs, input_documents = append(inputs, first[0]), append_last(input_documents)
            targets = prepend(targets, first)
            target_documents = prepend_first(target_documents, 1)
        if self._has_encoder:
            inputs, input_documents = append(inputs, self._eos), append_last(input_documents)
        if ends:
            targets, target_documents = append(targets, self._eos), append_last(target_documents)
        return Seq2Seq(
            inputs,
            targets,
            input_documents,
            target_documents,
            bidirectional_inputs=self.bidirectional_inputs,
            loss_on_inputs=self.loss_on_inputs,
        )
