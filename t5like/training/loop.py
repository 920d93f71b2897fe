"""The training loop: restore or start, compile once, then update, log, evaluate and save."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from etils import epath

from t5like.data.plans import Plan
from t5like.training import (
    cadence,
    evaluation,
    mesh as mesh_lib,
    peaks,
    signals,
    startup,
    step as step_lib,
    tracks as tracks_lib,
    writers,
)
from t5like.training.checkpoints import Checkpoints
from t5like.training.evaluation import HeldOut
from t5like.training.init_from import InitFrom
from t5like.training.meter import Meter
from t5like.training.optimizers import Optimizer
from t5like.training.state import TrainState
from t5like.training.tracks import Track

Batch = dict[str, np.ndarray]

# Updates the host may run ahead of the device; more would only hold more batches in memory.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a call of `fit` ends with.

    Attributes:
      state: the last state.
      metrics: {split: the last log line of that split written by this call}.
      stopped_by: "budget", or "nothing to do" where the workdir's run had finished before.
    """

    state: TrainState
    metrics: dict[str, dict[str, Any]]
    stopped_by: str


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
    accumulate: int = 1,
    init_from: InitFrom | None = None,
    frozen: Any = None,
    after_step: Callable[[TrainState], TrainState] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    hash_fn: Callable[[Batch], Any] | None = None,
    progress: bool = True,
    tensorboard: bool = True,
    stop: signals.StopFlag | None = None,
) -> FitResult:
    """Trains until `total_steps` updates are done, going on from the workdir's last checkpoint.

    Args:
      init_fn: key -> parameters, those of all tracks; traced.
      tracks: {name: what is trained under that name}, see tracks.py. Each is compiled once, when
        its first batch comes.
      plan: total steps -> which track each step trains.
      optimizer: a description from optimizers.py.
      total_steps: updates of the whole run; see budget.py. More than before extends a run.
      batches: start step -> endless iterator of (step, host batch), the batch being a function
        of the step (and of the plan); step s makes update s + 1. Closed in the end, where it has
        a `close`.
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
      accumulate: micro-batches an update.
      init_from: where a fresh run's parameters come from.
      frozen, after_step: trees that losses read; how to change the state after an update.
      mesh: see mesh.py; all devices by default.
      hash_fn: batch -> hash; lines then carry "batch_hash", a hash over their interval.
      progress, tensorboard: whether to write to the screen and to TensorBoard.
      stop: a flag to look at in place of catching SIGTERM here.

    Raises:
      UserError: see checkpoints.py, identity.py, init_from.py; NonFiniteLoss where the loss or a
        norm is not finite (nothing past the last good checkpoint is saved).
      Preempted: after SIGTERM, with the state saved. The signal is looked for after every
        update and between the batches of an evaluation.
    """
    mesh = mesh or mesh_lib.make_mesh()
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
        stop = stop or stack.enter_context(signals.catch_sigterm())
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = Checkpoints(folder / "checkpoints", keep=keep, best_metric=keep_best)
        stack.callback(checkpoints.close)
        state, info = startup.restore_or_init(
            checkpoints,
            init_fn=init_fn,
            transform=transform,
            seed=seed,
            mesh=mesh,
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
        )
        steps_plan = plan(total_steps)
        missed = startup.missed_evals(info, _in_training(evals, steps_plan, first), every)
        if info and (first > total_steps or (first == total_steps and not missed)):
            logging.warning("%s has done its %d updates: raise the budget to go on", folder, first)
            return FitResult(state, {}, "nothing to do")
        if info:
            old_total = info["total_steps"]
            startup.warn_of_new_total(optimizer, first, old_total, total_steps)
            startup.warn_of_new_plan(plan, info["updates"], first, old_total, total_steps)
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
                out_shardings=mesh_lib.replicated(mesh),
            )
            for name, track in tracks.items()
        }
        eval_steps = {
            name: step_lib.make_eval_step(track.loss_fn, track.paths)
            for name, track in tracks.items()
        }
        loop = _Loop(
            tracks=tracks,
            plan=steps_plan,
            updates=updates,
            eval_steps=eval_steps,
            evals=evals,
            mesh=mesh,
            seed=seed,
            every=every,
            checkpoints=checkpoints,
            record=(record, config_text),
            outputs=outputs,
            hash_fn=hash_fn,
            keep_best=keep_best is not None,
            stop=stop,
        )
        iterator = batches(first)
        stack.callback(getattr(iterator, "close", lambda: None))
        return loop.run(state, info, iterator, missed)


def _in_training(evals: Mapping[str, HeldOut], plan: Plan, step: int) -> list[str]:
    """Names of the evaluations of what is in training when `step` updates are done."""
    active = plan.active(step)
    return [split for split, held_out in evals.items() if held_out.track in active]


