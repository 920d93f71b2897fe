"""From a gin page to compiled programs: the train step that `fit` runs, and the decoding loop.

Nothing is allocated, no corpus is built and no vocabulary trained: shapes and shardings are enough.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import assemble
from launch.networks import Network, assemble_frozen, assemble_networks, union_of
from launch.run_config import RunConfig
from launch.training import make_track
from objectives.base import Objective
from t5like.data import layout
from t5like.data.vocabularies import ByteVocabulary, SizedVocabulary, TrainedVocabulary
from t5like.errors import UserError
from t5like.inference.compiled import Decoding, decode_batch
from t5like.training import placement, step as step_lib
from t5like.training.budget import Budget
from t5like.training.compiling import compile_with
from t5like.training.sharding import replicated
from t5like.training.state import TrainState
from t5like.training.tracks import Track, spent


@dataclasses.dataclass(frozen=True)
class Batches:
    """The shapes of a track's batches: what a Pipeline says of them without a corpus.

    Attributes:
      features: {feature: (shape, dtype)}.
    """

    features: Mapping[str, tuple[tuple[int, ...], np.dtype]]

    def spec(self) -> Mapping[str, tuple[tuple[int, ...], np.dtype]]:
        return self.features


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run whose programs can be compiled.

    Attributes:
      config: of the run.
      data: its host half, without corpora.
      networks, tracks: by track.
      mesh: over the devices that are compiled for.
      state: jax.ShapeDtypeStruct leaves with shardings.
      total_steps: of the run.
    """

    config: RunConfig
    data: assemble.Data
    networks: Mapping[str, Network]
    tracks: Mapping[str, Track]
    mesh: jax.sharding.Mesh
    state: TrainState
    total_steps: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, or why there is none.

    Attributes:
      name: "train", "train/TRACK" or "generate".
      compiled: None where the compiler refused.
      refusal: its message: the program needs more memory than the device has.
      seconds: to trace and lower, to compile.
      model_flops: of one call over all devices, as the model's formula has it.
      trips: executions of loops whose number is data.
      batch: {feature: shape}, global.
    """

    name: str
    compiled: jax.stages.Compiled | None
    refusal: str | None
    seconds: tuple[float, float]
    model_flops: float
    trips: int
    batch: Mapping[str, tuple[int, ...]]


def plan(config: RunConfig, devices: Sequence[Any]) -> Plan:
    """Everything about a run but its data.

    Raises:
      UserError: as training would, before its first step.
    """
    data = shapes_of(config)
    networks = assemble_networks(data)
    tracks = {name: make_track(data, networks, name) for name in networks}
    total_steps = Budget(config.steps, config.tokens, config.flops).total_steps(
        lambda steps: spent(tracks, data.objective.plan(steps, seed=config.seed).counts(steps))
    )
    sharding, lengths = config.sharding, data.objective.lengths
    mesh = sharding.mesh(devices)
    sharding.check_batch(
        mesh, config.batch_size, (lengths.inputs, lengths.targets), config.accumulate
    )
    init, frozen = union_of(networks), assemble_frozen(data)
    transform = config.optimizer.build(total_steps)
    with sharding.in_force(mesh):
        state = placement.template(init, transform, sharding, mesh, frozen)
    return Plan(config, data, networks, tracks, mesh, state, total_steps)


def shapes_of(config: RunConfig) -> assemble.Data:
    """A run's host half without its corpora."""
    vocabulary = vocabulary_of(config)
    model = assemble.sized(config.model, vocabulary)
    objective = assemble.bind(config, vocabulary, None)
    assemble.check_positions(model, objective)
    tracks = objective.tracks()
    batches = {name: Batches(features_of(config, track)) for name, track in tracks.items()}
    return assemble.Data(vocabulary, {}, model, objective, tracks, batches)


def features_of(
    config: RunConfig, objective: Objective
) -> Mapping[str, tuple[tuple[int, ...], np.dtype]]:
    """{feature: (shape, dtype)} of a global batch, see layout.spec."""
    parts = [part for part, _ in objective.components().values()]
    return layout.spec(
        config.model.architecture,
        config.batch_size,
        objective.lengths.inputs,
        objective.lengths.targets,
        tuple(dict.fromkeys(name for part in parts for name in part.features)),
        max(part.members for part in parts),
        any(part.sees_ahead for part in parts),
    )


