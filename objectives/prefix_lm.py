"""Prefix language modelling."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

from objectives import noise
from objectives.base import Setting
from objectives.next_token import NextToken, append, append_last, check_range, several_documents
from t5like.data.examples import Document, Lengths, Record, Seq2Seq, Unit, Window
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM(NextToken):
    """Predicts the rest of a text from its beginning, which is seen in both directions.

    Raffel et al. 2020, section 3.2.1 (attention) and 3.3.1 (objective). The prefix of n tokens
    is uniform over [max(1, round((1 - 2 noise_density) (n - 1))), n - 1]: see
    `noise.random_prefix_length`.

    - encoder_decoder: T5's `prefix_lm`: raw pieces of `length - 1`, EOS on both sides. T5 cuts
      documents one by one: set cut="document" for that.
    - decoder: T5's `pack_prefix_lm_decoder_only`: rows of `length` from the causal stream, loss
      on the suffix, no EOS between prefix and suffix. With cut="document" a document ends in EOS.

    T5's `pack_prefix_lm_encoder_decoder`, which joins two pieces so that both rows are full, is not
    there: train.pack fills rows.

    Otherwise than T5: targets are never trimmed to fit (`append_eos_after_trim` eats the tail);
    a targets_length that is too short is an error. A text of one token has an empty prefix.

    Attributes:
      noise_density: expected share of the suffix, at most 0.5 (as in T5).
      loss_on_inputs: on a decoder, whether the prefix is predicted too. It then sees each token
        that it is asked for, unless bidirectional_inputs is off.
      bidirectional_inputs: on a decoder, whether the prefix sees itself in both directions.
    """

    architectures = ("encoder_decoder", "decoder")

    noise_density: float = 0.5
    loss_on_inputs: bool = False
    bidirectional_inputs: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "noise_density", 0.0, 0.5)

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        if setting.length < 3:
            raise UserError(f"train.length is {setting.length}; PrefixLM needs at least 3")
        needed = bound._targets_needed
        if bound._has_encoder and (setting.targets_length or needed) < needed:
            raise UserError(
                f"train.targets_length is {setting.targets_length}; PrefixLM with "
                f"train.length={setting.length} and noise_density={self.noise_density} makes "
                f"targets of up to {needed} tokens: set it to {needed} or to None"
            )
        return bound

    @property
    def _has_encoder(self) -> bool:
        return self.setting.architecture == "encoder_decoder"

    @property
    def _raw_length(self) -> int:
        ends = self._has_encoder or self.cut == "document"
        return self.setting.length - ends

    @property
    def _targets_needed(self) -> int:
        # A prefix of at least one token, or none of a text of one.
        most = self._raw_length - 1
        least = min(most, max(1, round((1 - 2 * self.noise_density) * most)))
        return max(self._raw_length - least, 1) + 1

    @property
    def unit(self) -> Unit:
        if self.cut == "document":
            return Document(self._raw_length)
        separator = None if self._has_encoder else self._eos
        return Window(self._raw_length, separator)

    @property
    def lengths(self) -> Lengths:
        if not self._has_encoder:
            return Lengths(self.setting.length)
        return Lengths(self.setting.length, self.setting.targets_length or self._targets_needed)

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        prefix = noise.random_prefix_length(raw_length, self.noise_density, rng)
        suffix = raw_length - prefix
        if self._has_encoder:
            return Lengths(prefix + 1, suffix + 1)
        return Lengths(prefix, suffix + (self.cut == "document"))

    def corrupt(self, record: Record, rng: np.random.Generator) -> Seq2Seq:
        prefix = noise.random_prefix_length(len(record.tokens), self.noise_density, rng)
        inputs, targets = record.tokens[:prefix], record.tokens[prefix:]
        documents = several_documents(record)
        input_documents = target_documents = None
        if documents is not None:
            input_documents, target_documents = documents[:prefix], documents[prefix:]
        if self._has_encoder:
            inputs, input_documents = append(inputs, self._eos), append_last(input_documents)
        if self._has_encoder or (self.cut == "document" and record.ends_document):
            targets, target_documents = append(targets, self._eos), append_last(target_documents)
        return Seq2Seq(
            inputs,
            targets,
            input_documents,
            target_documents,
            bidirectional_inputs=self.bidirectional_inputs,
            loss_on_inputs=self.loss_on_inputs,
        )
