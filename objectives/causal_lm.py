"""Causal language modelling."""

from __future__ import annotations

import dataclasses

import numpy as np

from objectives.next_token import CausalText, all_predicted, append, several_documents
from t5like.data.examples import Lengths, Record, Seq2Seq


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM(CausalText):
    """Predicts every token from those before it (Radford et al. 2018, section 3.1, equation 1).

    The stream is T5's `full_lm`: documents one after another, an EOS at the end of each and
    nowhere else, cut into rows of `length`. With cut="document" a record is one document and its
    EOS; a piece of a document that goes on has none.

    Otherwise than T5's preprocessor: no id is ever dropped (`reduce_concat_tokens` removes every
    token 0, which is an ordinary token in many vocabularies), and documents are not cut at
    65,536 tokens.
    """

    @property
    def _raw_length(self) -> int:
        length = self.setting.length
        return max(length - 1, 1) if self.cut == "document" else length

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        return Lengths(0, raw_length + (self.cut == "document"))

    def corrupt(self, record: Record, rng: np.random.Generator) -> Seq2Seq:
        targets = record.tokens
        if self.cut == "document" and record.ends_document:
            targets = append(targets, self._eos)
        return all_predicted(targets, several_documents(record))
