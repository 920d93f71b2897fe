"""RunConfig: everything that a run is, as gin's `train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from objectives.base import Objective
from t5like.data.sources.base import Source
from t5like.errors import UserError
from t5like.models.config import ModelConfig
from t5like.training import profiling
from t5like.training.optimizers import Optimizer
from t5like.training.sharding import Sharding

# Bindings that may differ between a run and its resumption: they change how long it runs, where
# it writes and what it reports, never what it computes at a step.
FREE = frozenset(
    {
        "steps", "tokens", "flops", "log_every", "evals", "eval_every", "eval_batches",
        "checkpoint_every_steps", "checkpoint_every_minutes", "keep", "keep_best", "init_from",
        "init_prefixes", "init_reset", "workers", "cache_dir", "batch_hashes", "quality",
        "sharding", "profile", "compiler_options",
    }
)
# Where and how a step is computed, never what.
FREE_ELSEWHERE = frozenset(
    {"Sharding", "ModelConfig.remat", "ModelConfig.remat_names", "ModelConfig.attention_backend"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run. gin calls it `train`: `--gin.train.steps=20`.

    Attributes:
      objective: what is learned, e.g. @SpanCorruption().
      model: the transformer's shape, @ModelConfig().
      source: where documents come from, or {name: source} for a mixture.
      rates: {name: rate} of a mixture's sources; equal when None.
      vocabulary: e.g. @SentencePieceVocabulary(); @TrainedVocabulary() trains one on `source`.
      optimizer: e.g. @AdamW().
      batch_size: rows of the global batch.
      length: tokens of a row: an encoder-decoder's inputs, else the one row.
      targets_length: tokens of an encoder-decoder's decoder row; None: what the objective needs.
      pack: put several examples in a row, kept apart by segment ids.
      attend_across_documents: whether documents that share a window see each other.
      shuffle: whether units are read in a seeded random order.
      seed: of parameters, data order, corruption and dropout.
      accumulate: micro-batches a step.
      sharding: the mesh and what lies where on it, @Sharding(); a run may go on under another.
      steps, tokens, flops: budgets; whichever is reached first ends the run.
      log_every: steps between lines in metrics.jsonl.
      evals: {name: source}, held-out documents.
      eval_every: steps between evaluations; None: at the end only.
      eval_batches: batches of each evaluation; None: all.
      quality: whether an encoder-decoder's run ends with the check that it uses its inputs.
      checkpoint_every_steps, checkpoint_every_minutes: whichever comes first; None: never.
      keep: newest checkpoints kept.
      keep_best: name of the eval whose best checkpoint is kept too; "EVAL/TRACK" where the
        objective has several tracks (phases, or a mixture by batch).
      init_from: a workdir or checkpoint whose parameters to start from.
      init_prefixes: parameter names (by prefix) to take from it; None: all, strictly.
      init_reset: start step and optimiser afresh (else they are taken over too).
      workers: data loading processes; 0: threads of this one.
      cache_dir: where vocabularies and corpora are built; None: the workdir's `cache`.
      batch_hashes: write each batch's hash to metrics.jsonl (needs log_every = 1 to be complete).
      profile: (first, last) updates to trace for TensorBoard, counted from 1; SIGUSR1 traces too.
      compiler_options: {"xla_...": value} for the updates' compiler, see gin_configs/overlap.
    """

    objective: Objective
    model: ModelConfig
    source: Any
    vocabulary: Any
    optimizer: Any
    rates: Mapping[str, float] | None = None
    batch_size: int = 32
    length: int = 512
    targets_length: int | None = None
    pack: bool = False
    attend_across_documents: bool = True
    shuffle: bool = True
    seed: int = 0
    accumulate: int = 1
    sharding: Sharding = Sharding()
    steps: int | None = None
    tokens: float | None = None
    flops: float | None = None
    log_every: int = 10
    evals: Mapping[str, Any] | None = None
    eval_every: int | None = None
    eval_batches: int | None = None
    quality: bool = False
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = 10.0
    keep: int = 3
    keep_best: str | None = None
    init_from: str | None = None
    init_prefixes: Sequence[str] | None = None
    init_reset: bool = True
    workers: int = 0
    cache_dir: str | None = None
    batch_hashes: bool = False
    profile: Sequence[int] | None = None
    compiler_options: Mapping[str, Any] | None = None

    def __post_init__(self):
        self._check_parts()
        for name in (
            "batch_size", "length", "accumulate", "log_every", "keep", "eval_every",
            "eval_batches", "checkpoint_every_steps", "targets_length",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name} is {value}; it must be at least 1")
        if self.profile is not None:
            profiling.checked(self.profile)
        if self.compiler_options is not None and not isinstance(self.compiler_options, Mapping):
            raise UserError(
                f"train.compiler_options is {self.compiler_options!r}; write a dict, "
                "{'xla_OPTION': VALUE}"
            )
        if self.workers < 0:
            raise UserError(f"train.workers is {self.workers}; it must be at least 0")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.accumulate={self.accumulate} does not divide "
                f"train.batch_size={self.batch_size}"
            )
        if self.steps is self.tokens is self.flops is None:
            raise UserError("no budget: set train.steps, train.tokens or train.flops")
        # "EVAL/TRACK" is checked when the tracks are known.
        if self.keep_best is not None and self.keep_best.split("/")[0] not in (self.evals or {}):
            raise UserError(
                f"train.keep_best={self.keep_best!r} is no eval; train.evals has "
                f"{sorted(self.evals or {})}"
            )
        if self.rates is not None and (
            not isinstance(self.source, Mapping) or set(self.rates) != set(self.source)
        ):
            raise UserError("train.rates needs one rate for each name in the dict train.source")

    def _check_parts(self) -> None:
        """Raises UserError where a part is not what its name says."""
        kinds = {
            "objective": Objective, "model": ModelConfig, "optimizer": Optimizer,
            "sharding": Sharding,
        }  # fmt: skip
        parts = {name: (getattr(self, name), kind) for name, kind in kinds.items()}
        sources = self.source if isinstance(self.source, Mapping) else {None: self.source}
        evals = self.evals or {}
        if not isinstance(evals, Mapping):
            raise UserError(f"train.evals is {evals!r}; bind it to {{'NAME': @Source()}}")
        for field, several in (("source", sources), ("evals", evals)):
            for name, value in several.items():
                parts[field if name is None else f"{field}[{name!r}]"] = (value, Source)
        for name, (value, kind) in parts.items():
            if not isinstance(value, kind):
                raise UserError(
                    f"train.{name} is {value!r}; bind it to a reference to a {kind.__name__}, "
                    "such as @Name()"
                )
        if not hasattr(self.vocabulary, "resolve"):
            raise UserError(
                f"train.vocabulary is {self.vocabulary!r}; bind it to a vocabulary, @Name()"
            )
        if isinstance(self.init_prefixes, str):
            raise UserError(
                f"train.init_prefixes is {self.init_prefixes!r}; write a list, "
                f"[{self.init_prefixes!r}]"
            )

    def sources(self) -> dict[str, tuple[Any, float]]:
        """Name -> (source, rate), also for a run of a single source."""
        if not isinstance(self.source, Mapping):
            return {"": (self.source, 1.0)}
        rates = self.rates or dict.fromkeys(self.source, 1.0)
        return {name: (source, rates[name]) for name, source in self.source.items()}
