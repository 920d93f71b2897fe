"""Hiding some of a text's tokens: the host half that masked language models share."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, Self

import numpy as np

from objectives.base import Objective, Setting
from objectives.next_token import Cut, check_choice, check_range, several_documents
from t5like.data.examples import Aligned, Document, Lengths, Record, Unit, Window
from t5like.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Framed(Objective):
    """Base of objectives that hide parts of a text, framed by [CLS] and [SEP] where there are such.

    Attributes:
      cut: "window" (over the stream of documents, a separator after each) or "document".
    """

    architectures = ("encoder", "decoder")

    cut: Cut = "window"

    def __post_init__(self):
        check_choice(self, "cut", ("window", "document"))

    @property
    def reads_in_place(self) -> bool:
        return True

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        if setting.vocabulary.mask_id is None:
            raise UserError(
                f"{type(setting.vocabulary).__name__} has no mask token, which "
                f"{type(self).__name__} needs: set its extra_ids to at least 1"
            )
        return bound

    @functools.cached_property
    def _ends(self) -> tuple[int, int] | None:
        """[CLS] and [SEP], put around an example if the vocabulary has them."""
        named_id = self.setting.vocabulary.named_id
        ends = named_id("[CLS]"), named_id("[SEP]")
        return None if None in ends else ends

    @property
    def _frame(self) -> int:
        """Tokens put around an example."""
        return 0 if self._ends is None else 2

    @functools.cached_property
    def _separator(self) -> int | None:
        """What stands between the documents of a window."""
        return self._ends[1] if self._ends else self.setting.vocabulary.eos_id

    @property
    def _raw_length(self) -> int:
        """The most raw tokens of an example."""
        return self.setting.length - self._frame

    @property
    def unit(self) -> Unit:
        if self.cut == "document":
            return Document(self._raw_length)
        return Window(self._raw_length, self._separator)

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.setting.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking(Framed):
    """Base of objectives that hide tokens in place and ask for them at their own positions.

    An example's targets are the text, its tokens are what is shown of it, and its weights are 1
    where a token was chosen. Each token is chosen at most once. Text is framed by [CLS] and [SEP]
    where the vocabulary has them; they and the separators of a window are never chosen.

    Attributes:
      selection: "budget", exactly max(1, round(rate * tokens)), [CLS] and [SEP] counted among
        the tokens; or "iid", every token with probability `rate`.
      rate: share of tokens to choose.
      eval_rate: the same on held-out data, so that runs of different rates compare; None: `rate`.
      mask_probability, random_probability: that a chosen token shows [MASK], or one drawn
        uniformly from the whole vocabulary; the rest show themselves.
      whole_word: words are chosen instead of tokens, in random order; one that would exceed the
        number is passed over and a later, shorter one may follow, so there can be fewer; words
        are as the vocabulary's `word_starts` has them.
      max_predictions: most chosen tokens an example; None: no limit, and the only choice with
        selection="iid".
    """

    selection: Literal["budget", "iid"] = "budget"
    rate: float = 0.15
    eval_rate: float | None = 0.15
    mask_probability: float = 0.8
    random_probability: float = 0.1
    whole_word: bool = False
    max_predictions: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.selection == "iid" and self.max_predictions is not None:
            raise UserError(
                f"{type(self).__name__}.max_predictions is {self.max_predictions}, but "
                "selection='iid' has no budget: set one of them back"
            )
        check_choice(self, "selection", ("budget", "iid"))
        check_range(self, "rate", 0.0, 1.0)
        check_range(self, "mask_probability", 0.0, 1.0)
        check_range(self, "random_probability", 0.0, 1.0 - self.mask_probability + 1e-9)
        if self.eval_rate is not None:
            check_range(self, "eval_rate", 0.0, 1.0)

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        if setting.length <= bound._frame:
            raise UserError(
                f"train.length is {setting.length}; {type(self).__name__} needs {bound._frame + 1}"
            )
        return bound

    def evaluation(self) -> Self:
        return self if self.eval_rate is None else dataclasses.replace(self, rate=self.eval_rate)

    # --- host half ---

    @functools.cached_property
    def _mask_and_size(self) -> tuple[np.int32, int]:
        vocabulary = self.setting.vocabulary
        return np.int32(vocabulary.mask_id), vocabulary.size

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        return Lengths(raw_length + self._frame)

    def corrupt(self, record: Record, rng: np.random.Generator) -> Aligned:
        documents = several_documents(record)
        tokens = record.tokens
        chosen = self._choose(tokens, documents, rng)
        seen = tokens.copy()
        seen[chosen] = self._show(tokens[chosen], rng)
        weights = np.zeros(len(tokens), np.float32)
        weights[chosen] = 1.0
        if self._ends:
            seen, tokens = _framed(seen, *self._ends), _framed(tokens, *self._ends)
            weights = _framed(weights, 0.0, 0.0)
            if documents is not None:
                documents = _framed(documents, documents[0], documents[-1])
        return Aligned(seen, tokens, weights, documents=documents)

    def _choose(
        self, tokens: np.ndarray, documents: np.ndarray | None, rng: np.random.Generator
    ) -> np.ndarray:
        """The positions to predict, of tokens [L] without a frame, rising."""
        separator = -1 if self._separator is None else self._separator
        candidates = (tokens != separator).nonzero()[0]
        count = min(self._budget(len(tokens) + self._frame), len(candidates))
        if self.whole_word and len(candidates):
            words = self._words(tokens, documents, candidates)
            return candidates[self._choose_words(np.bincount(words), count, rng)[words]]
        draws = rng.random(len(candidates))
        if self.selection == "iid":
            return candidates[draws < self.rate]
        if count in (0, len(candidates)):
            return candidates[:count]
        # Sorted: argpartition's order depends on the processor, and the draws that follow on it.
        return candidates[np.sort(draws.argpartition(count)[:count])]

    def _budget(self, length: int) -> int:
        count = max(1, round(length * self.rate))
        return count if self.max_predictions is None else min(count, self.max_predictions)

    @functools.cached_property
    def _word_starts(self) -> np.ndarray:
        return self.setting.vocabulary.word_starts()

    def _words(self, tokens, documents, candidates) -> np.ndarray:
        """The word that each candidate belongs to, numbered from 0."""
        starts = self._word_starts[tokens[candidates]]
        starts[:1] = True
        if documents is not None:
            starts[1:] |= np.diff(documents[candidates]) > 0
        return starts.cumsum() - 1

    def _choose_words(self, sizes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """bool [words], the chosen ones; sizes [words] in tokens."""
        if self.selection == "iid":
            return rng.random(len(sizes)) < self.rate
        taken = np.zeros(len(sizes), bool)
        order = rng.permutation(len(sizes))
        for word, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
            if size <= count:
                taken[word] = True
                count -= size
                if count == 0:
                    break
        return taken

    def _show(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What the model sees in place of the chosen tokens."""
        mask_id, size = self._mask_and_size
        draws = rng.random(len(tokens))
        seen = np.where(draws < self.mask_probability, mask_id, tokens)
        if self.random_probability:
            swap = (draws >= 1.0 - self.random_probability).nonzero()[0]
            seen[swap] = rng.integers(size, size=len(swap))
        return seen

    @property
    def usual_predictions(self) -> int:
        """Positions for which a row's logits are computed; rarely do rows ask for more.

        A row of many short examples may (each predicts at least one token), and an iid draw five
        standard deviations above its mean.
        """
        length = self.setting.length
        slack = 0.1 * self.rate * length
        if self.selection == "iid":
            slack = 5 * math.sqrt(length * self.rate * (1 - self.rate))
        return min(length, 8 * math.ceil((length * self.rate + slack) / 8))


def _framed(values: np.ndarray, first, last) -> np.ndarray:
    """values [n] between two more, [n + 2]."""
    framed = np.empty(len(values) + 2, values.dtype)
    framed[0], framed[1:-1], framed[-1] = first, values, last
    return framed
