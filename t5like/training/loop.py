"""The training loop: restore or start, compile once, then update, log, evaluate and save."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from t5like.data.plans import Plan
from t5like.training import (
    cadence,
    placement,
    profiling,
    signals,
    startup,
    step as step_lib,
    writers,
)
from t5like.training.checkpoints import Checkpoints
from t5like.training.evaluation import HeldOut
from t5like.training.init_from import InitFrom
from t5like.training.optimizers import Optimizer
from t5like.training.running import Batch, FitResult, Loop, in_training
from t5like.training.sharding import Sharding, put_replicated
from t5like.training.state import Frozen, TrainState
from t5like.training.tracks import Track

_ALL_DATA = Sharding()


def fit(
    *,
    init_fn: Callable[[jax.Array], Any],
    tracks: Mapping[str, Track],
    plan: Callable[[int], Plan],
    optimizer: Optimizer,
    total_steps: int,
    batches: Callable[[int], Iterator[tuple[int, Batch]]],
    seed: int,
    workdir: epath.PathLike,
    config_text: str = "",
    identity: Mapping[str, str] | None = None,
    vocabulary_fingerprint: str = "",
    data_fingerprint: str = "",
    evals: Mapping[str, HeldOut] | None = None,
    log_every: int = 100,
    eval_every: int | None = None,
    checkpoint_every_steps: int | None = 1000,
    checkpoint_every_minutes: float | None = None,
    keep: int = 3,
    keep_best: str | None = None,
    points: frozenset[int] = frozenset(),
    accumulate: int = 1,
    init_from: InitFrom | None = None,
    frozen: Frozen | None = None,
    after_step: Callable[[TrainState], TrainState] | None = None,
    sharding: Sharding = _ALL_DATA,
    devices: Sequence[jax.Device] | None = None,
    hash_fn: Callable[[Batch], Any] | None = None,
    progress: bool = True,
    tensorboard: bool = True,
    stop: signals.StopFlag | None = None,
    profile: Sequence[int] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> FitResult:
    """Trains until `total_steps` updates are done, going on from the workdir's last checkpoint.

    Args:
      init_fn: key -> parameters, those of all tracks, in boxes that name their axes where they
        may be split (see t5like/models/partitioning.py); traced.
      tracks: {name: what is trained under that name}, see tracks.py. Each is compiled once, when
        its first batch comes.
      plan: total steps -> which track each step trains.
      optimizer: a description from optimizers.py.
      total_steps: updates of the whole run; see budget.py. More than before extends a run.
      batches: start step -> endless iterator of (step, host batch), the batch being a function
        of the step (and of the plan); step s makes update s + 1. Of several processes each
        gives the rows that it holds, see Sharding.local_rows. Closed in the end, where it has a
        `close`.
      seed: seeds initial parameters and, with the step, everything drawn on devices.
      workdir: gets metrics.jsonl, checkpoints/ and tensorboard/.
      config_text: kept in every checkpoint as config.gin.
      identity: bindings that must not change on resume; see identity.py.
      vocabulary_fingerprint, data_fingerprint: must not change on resume either; a
        data_fingerprint that is "", now or in the checkpoint, is not compared.
      evals: {split: held-out data}, run every `eval_every` updates and at the end where the
        plan has their tracks in training.
      log_every, eval_every, checkpoint_every_steps, checkpoint_every_minutes: None for never;
        the end of the run always logs, evaluates and saves.
      keep, keep_best: checkpoints to keep: the newest, and the one with the lowest value of a
        metric such as "validation/loss"; with keep_best every evaluation is saved.
      points: updates whose checkpoints are saved and kept besides.
      accumulate: micro-batches an update.
      init_from: where a fresh run's parameters come from.
      frozen, after_step: trees that losses read; how to change the state after an update.
      sharding: the mesh, and what lies where on it.
      devices: of the mesh; all by default.
      hash_fn: batch -> hash; lines then carry "batch_hash", a hash over their interval.
      progress, tensorboard: whether to write to the screen and to TensorBoard.
      stop: a flag to look at in place of catching SIGTERM here.
      profile: (first, last) updates to trace; SIGUSR1 asks for more, see profiling.py.
      compiler_options: XLA's, for the updates; see compiling.py.

    Raises:
      UserError: see checkpoints.py, identity.py, init_from.py; NonFiniteLoss where the loss or a
        norm is not finite (nothing past the last good checkpoint is saved).
      Preempted: after SIGTERM, with the state saved. The signal is looked for after every
        update and between the batches of an evaluation; of several processes, all stop when one
        gets it.
    """
    startup.check_joined()
    mesh = sharding.mesh(devices)
    evals = evals or {}
    folder = epath.Path(workdir)
    record = {
        "identity": dict(identity or {}),
        "vocabulary": vocabulary_fingerprint,
        "data": data_fingerprint,
        "total_steps": total_steps,
    }
    transform = optimizer.build(total_steps)
    with contextlib.ExitStack() as stack:
        profiler = profiling.Profiler(folder, profile)
        stack.enter_context(profiling.on_signal(profiler))
        stack.callback(profiler.end)
        stop = stop or stack.enter_context(signals.catch_sigterm())
        stack.enter_context(sharding.in_force(mesh))
        free = {
            "sharding": sharding,
            "evals": sorted(evals),
            "log_every": log_every,
            "eval_every": eval_every,
            "checkpoint_every_steps": checkpoint_every_steps,
            "checkpoint_every_minutes": checkpoint_every_minutes,
            "keep_best": keep_best,
            "points": sorted(points),
            "accumulate": accumulate,
            "init_from": init_from,
            "batch hashes": hash_fn is not None,
            "compiler_options": compiler_options,
        }
        startup.check_same_everywhere({**record["identity"], **record, "identity": "", **free})
        checkpoints = Checkpoints(
            folder / "checkpoints", keep=keep, best_metric=keep_best, points=points
        )
        stack.callback(checkpoints.close)
        template = placement.template(init_fn, transform, sharding, mesh, frozen)
        state, info = startup.restore_or_init(
            checkpoints,
            init_fn=init_fn,
            transform=transform,
            seed=seed,
            template=template,
            frozen=frozen,
            init_from=init_from,
            vocabulary=vocabulary_fingerprint,
            check=lambda info: startup.check_same_run(info, record, str(workdir)),
        )
        first = int(state.step)
        every = cadence.Every(
            total_steps,
            log=log_every,
            evaluate=eval_every,
            save=checkpoint_every_steps,
            save_minutes=checkpoint_every_minutes,
            points=points,
        )
        steps_plan = plan(total_steps)
        missed = startup.missed_evals(info, in_training(evals, steps_plan, first), every)
        if info and (first > total_steps or (first == total_steps and not missed)):
            logging.warning("%s has done its %d updates: raise the budget to go on", folder, first)
            return FitResult(state, {}, "nothing to do")
        if info:
            old_total = info["total_steps"]
            startup.warn_of_new_total(optimizer, first, old_total, total_steps)
            done = info.get("updates") or plan(old_total).counts(first)
            startup.warn_of_new_plan(plan, done, first, old_total, total_steps)
        elif init_from is not None:
            startup.check_steps_left(init_from, first, total_steps)
        outputs = writers.open_all(folder, first, total_steps, progress, tensorboard, missed)
        for output in outputs:
            stack.callback(output.close)
        updates = {
            name: step_lib.make_train_step(
                track.loss_fn,
                transform,
                optimizer.schedule(total_steps),
                declares=track.paths,
                accumulate=accumulate,
                after_step=after_step,
                places=placement.shardings(template),
            )
            for name, track in tracks.items()
        }
        eval_steps = {
            name: step_lib.make_eval_step(track.loss_fn, track.paths)
            for name, track in tracks.items()
        }
        loop = Loop(
            tracks=tracks,
            plan=steps_plan,
            updates=updates,
            eval_steps=eval_steps,
            evals=evals,
            put=functools.partial(sharding.put_batch, mesh),
            keys=[
                put_replicated(step_lib.run_key(seed, stream), mesh)
                for stream in (step_lib.STEP_STREAM, step_lib.EVAL_STREAM)
            ],
            every=every,
            checkpoints=checkpoints,
            record=(record, config_text),
            outputs=outputs,
            hash_fn=hash_fn,
            keep_best=keep_best is not None,
            stop=stop,
            profiler=profiler,
            compiler_options=compiler_options,
        )
        iterator = batches(first)
        stack.callback(getattr(iterator, "close", lambda: None))
        return loop.run(state, info, iterator, missed)