class _Loop:
    """One call's worth of training; `fit` builds it and says what the arguments are."""

    def __init__(
        self,
        *,
        tracks,
        plan,
        updates,
        eval_steps,
        evals,
        mesh,
        seed,
        every,
        checkpoints,
        record,
        outputs,
        hash_fn,
        keep_best,
        stop,
    ):
        self._tracks, self._plan, self._evals = tracks, plan, evals
        self._updates, self._eval_steps = updates, eval_steps
        self._compiled: dict[str, jax.stages.Compiled] = {}
        self._put = functools.partial(mesh_lib.put_batch, mesh=mesh)
        self._keys = [
            mesh_lib.put_replicated(step_lib.run_key(seed, stream), mesh)
            for stream in (step_lib.STEP_STREAM, step_lib.EVAL_STREAM)
        ]
        self._every, self._checkpoints, self._outputs = every, checkpoints, outputs
        self._record, self._config_text = record
        self._hash_fn, self._stop, self._keep_best = hash_fn, stop, keep_best
        self._last_lines: dict[str, dict[str, Any]] = {}
        self._stopwatch = cadence.Stopwatch()

    def run(
        self,
        state: TrainState,
        info: dict[str, Any],
        batches: Iterator[tuple[int, Batch]],
        missed: list[str],
    ) -> FitResult:
        self._state, step = state, int(state.step)
        self._meter = Meter(info.get("meter"))
        self._saved_step, self._saved_at = step if info else None, time.monotonic()
        # What was done, not what is planned: a changed budget may have moved the phases.
        self._done = dict(info.get("updates") or self._plan.counts(step))
        self._line_spent = tracks_lib.spent(self._tracks, self._done)
        if missed:
            self._checkpoints.add_metrics(step, self._evaluate(step, missed))
        for batch_step, batch in itertools.islice(batches, self._every.total_steps - step):
            if batch_step != step:
                raise ValueError(f"the loader gave the batch of step {batch_step}, not of {step}")
            self._one_update(step, batch)
            step += 1
            self._after_update(step)
        if step < self._every.total_steps:
            raise ValueError(f"the loader ended at step {step} of {self._every.total_steps}")
        return FitResult(self._state, self._last_lines, "budget")

    def _one_update(self, step: int, batch: Batch) -> None:
        track, _ = self._plan.at(step)
        digest = str(self._hash_fn(batch)) if self._hash_fn else ""
        # Whatever is not put on the devices by name is a mistake, and slow: it raises.
        with jax.transfer_guard_host_to_device("disallow"):
            arguments = self._state, self._put(batch), self._keys[0]
            if track not in self._compiled:
                self._compile(track, arguments)
            self._state, metrics = self._compiled[track](*arguments)
        self._done[track] += 1
        self._meter.add(step + 1, track, metrics, digest)
        self._meter.wait_for_all_but(_IN_FLIGHT)

    def _compile(self, track: str, arguments: tuple[Any, ...]) -> None:
        """Compiles a track's update ahead of its first call, off the clock."""
        is_first = not self._compiled
        with self._stopwatch.paused():
            self._compiled[track] = self._updates[track].lower(*arguments).compile()
        if is_first:
            self._stopwatch.restart()  # Starting the loader is off the clock too.

    def _after_update(self, step: int) -> None:
        for output in self._outputs:
            output.advance(step)
        if self._every.due(self._every.log, step):
            self._log(step)
        with self._stopwatch.paused():
            metrics = {}
            if self._every.due(self._every.evaluate, step):
                metrics = self._evaluate(step, _in_training(self._evals, self._plan, step))
            # The best can be kept only if every one that is measured is saved.
            measured = self._keep_best and bool(metrics)
            if measured or self._every.save_due(step, time.monotonic() - self._saved_at):
                self._save(step, metrics)
            if self._stop.requested:
                self._leave(step, metrics)

    def _log(self, step: int) -> None:
        values = self._meter.line(by_track=len(self._tracks) > 1)
        tokens, flops = tracks_lib.spent(self._tracks, self._done)
        seconds = max(self._stopwatch.seconds(), 1e-9)
        rates = (tokens - self._line_spent[0]) / seconds, (flops - self._line_spent[1]) / seconds
        self._line_spent = tokens, flops
        self._stopwatch.restart()
        peak = peaks.peak_flops(jax.devices()[0])
        self._write(
            {
                "step": step,
                "split": "train",
                **values,
                "tokens": tokens,
                "tokens_per_second": rates[0],
                "flops": flops,
                "mfu": rates[1] / (peak * jax.device_count()) if peak else None,
            }
        )

    def _evaluate(self, step: int, splits: Iterable[str]) -> dict[str, float]:
        """Logs the evaluations of some splits; returns {"split/name": value}."""
        metrics: dict[str, float] = {}
        for split in splits:
            held_out = self._evals[split]
            try:
                values = evaluation.evaluate(
                    self._eval_steps[held_out.track],
                    self._state.params,
                    self._state.frozen,
                    held_out.batches(),
                    put=self._put,
                    key=self._keys[1],
                    stop=self._stop,
                )
            except evaluation.Interrupted:
                self._leave(step, metrics)
            self._write({"step": step, "split": split, **values})
            metrics |= {f"{split}/{name}": value for name, value in values.items()}
        return metrics

    def _save(self, step: int, metrics: dict[str, float]) -> None:
        """Saves, unless this step is saved; the meter has seen only finite numbers until here."""
        if step == self._saved_step:
            return
        info = {
            **self._record,
            "step": step,
            "updates": dict(self._done),  # Written in the background.
            "metrics": metrics,
            "meter": self._meter.snapshot(),
        }
        self._checkpoints.save(self._state, info, self._config_text)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _leave(self, step: int, metrics: dict[str, float]) -> NoReturn:
        self._save(step, metrics)
        self._checkpoints.wait()
        raise signals.Preempted(step)

    def _write(self, line: dict[str, Any]) -> None:
        self._last_lines[line["split"]] = line
        for output in self._outputs:
            output.write(line)
