"""BART's denoising: text infilling and sentence permutation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import numpy as np

from objectives.base import Setting
from objectives.next_token import Cut, NextToken, append, check_range
from t5like.data.examples import Document, Lengths, Record, Seq2Seq, Unit, Window
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bart(NextToken):
    """Rewrites a text whose sentences were shuffled and whose spans were hidden.

    Lewis et al. 2020, section 2.2, as the paper's large models are trained (section 5.1):

    - sentence permutation: sentences are put in random order. One ends with a token whose text
      ends in a full stop, an exclamation or a question mark or a line break; of several in a row,
      with the last.
    - text infilling: spans with lengths from a Poisson distribution, round(mask_rate * tokens)
      tokens in all, are each replaced by one [MASK]; a span of length 0 inserts a [MASK].
    - targets: the whole text. Both sides end in EOS.

    Otherwise than the released code (fairseq's denoising_dataset.py): spans are of tokens, not of
    words, and no two touch, so that one [MASK] is one span; the 10% random tokens of its recipe,
    which the paper does not mention, are left out; sentences also end at !, ? and line breaks
    (fairseq knows full stops only).

    Attributes:
      mask_rate: share of the tokens in spans, at most 0.5.
      mean_span_length: lambda of the Poisson distribution.
      permute_sentences: whether sentences change places.
    """

    architectures = ("encoder_decoder",)

    cut: Cut = "document"
    mask_rate: float = 0.3
    mean_span_length: float = 3.0
    permute_sentences: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "mask_rate", 0.0, 0.5)
        check_range(self, "mean_span_length", 1.0, 1e3)

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        if setting.vocabulary.mask_id is None:
            raise UserError(
                f"{type(setting.vocabulary).__name__} has no mask token, which Bart needs: set its "
                "extra_ids to at least 1"
            )
        length, targets = setting.length, setting.targets_length or setting.length
        if length < 2 or targets < length:
            raise UserError(
                f"train.length is {length}, train.targets_length {targets}; Bart's targets may be "
                "as long as its inputs, 2 at least: set train.targets_length to None"
            )
        return bound

    @property
    def named_tokens(self) -> dict[int, str]:
        return {int(self.setting.vocabulary.mask_id): "[MASK]"}

    @property
    def keeps_documents_apart(self) -> bool:
        """Sentences and spans of a window may come to lie in another document."""
        return self.cut == "document"

    @property
    def unit(self) -> Unit:
        raw_length = self.setting.length - 1
        return Document(raw_length) if self.cut == "document" else Window(raw_length)

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.setting.length, self.setting.targets_length or self.setting.length)

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        spans = self._span_lengths(raw_length, rng)
        return Lengths(raw_length - int(spans.sum()) + len(spans) + 1, raw_length + 1)

    def _span_lengths(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """int64 [S], of no more spans than masked tokens, so that inputs never outgrow the text."""
        masked = round(self.mask_rate * length)
        edges = np.minimum(rng.poisson(self.mean_span_length, masked).cumsum(), masked)
        edges[-1:] = masked
        return np.diff(edges[: edges.searchsorted(masked) + 1], prepend=0)

    def corrupt(self, record: Record, rng: np.random.Generator) -> Seq2Seq:
        spans = self._span_lengths(len(record.tokens), rng)
        noised = self._permuted(record.tokens, rng) if self.permute_sentences else record.tokens
        # Each span has a gap of its own between the tokens that are kept.
        gaps = rng.choice(len(noised) - int(spans.sum()) + 1, len(spans), replace=False)
        order = gaps.argsort()
        gaps, spans = gaps[order], spans[order]
        hidden = gaps.repeat(spans) + np.arange(spans.sum())
        inputs = np.insert(np.delete(noised, hidden), gaps, self.setting.vocabulary.mask_id)
        return Seq2Seq(append(inputs, self._eos), append(record.tokens, self._eos))

    @functools.cached_property
    def _ends_sentence(self) -> np.ndarray:
        """bool [V]: whether a token's text ends a sentence."""
        vocabulary = self.setting.vocabulary
        texts = (vocabulary.decode([i]).rstrip(" ") for i in range(vocabulary.size))
        return np.array([text.endswith((".", "!", "?", "\n")) for text in texts])

    def _permuted(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """tokens [L] with their sentences in random order."""
        ends = self._ends_sentence[tokens]
        sentences = np.append(False, ends[:-1] & ~ends[1:]).cumsum()
        places = rng.permutation(sentences[-1] + 1)
        return tokens[places[sentences].argsort(kind="stable")]