def vocabulary_of(config: RunConfig) -> Any:
    """The run's vocabulary, or one of its size where files or training would be needed.

    Raises:
      UserError: its files are not here and nothing says how large it is.
    """
    asked = config.vocabulary
    if isinstance(asked, (ByteVocabulary, SizedVocabulary)):
        return asked
    if isinstance(asked, TrainedVocabulary):
        return SizedVocabulary(asked.size - asked.extra_ids, asked.extra_ids)
    extra = getattr(asked, "extra_ids", 0)
    if config.model.vocab_size is not None:
        return SizedVocabulary(config.model.vocab_size - extra, extra)
    try:
        _ = asked.size
    except UserError as error:
        raise UserError(
            f"{error}; to compile, its size is enough: set ModelConfig.vocab_size, or "
            "train.vocabulary = @SizedVocabulary()"
        ) from error
    return asked


# --- programs ----------------------------------------------------------------------------------


def train_programs(planned: Plan) -> list[Program]:
    """The update of each track, compiled."""
    names = list(planned.tracks)
    return [compile_train(planned, name, len(names) > 1) for name in names]


def compile_train(planned: Plan, track: str, several: bool = False) -> Program:
    """The update of a track, compiled."""
    config, mesh = planned.config, planned.mesh
    features = planned.data.pipelines[track].spec()
    with config.sharding.in_force(mesh):
        update = step_lib.make_train_step(
            planned.tracks[track].loss_fn,
            config.optimizer.build(planned.total_steps),
            config.optimizer.schedule(planned.total_steps),
            declares=planned.tracks[track].paths,
            accumulate=config.accumulate,
            places=placement.shardings(planned.state),
        )
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=config.sharding.of_batch(mesh, shape))
            for name, (shape, dtype) in features.items()
        }
        return _compile(
            f"train/{track}" if several else "train",
            lambda: update.lower(planned.state, batch, _key(mesh)),
            planned.tracks[track].flops_per_step,
            1,
            {name: shape for name, (shape, _) in features.items()},
            config.compiler_options,
        )


def can_generate(planned: Plan) -> bool:
    """Whether the backbone has a decoder and an output layer."""
    model, params = planned.data.model, planned.state.params.get("model", {})
    return model.architecture != "encoder" and (model.tie_embeddings or "head" in params)


def compile_generate(planned: Plan, rows: int, new_tokens: int) -> Program:
    """Greedy decoding of `rows` prompts as long as training's rows, compiled.

    Prefill, a cache, and a loop of one token a turn: what launch/generate.py runs, on the
    training run's parameters where they lie.
    """
    config, mesh, model = planned.config, planned.mesh, planned.data.model
    vocabulary, length = planned.data.vocabulary, planned.data.objective.lengths.inputs
    if model.position == "learned" and model.architecture == "decoder":
        length = min(length, model.max_length - new_tokens)
    both_ways = planned.data.objective.reads_both_ways
    features = layout.spec(model.architecture, rows, length, 1, sees_ahead=both_ways)
    shapes = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=config.sharding.of_batch(mesh, shape))
        for name, (shape, dtype) in features.items()
    }
    whole = replicated(mesh)
    with config.sharding.in_force(mesh):
        return _compile(
            "generate",
            lambda: decode_batch.lower(
                planned.state.params["model"],
                shapes,
                jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=whole),
                _key(mesh),
                jax.ShapeDtypeStruct((model.vocab_size,), bool, sharding=whole),
                (model, vocabulary.eos_id, vocabulary.pad_id),
                Decoding(max_new_tokens=new_tokens),
            ),
            math.nan,
            new_tokens,
            {name: shape for name, (shape, _) in features.items()},
        )


def _key(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    shape = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=replicated(mesh))


def _compile(
    name: str,
    lower: Callable[[], jax.stages.Lowered],
    model_flops: float,
    trips: int,
    batch: Mapping[str, tuple[int, ...]],
    options: Mapping[str, Any] | None = None,
) -> Program:
    """A program, compiled under train.compiler_options as `fit` does."""
    started = time.monotonic()
    lowered = lower()
    traced = time.monotonic()
    compiled = refusal = None
    try:
        compiled = compile_with(lowered, options)
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        refusal = str(error)
    seconds = traced - started, time.monotonic() - traced
    return Program(name, compiled, refusal, seconds, model_flops, trips, batch)
