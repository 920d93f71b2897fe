"""Mixture of Denoisers, the objective of UL2."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from objectives.base import Objective, Setting
from objectives.denoisers import MODES, Denoiser, parse
from objectives.next_token import (
    NextToken,
    check_targets_length,
    prepend,
    prepend_first,
    usual_predictions,
)
from objectives.prefix_lm import PrefixLM
from objectives.span_corruption import SpanCorruption
from objectives.special_tokens import PLACES, sentinels_left, special_tokens
from t5like.data.examples import Lengths, Record, Seq2Seq, Unit
from t5like.errors import UserError
from t5like.inference.infill_formats import Sentinels


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2(NextToken):
    """Draws each example's denoiser from a mixture (Tay et al. 2023, "UL2", section 3.1, table 1).

    The denoisers' names are their modes: R is T5's span corruption, X has long spans, much noise
    or both, S is a prefix language model. An example begins with its mode's token, which asks for
    that way of working (section 3.1.3). An encoder-decoder reads it before the inputs; a decoder
    as the first of the prefix, inputs and targets sharing a row.

    Defaults are table 1's seven. The paper gives no rates; 40% R, 40% X and 20% S are those of
    the appendix's copies. They are shares of examples: targets at density 0.5 are 4.5 times as
    long as at 0.15, so X has most of the loss. Each denoiser's loss is a metric,
    "cross_entropy_R(3, 0.15)" and so on.

    S is table 1's (mean suffix of a quarter of the text), drawn as T5's `prefix_lm` does with
    noise_density 0.25; the appendix's code cuts uniformly (0.5: a mean suffix of half the text).

    Otherwise than the paper's appendix (9.2), whose code has three traps:
    - a denoiser of a single span, as X(64, 0.15) is up to 512 tokens, always hides the end of the
      text there. Here masks are rolled, and without random_roll a single span lies anywhere;
    - more spans than sentinels (X(3, 0.5) needs 128 at 512 tokens) is an error; ids run on into
      ordinary vocabulary there;
    - the mode token is counted before text is cut to fill the row; there it is put before a full
      row, whose last sentinel is then cut off;
    - every denoiser reads the whole corpus, in an order of its own; there each has one shard.
    T5's lengths and masks are those of SpanCorruption and PrefixLM (see what they change).

    Attributes:
      denoisers: (mode, mean_span, density), see Denoiser.
      rates: one for each denoiser, in their order, relative to each other; None: equal.
      mode_tokens: mode -> string; None: no mode tokens. A string that the vocabulary has as a
        piece, or that objectives/special_tokens.py has a place for, is one token. Any other is
        text of several, as [NLU], [S2S] and [NLG] are in the released UL2 20B.
      random_roll: rotate the masks of R and X, so that noise may lie anywhere. A roll may cut a
        span in two, for which the row keeps a place: it is then filled to one slot of its end.
      s_sentinel: whether S has a sentinel where it is cut, on both sides.
      bidirectional_inputs: on a decoder, whether the inputs see each other in both directions.
    """

    architectures = ("encoder_decoder", "decoder")
    features = ("denoiser",)

    denoisers: Sequence[tuple[str, float | None, float]] = (
        ("R", 3, 0.15),
        ("R", 8, 0.15),
        ("X", 3, 0.5),
        ("X", 8, 0.5),
        ("X", 64, 0.15),
        ("X", 64, 0.5),
        ("S", None, 0.25),
    )
    rates: Sequence[float] | None = (0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.2)
    mode_tokens: Mapping[str, str] | None = dataclasses.field(
        default_factory=lambda: {"R": "[R]", "S": "[S]", "X": "[X]"}
    )
    random_roll: bool = True
    s_sentinel: bool = False
    bidirectional_inputs: bool = True

    def __post_init__(self):
        super().__post_init__()
        denoisers = tuple(map(parse, self.denoisers))
        rates = (1.0,) * len(denoisers) if self.rates is None else tuple(self.rates)
        object.__setattr__(self, "denoisers", denoisers)
        if not denoisers or len(set(denoisers)) < len(denoisers):
            raise UserError(f"UL2.denoisers is {self.denoisers}; it needs some, all different")
        if len(rates) != len(denoisers) or min(rates) <= 0:
            raise UserError(
                f"UL2.rates is {self.rates}; write a positive rate for each of the "
                f"{len(denoisers)} UL2.denoisers, or None"
            )
        missing = {d.mode for d in denoisers} - set(self.mode_tokens or MODES)
        if missing:
            raise UserError(
                f"UL2.mode_tokens is {self.mode_tokens}; name a token for mode {min(missing)!r} "
                "too, or set it to None"
            )
        texts = list((self.mode_tokens or {}).values())
        if len(set(texts)) < len(texts):
            raise UserError(
                f"UL2.mode_tokens is {self.mode_tokens}; give each mode a token of its own"
            )

    def bind(self, setting: Setting) -> Self:
        bound = super().bind(setting)
        for part in bound._parts:
            if part.inner.raw_length < 2:
                raise UserError(
                    f"train.length is {setting.length}, too short for UL2's {part.denoiser.name}: "
                    "raise it"
                )
        longest = max(bound._parts, key=lambda part: part.inner.targets_needed)
        check_targets_length(bound, bound._targets_needed, f"UL2's {longest.denoiser.name}")
        bound._check_sentinels()
        return bound

    @functools.cached_property
    def _parts(self) -> tuple[_Component, ...]:
        """What is drawn from, one for each denoiser."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(UL2)}
        return tuple(_Component(number=i, **fields) for i in range(len(self.denoisers)))

    def components(self) -> Mapping[str, tuple[Objective, float]]:
        rates = self.rates or [1.0] * len(self._parts)
        return dict(zip(self._names, zip(self._parts, rates, strict=True), strict=True))

    # --- host half ---

    @property
    def _has_encoder(self) -> bool:
        return self.setting.architecture == "encoder_decoder"

    @functools.cached_property
    def _targets_needed(self) -> int:
        """Most tokens of any denoiser's targets."""
        return max(part.inner.targets_needed for part in self._parts)

    def _check_sentinels(self) -> None:
        """Raises UserError if a denoiser may make more spans than there are sentinels."""
        part = max(self._parts, key=lambda part: part.inner.sentinels_needed)
        spans, left = part.inner.sentinels_needed, len(self._sentinels)
        if spans > left:
            extra_ids = len(self.setting.vocabulary.sentinels) + spans - left
            raise UserError(
                f"UL2's {part.denoiser.name} with train.length={self.setting.length} needs {spans} "
                f"sentinels; the vocabulary has {left} besides mode tokens: raise its extra_ids to "
                f"{extra_ids}, or leave it out of UL2.denoisers (and its rate out of UL2.rates)"
            )

    @property
    def lengths(self) -> Lengths:
        if not self._has_encoder:
            return Lengths(self.setting.length)
        return Lengths(self.setting.length, self.setting.targets_length or self._targets_needed)

    @property
    def keeps_documents_apart(self) -> bool:
        return self.cut == "document"

    @functools.cached_property
    def _sentinels(self) -> np.ndarray:
        """Those that serve spans: some from the far end may be lent to mode tokens."""
        vocabulary = self.setting.vocabulary
        lent = [text for text in (self.mode_tokens or {}).values() if text in PLACES]
        return vocabulary.sentinels[: sentinels_left(vocabulary, lent)]

    def mode_ids(self, mode: str) -> np.ndarray:
        """int32 [m], what stands before the inputs of this mode: one id, several or none."""
        if self.mode_tokens is None:
            return np.empty(0, np.int32)
        text, vocabulary = self.mode_tokens[mode], self.setting.vocabulary
        if text in PLACES or vocabulary.named_id(text) is not None:
            return np.array([special_tokens(vocabulary, [text], "UL2")[text]], np.int32)
        return vocabulary.encode(text)

    # --- what a trained model can be asked ---

    @property
    def named_tokens(self) -> Mapping[int, str]:
        modes = {d.mode: self.mode_ids(d.mode) for d in self.denoisers}
        return {int(ids[0]): self.mode_tokens[m] for m, ids in modes.items() if len(ids) == 1}

    @property
    def reads_both_ways(self) -> bool:
        return not self._has_encoder and self.bidirectional_inputs

    def infilling(self) -> Sentinels | None:
        """As R asks for it, else as X; None where there is only S."""
        mode = next((m for m in "RX" if any(d.mode == m for d in self.denoisers)), None)
        if mode is None:
            return None
        parts = (part for part in self._parts if part.denoiser.mode == mode)
        return max(parts, key=lambda part: part.inner.sentinels_needed).infilling()

    def continuation(self, prefix: np.ndarray, rest: np.ndarray) -> Seq2Seq | None:
        """As the first S denoiser asks for it; None without one."""
        part = next((part for part in self._parts if part.denoiser.mode == "S"), None)
        return None if part is None else part.continuation(prefix, rest)

    # --- device half ---

    @property
    def usual_predictions(self) -> int | None:
        return None if self._has_encoder else usual_predictions(self._targets_needed)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(denoiser.name for denoiser in self.denoisers)

    @property
    def device_key(self) -> Any:
        return ("UL2", self._names, self.z_loss, self.label_smoothing)

    @property
    def _groups(self) -> Any:
        from objectives import heads

        return heads.Groups("denoiser", self._names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Component(UL2):
    """One denoiser of a bound mixture: its rows, network and loss are the mixture's.

    Attributes:
      number: its place in `denoisers`.
    """

    number: int

    @property
    def denoiser(self) -> Denoiser:
        return self.denoisers[self.number]

    @functools.cached_property
    def _mode_ids(self) -> np.ndarray:
        return self.mode_ids(self.denoiser.mode)

    @functools.cached_property
    def inner(self) -> SpanCorruption | PrefixLM:
        """The denoiser's work without its mode token, for which rows leave room."""
        shorter = self.setting.length - len(self._mode_ids)
        return self.denoiser.objective(
            dataclasses.replace(self.setting, length=shorter, targets_length=None),
            self.random_roll,
            self.s_sentinel,
            cut=self.cut,
            bidirectional_inputs=self.bidirectional_inputs,
        )

    @property
    def unit(self) -> Unit:
        return self.inner.unit

    @property
    def keeps_documents_apart(self) -> bool:
        return self.inner.keeps_documents_apart

    def components(self) -> Mapping[str, tuple[Objective, float]]:
        return {self.denoiser.name: (self, 1.0)}

    def bounds(self, raw_length: int, rng: np.random.Generator) -> Lengths:
        inner = self.inner.bounds(raw_length, rng)
        return Lengths(inner.inputs + len(self._mode_ids), inner.targets)

    def corrupt(self, record: Record, rng: np.random.Generator) -> Seq2Seq:
        return self._marked(self.inner.corrupt(record, rng))

    def infilling(self) -> Sentinels | None:
        if self.denoiser.mode == "S":
            return None
        taught = self._sentinels[: self.inner.sentinels_needed]
        return Sentinels(taught, self._eos, self._mode_ids, self.bidirectional_inputs)

    def continuation(self, prefix: np.ndarray, rest: np.ndarray) -> Seq2Seq | None:
        example = self.inner.continuation(prefix, rest)
        return None if example is None else self._marked(example)

    def _marked(self, example: Seq2Seq) -> Seq2Seq:
        """The example behind its mode token, its targets marked as this denoiser's."""
        return dataclasses.replace(
            example,
            inputs=prepend(example.inputs, self._mode_ids),
            input_documents=prepend_first(example.input_documents, len(self._mode_ids)),
            features={"denoiser": np.full(len(example.targets), self.number + 1, np.int32)},
        )
