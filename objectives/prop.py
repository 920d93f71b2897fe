"""PROP: representative words prediction."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import string
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np

from objectives.base import Setting
from objectives.masking import Masking
from objectives.next_token import check_range
from objectives.word_sets import WordSampler, length_distribution
from objectives.word_statistics import Counting, word_statistics
from t5like.data.examples import Aligned, Members, Record
from t5like.errors import UserError

_PUNCTUATION = frozenset(string.punctuation)
# Pieces that are written with punctuation which is not in the text: WordPiece's, and bytes.
_NOT_AS_READ = re.compile(r"##.+|<0x..>").fullmatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PROP(Masking):
    """Ranks two sets of words by how well they stand for a document, beside masked LM.

    (Ma et al. 2021, "PROP: Pre-training with Representative Words Prediction for Ad-hoc
    Retrieval", section 3.) Two sets of one length are drawn from the document's smoothed unigram
    language model (see word_sets.py), and the one that is more likely under it is the positive
    one. Each is put before the document, `[CLS] set [SEP] document [SEP]` with token types 0 and
    1, and a head on the state of the first slot scores it. With probabilities
    p = softmax(s+, s-), the loss of a pair is max(0, 1 - (p+ - p-)), as in the released code; it
    equals 1 - tanh((s+ - s-) / 2). Tokens of the document are hidden as in BERT, whole words,
    in each of the two by a draw of its own, up to `rate` times the number of *words*; here
    punctuation begins a word, as it does for BERT's tokenizer (source code has few spaces).

    - A document is what one record holds: a longer document is cut into consecutive pieces, and
      the statistics (document frequency, mean length mu) are those of the pieces.
    - A word is a run of letters in the lower-cased text. Background: document frequency over its
      sum. Words that can be drawn: the document's own and words drawn by document frequency, up
      to `sampled_words` together, or 100 more where the document alone has as many.
    - A vocabulary without [CLS] and [SEP] uses BOS (where there is none, pad) and EOS.
    - The second set wins ties. An example is a pair, the positive first, in two rows that are
      never parted.

    Otherwise than the released code: a new pair is drawn for a document in every epoch, where it
    takes 5 pairs of 10 sets for all of them; all documents are used, where it drops four in five
    of those under 100 tokens; the sets' room is planned, so that a document loses nothing to
    them; should sets exceed it, both lose their last words. Words that are too rare to be
    subsampled are always kept (it fails for them with a KeyError), and a corpus with few frequent
    words lends its rarer ones. Title and text are not told apart, and words are not stemmed.

    Attributes:
      mean_set_words: mean of the Poisson distribution of the number of words, before 0 is left
        out; with 3.0 sets have 3.16 words on average.
      max_set_tokens: most tokens of a set, and never more than a quarter of the row.
      word_pattern: regular expression of a word in lower-cased text.
      min_frequency: occurrences in the corpus that a word needs to be drawn, unless fewer than
        `sampled_words` words have as many.
      sampled_words: K, see above.
      subsample_threshold: t of word2vec's subsampling of frequent words.
      subsample_from: occurrences from which words are subsampled.
      ranking_weight, mlm_weight: coefficients of the two losses.
    """

    architectures = ("encoder",)
    features = ("token_types",)
    members = 2

    cut: Literal["document"] = "document"
    whole_word: bool = True
    max_predictions: int | None = 60
    mean_set_words: float = 3.0
    max_set_tokens: int = 32
    word_pattern: str = "[a-zA-Z]+"
    min_frequency: int = 10
    sampled_words: int = 500
    subsample_threshold: float = 1e-4
    subsample_from: int = 100
    ranking_weight: float = 1.0
    mlm_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "mean_set_words", 0.01, 100.0)
        for name in ("max_set_tokens", "min_frequency", "sampled_words", "subsample_from"):
            check_range(self, name, 1, math.inf)
        check_range(self, "subsample_threshold", 1e-12, math.inf)
        check_range(self, "ranking_weight", 0.0, math.inf)
        check_range(self, "mlm_weight", 0.0, math.inf)
        if self.cut != "document":
            raise UserError("PROP.cut is 'window', but its word sets are of one 'document'")
        try:
            re.compile(self.word_pattern)
        except re.error as e:
            raise UserError(f"PROP.word_pattern is {self.word_pattern!r}: {e}; mend it") from e

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        if bound._ends[1] is None:
            raise UserError(
                f"{type(setting.vocabulary).__name__} has neither [SEP] nor an end-of-sequence "
                "token, which PROP needs: use a vocabulary that has one"
            )
        if setting.corpus is not None:
            _ = bound._sampler
        return bound

    def evaluation(self) -> Self:
        return self if self.eval_rate == self.rate else super().evaluation()

    # --- host half ---

    @functools.cached_property
    def _ends(self) -> tuple[int, int | None]:
        """What stands in the first slot, and after the set and the document."""
        vocabulary = self.setting.vocabulary
        first, last = vocabulary.named_id("[CLS]"), vocabulary.named_id("[SEP]")
        return (
            vocabulary.bos_id if first is None else first,
            vocabulary.eos_id if last is None else last,
        )

    @property
    def _set_room(self) -> int:
        return max(1, min(self.max_set_tokens, self.setting.length // 4))

    @property
    def _frame(self) -> int:
        """Most tokens around a document."""
        return 3 + self._set_room

    @functools.cached_property
    def _sampler(self) -> WordSampler:
        setting = self.setting
        if setting.corpus is None:
            raise UserError(
                "PROP draws words by a corpus's statistics: bind it with Setting.corpus"
            )
        counting = Counting(
            self.unit.max_raw_length, self.word_pattern, self.min_frequency, self.sampled_words
        )
        return WordSampler(
            word_statistics(setting.corpus, setting.vocabulary, counting, setting.cache_dir),
            self.word_pattern,
            sampled_words=self.sampled_words,
            subsample_threshold=self.subsample_threshold,
            subsample_from=self.subsample_from,
            max_tokens=self._set_room,
        )

    @functools.cached_property
    def _set_lengths(self) -> np.ndarray:
        return length_distribution(self.mean_set_words)

    def corrupt(self, record: Record, rng: np.random.Generator) -> Members:
        tokens = record.tokens[: self.unit.max_raw_length]
        document = self._sampler.count(self.setting.vocabulary.decode(tokens))
        size = 1 + int(self._set_lengths.searchsorted(rng.random(), "right"))
        sets = self._sampler.fitting(self._sampler.draw(document, size, rng), self._set_room)
        first, second = (self._sampler.score(document, words) for words in sets)
        ranked = sets if first > second else sets[::-1]
        return Members(tuple(self._member(words, tokens, rng) for words in ranked))

    def _member(self, words: np.ndarray, document: np.ndarray, rng: np.random.Generator) -> Aligned:
        """One set with the document, some words of which are hidden."""
        summary, separator = self._ends
        drawn = self._sampler.tokens(words)
        start = len(drawn) + 2
        targets = np.empty(start + len(document) + 1, np.int32)
        targets[0], targets[start - 1], targets[-1] = summary, separator, separator
        targets[1 : start - 1], targets[start:-1] = drawn, document
        chosen = self._choose(document, None, rng) + start
        seen = targets.copy()
        seen[chosen] = self._show(targets[chosen], rng)
        weights = np.zeros(len(targets), np.float32)
        weights[chosen] = 1.0
        token_types = np.zeros(len(targets), np.int32)
        token_types[start:] = 1
        return Aligned(seen, targets, weights, features={"token_types": token_types})

    @functools.cached_property
    def _word_starts(self) -> np.ndarray:
        """bool [V]: the vocabulary's, and pieces that begin with punctuation."""
        vocabulary = self.setting.vocabulary
        pieces = map(vocabulary.piece, range(vocabulary.size))
        starts = [piece[:1] in _PUNCTUATION and not _NOT_AS_READ(piece) for piece in pieces]
        return vocabulary.word_starts() | np.array(starts)

    def _choose(
        self, tokens: np.ndarray, documents: np.ndarray | None, rng: np.random.Generator
    ) -> np.ndarray:
        """The positions to predict of a document [n], rising; the budget counts its words."""
        places = np.arange(len(tokens))
        words = self._words(tokens, documents, places) if self.whole_word else places
        sizes = np.bincount(words)
        return self._choose_words(sizes, self._budget(len(sizes)), rng)[words].nonzero()[0]

    def readable(self, row: Mapping[str, np.ndarray], reader: Any) -> Any:
        from objectives import show

        lines = []
        for m, one in enumerate(show.members(row), 1):
            real, types = show.real(one, "encoder"), one["encoder_token_types"]
            drawn = one["encoder_target_tokens"][real & (types == 0)][1:-1]
            document = one["encoder_target_tokens"][real & (types == 1)][:-1]
            score = f"   log likelihood {self._score(document, drawn):.2f}"
            lines.append((f"{m}. word set", [*reader.runs(drawn, "target"), (score, "quiet")]))
            lines += [(f"{m}. {label}", runs) for label, runs in show.masked(one, reader)]
        return lines

    def _score(self, document: np.ndarray, drawn: np.ndarray) -> float:
        """Of a set given as tokens, as one that was drawn has them."""
        decode = self.setting.vocabulary.decode
        words = self._sampler.find(decode(drawn))
        words = words[words < len(self._sampler.words)]
        return self._sampler.score(self._sampler.count(decode(document)), words)

    # --- device half ---

    def network(self, config: Any) -> Any:
        from objectives import pair_ranking

        return pair_ranking.PairRanker(config)

    def losses(self, apply, params, frozen, batch, rng, train: bool) -> dict[str, Any]:
        from objectives import pair_ranking

        del frozen
        return pair_ranking.losses(
            apply, params, batch, rng, train,
            ranking_weight=self.ranking_weight,
            mlm_weight=self.mlm_weight,
            predictions=self.usual_predictions,
        )  # fmt: skip

    def train_flops(self, config: Any, spec: Mapping[str, tuple]) -> float:
        from objectives import pair_ranking

        return pair_ranking.train_flops(config, spec, self.usual_predictions)
