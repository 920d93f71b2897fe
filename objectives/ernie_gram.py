"""ERNIE-Gram: n-grams hidden behind one mask each, and named as wholes. The host half."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np

from objectives import ngram_masks, noise
from objectives.base import Setting
from objectives.masking import Framed
from objectives.next_token import check_choice, check_range, several_documents
from objectives.special_tokens import special_tokens
from t5like.data import lexicon
from t5like.data.examples import Aligned, Lengths, Record
from t5like.data.lexicon import Lexicon, Units
from t5like.errors import UserError

# What asks for the first, second and third token of a hidden n-gram.
QUERIES = ("[M1]", "[M2]", "[M3]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErnieGram(Framed):
    """Explicitly n-gram masked language modelling (Xiao et al. 2021, "ERNIE-Gram").

    Text is cut into units, tokens and the bigrams and trigrams of a lexicon (section 3.5; see
    t5like/data/lexicon.py), and max(1, round(rate * units)) of them are chosen at random.

    - masking="explicit" (section 3.2): each becomes one [MASK], whatever its length, so that the
      text gets shorter, and its identity is asked for: one of V_F tokens and V_N n-grams.
    - comprehensive (section 3.3): its tokens are asked for as well, each by a query [M1], [M2] or
      [M3] after the text, which has the mask's position, and sees the text and itself alone.
    - relation (section 3.4): a small generator, trained to name the hidden units, samples one
      for each mask. The model reads what was sampled, an n-gram by an embedding of its own,
      instead of the mask; it predicts the same, and tells for each unit of the text whether it is
      the original. A sample that is right counts as original.
    - masking="contiguous" is the baseline that the paper compares with: n masks for n tokens,
      each of which is predicted in its place.

    The n-gram embeddings, the generator and the heads are of no use after pretraining.

    Otherwise than the reference: its pretraining code was never released, so what the paper does
    not say was chosen here. Each of the four losses is a mean of its own, over hidden units,
    their tokens, hidden units again and all units, where the paper adds up sums. Units that are
    not hidden are shown as tokens, since n-gram embeddings are not kept; in relation modelling
    each is judged once, at its first token. Output and input embeddings of n-grams are one table,
    its size set by `bigrams` and `trigrams` even if the corpus has fewer. Separators, [CLS] and
    [SEP] are never hidden. The released models' relative positions, in which [CLS] has buckets of
    its own, are not followed. The generator samples at temperature 1, and its default width is
    the lower end of what ELECTRA found best (Clark et al. 2020, section 3.2).

    Attributes:
      masking, comprehensive, relation: see above; "contiguous" has neither of the others.
      rate: share of units to hide.
      eval_rate: the same on held-out data, so that runs of different rates compare; None: `rate`.
      bigrams, trigrams: most n-grams of the lexicon, by their t-scores in the training corpus
        (the first one, of several). The paper has about 200,000 and 100,000.
      min_count: fewest occurrences of an n-gram.
      generator_size: width of the generator relative to the model's.
      coarse_weight, fine_weight: of the losses of units and of their tokens.
      generator_weight, relation_weight: of the generator's loss and of telling originals.
    """

    masking: Literal["explicit", "contiguous"] = "explicit"
    comprehensive: bool = True
    relation: bool = True
    rate: float = 0.15
    eval_rate: float | None = 0.15
    bigrams: int = 200_000
    trigrams: int = 100_000
    min_count: int = 5
    generator_size: float = 0.25
    coarse_weight: float = 1.0
    fine_weight: float = 1.0
    generator_weight: float = 1.0
    relation_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "masking", ("explicit", "contiguous"))
        if self.masking == "contiguous" and (self.comprehensive or self.relation):
            raise UserError(
                "ErnieGram.masking is 'contiguous', which has no n-gram masks to ask about: set "
                "ErnieGram.comprehensive and ErnieGram.relation to False"
            )
        for name in ("rate", "eval_rate"):
            if getattr(self, name) is not None:
                check_range(self, name, 0.0, 1.0)
        check_range(self, "generator_size", 0.01, 1.0)
        for name in ("bigrams", "trigrams"):
            check_range(self, name, 0, 1 << 24)
        if self.masking == "explicit" and not self.bigrams + self.trigrams:
            raise UserError(
                "ErnieGram.bigrams and ErnieGram.trigrams are both 0: raise one of them, or set "
                "ErnieGram.masking to 'contiguous', ErnieGram.comprehensive and "
                "ErnieGram.relation to False"
            )
        check_range(self, "min_count", 1, 1 << 62)
        for name in ("coarse_weight", "fine_weight", "generator_weight", "relation_weight"):
            check_range(self, name, 0.0, 1e6)

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        if bound._mask_id in bound._queries:
            raise UserError(
                f"{type(setting.vocabulary).__name__} lends one sentinel to both [MASK] and [M3]: "
                "raise its extra_ids by one"
            )
        if bound._raw_length < 1:
            raise UserError(
                f"train.length is {setting.length}; ErnieGram needs at least {bound._frame + 2}"
            )
        if setting.corpus is not None:
            _ = bound.lexicon  # built here once, and not in each of a loader's processes
        return bound

    def evaluation(self) -> Self:
        if self.eval_rate in (None, self.rate):
            return self  # and with it the lexicon
        return dataclasses.replace(self, rate=self.eval_rate)

    @functools.cached_property
    def lexicon(self) -> Lexicon:
        """The n-grams of the training corpus."""
        if self.setting.corpus is None:
            raise ValueError("ErnieGram was bound without a corpus, so it has no lexicon")
        return lexicon.build(
            self.setting.corpus,
            self.setting.vocabulary,
            bigrams=self.bigrams,
            trigrams=self.trigrams,
            min_count=self.min_count,
            cache_dir=self.setting.cache_dir,
        )

    # --- host half ---

    @property
    def features(self) -> tuple[str, ...]:
        """See ngram_masks.explicit."""
        if self.masking == "contiguous":
            return ()
        queries = ("isolated",) if self.comprehensive else ()
        return (*queries, "ngram_targets", *(("unit_starts",) if self.relation else ()))

    @functools.cached_property
    def _mask_id(self) -> int:
        return self.setting.vocabulary.mask_id

    @functools.cached_property
    def _queries(self) -> np.ndarray:
        """Ids of [M1], [M2] and [M3], int32; none where nothing is asked by queries."""
        names = QUERIES if self.comprehensive else ()
        found = special_tokens(self.setting.vocabulary, names, "ErnieGram")
        return np.array([found[name] for name in names], np.int32)

    @property
    def named_tokens(self) -> Mapping[int, str]:
        return dict(zip(self._queries.tolist(), QUERIES, strict=False))

    def _budget(self, units: int) -> int:
        return min(units, max(1, round(units * self.rate)))

    def _longest(self, raw_length: int) -> int:
        """Slots at most: a hidden unit of n tokens costs its mask and n queries, one more."""
        queries = self._budget(raw_length) if self.comprehensive else 0
        return raw_length + self._frame + queries

    @functools.cached_property
    def _raw_length(self) -> int:
        return noise.longest_raw(lambda raw: self._longest(raw) <= self.setting.length, 0)

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        return Lengths(self._longest(raw_length))

    def corrupt(self, record: Record, rng: np.random.Generator) -> Aligned:
        tokens, documents = record.tokens, several_documents(record)
        if self._ends:
            tokens = np.concatenate(([self._ends[0]], tokens, [self._ends[1]])).astype(np.int32)
            documents = None if documents is None else np.pad(documents, 1, mode="edge")
        units = self.lexicon.cut(tokens, documents)
        hidden = self._choose(units, rng)
        if self.masking == "contiguous":
            return ngram_masks.contiguous(tokens, documents, units, hidden, self._mask_id)
        return ngram_masks.explicit(tokens, documents, units, hidden, self._mask_id, self._queries)

    def _choose(self, units: Units, rng: np.random.Generator) -> np.ndarray:
        """Numbers of the units to hide, rising; all sets of so many are equally likely."""
        is_text = np.ones(len(units.ids), bool)
        for special in {self._separator, *(self._ends or ())} - {None}:
            is_text &= units.ids != special
        candidates = is_text.nonzero()[0]
        count = self._budget(len(candidates))
        draws = rng.random(len(candidates))
        if count in (0, len(candidates)):
            return candidates[:count]
        return candidates[np.sort(draws.argpartition(count)[:count])]

    def readable(self, row: Mapping[str, np.ndarray], reader: Any) -> Any | None:
        if self.masking == "contiguous":
            return None
        return ngram_masks.readable(row, self.setting.architecture, reader, self.lexicon)

    # --- device half ---

    @property
    def usual_predictions(self) -> int:
        """Masks of a row; a row of many short examples, which hide at least one each, has more.

        With masking="contiguous", hidden tokens.
        """
        if self.masking == "contiguous":
            return self._usual_tokens
        return self._rounded(1.1 * self._budget(self._raw_length))

    @property
    def _usual_tokens(self) -> int:
        """Hidden tokens of a row: as large a share as of units, give or take their sizes."""
        mean = self.rate * self._raw_length
        return self._rounded(mean + 3 * math.sqrt(mean) + 1)

    def _rounded(self, count: float) -> int:
        return min(self.setting.length, 8 * math.ceil(count / 8))

    def network(self, config: Any) -> Any:
        if self.masking == "contiguous":
            from objectives import heads

            return heads.LanguageModel(config)
        from objectives import ernie_gram_network

        if self.comprehensive:
            # Queries share the positions of their masks, and stand elsewhere.
            config = dataclasses.replace(config, relative_from="positions")
        generator = self._generator_config(config) if self.relation else None
        return ernie_gram_network.NgramModel(
            config, self.setting.vocabulary.size, self._ngrams, generator
        )

    @property
    def _ngrams(self) -> int:
        """Rows of the n-gram embedding: set by the fields, so that a checkpoint's shape is."""
        return self.bigrams + self.trigrams

    def _generator_config(self, config: Any) -> Any:
        from objectives import heads_rtd

        return heads_rtd.generator_config(config, self.generator_size)

    def losses(self, apply, params, frozen, batch, rng, train: bool) -> dict[str, Any]:
        del frozen
        stack = self.setting.architecture
        if self.masking == "contiguous":
            from objectives import heads

            return heads.next_token_losses(
                apply, params, batch, rng, train, stack=stack, predictions=self.usual_predictions
            )
        from objectives import ernie_gram_network

        return ernie_gram_network.ngram_losses(
            apply, params, batch, rng, train,
            stack=stack,
            relation=self.relation,
            coefficients={
                "coarse": self.coarse_weight,
                "fine": self.fine_weight,
                "generator": self.generator_weight,
                "relation": self.relation_weight,
            },
            masks=self.usual_predictions,
            queries=self._usual_tokens,
        )  # fmt: skip

    def train_flops(self, config: Any, spec: Mapping[str, tuple]) -> float:
        """Of the model and the generator, with logits, n-grams' too, where they are computed."""
        if self.masking == "contiguous":
            return super().train_flops(config, spec)
        from objectives.ernie_gram_network import ngram_head_config
        from t5like.models.flops import forward_flops, head_flops

        rows, length = spec[f"{self.setting.architecture}_input_tokens"][0]
        masks = self.usual_predictions
        queries = self._usual_tokens if self.comprehensive else 0
        total = forward_flops(config, spec, masks + queries)
        configs = [config]
        if self.relation:
            configs.append(self._generator_config(config))
            total += forward_flops(configs[-1], spec, masks)
            total += rows * length * 2.0 * config.d_model * (config.d_model + 1)
        for one in configs:
            total += rows * masks * head_flops(ngram_head_config(one, self._ngrams))
        return 3.0 * total
