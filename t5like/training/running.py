"""Updates, log lines, evaluations and checkpoints of one call of `fit`, in their order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from t5like.data.plans import Plan
from t5like.training import (
    cadence,
    compiling,
    evaluation,
    peaks,
    signals,
    tracks as tracks_lib,
)
from t5like.training.evaluation import HeldOut
from t5like.training.meter import Meter
from t5like.training.state import TrainState

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
      compiled_flops: FLOPs of all updates of the run as XLA counts them in the compiled step,
        to hold against the model's own formula; None where it does not count, or where not
        every track was compiled by this call. XLA sees nothing inside Pallas kernels, counts a
        scanned layer once, and of a `cond` every branch.
    """

    state: TrainState
    metrics: dict[str, dict[str, Any]]
    stopped_by: str
    compiled_flops: float | None = None


def in_training(evals: Mapping[str, HeldOut], plan: Plan, step: int) -> list[str]:
    """Names of the evaluations of what is in training when `step` updates are done."""
    active = plan.active(step)
    return [split for split, held_out in evals.items() if held_out.track in active]


class Loop:
    """One call's worth of training; `fit` builds it and says what the arguments are."""

    def __init__(
        self,
        *,
        tracks,
        plan,
        updates,
        eval_steps,
        evals,
        put,
        keys,
        every,
        checkpoints,
        record,
        outputs,
        hash_fn,
        keep_best,
        stop,
        profiler,
        compiler_options,
    ):
        self._tracks, self._plan, self._evals = tracks, plan, evals
        self._updates, self._eval_steps = updates, eval_steps
        self._compiled: dict[str, jax.stages.Compiled] = {}
        self._put, self._keys = put, keys
        self._every, self._checkpoints, self._outputs = every, checkpoints, outputs
        self._record, self._config_text = record
        self._hash_fn, self._stop, self._keep_best = hash_fn, stop, keep_best
        self._profiler, self._compiler_options = profiler, compiler_options
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
        self._saved_step = step if info else None
        self._save_clock = cadence.SaveClock(self._every.save_minutes)
        # What was done, not what is planned: a changed budget may have moved the phases.
        self._done = dict(info.get("updates") or self._plan.counts(step))
        self._line_spent = tracks_lib.spent(self._tracks, self._done)
        if missed:
            self._checkpoints.add_metrics(step, self._evaluate(step, missed))
        for batch_step, batch in itertools.islice(batches, self._every.total_steps - step):
            if batch_step != step:
                raise ValueError(f"the loader gave the batch of step {batch_step}, not of {step}")
            if self._profiler.begins(step):
                self._at_rest(self._profiler.begin, step)
            with self._profiler.marked(step):
                self._one_update(step, batch)
            step += 1
            if self._profiler.ends(step):
                self._at_rest(self._profiler.end)
            self._after_update(step)
        if step < self._every.total_steps:
            raise ValueError(f"the loader ended at step {step} of {self._every.total_steps}")
        return FitResult(self._state, self._last_lines, "budget", self._compiled_flops())

    def _at_rest(self, act: Callable[..., None], *arguments: int) -> None:
        """Does something off the clock when the devices have done all updates so far."""
        jax.block_until_ready(self._state)
        with self._stopwatch.paused():
            act(*arguments)

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
            lowered = self._updates[track].lower(*arguments)
            self._compiled[track] = compiling.compile_with(lowered, self._compiler_options)
        if is_first:
            self._stopwatch.restart()  # Starting the loader is off the clock too.

    def _compiled_flops(self) -> float | None:
        """See FitResult."""
        total = 0.0
        for track, count in self._done.items():
            if count:
                compiled = self._compiled.get(track)
                costs = compiled.cost_analysis() if compiled is not None else None
                if not costs or "flops" not in costs:
                    return None
                total += count * costs["flops"]
        return total

    def _after_update(self, step: int) -> None:
        for output in self._outputs:
            output.advance(step)
        if self._every.due(self._every.log, step):
            self._log(step)
        with self._stopwatch.paused():
            metrics = {}
            if self._every.due(self._every.evaluate, step):
                metrics = self._evaluate(step, in_training(self._evals, self._plan, step))
            # The best can be kept only if every one that is measured is saved.
            measured = self._keep_best and bool(metrics)
            late = self._save_clock.due()
            if measured or late or self._every.save_due(step):
                self._save(step, metrics)
            if self._stop.agreed():
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
        for output in self._outputs:
            output.flush()
        self._checkpoints.save(self._state, info, self._config_text)
        self._saved_step = step
        self._save_clock.restart()

    def _leave(self, step: int, metrics: dict[str, float]) -> NoReturn:
        self._save(step, metrics)
        self._checkpoints.wait()
        raise signals.Preempted(step)

    def _write(self, line: dict[str, Any]) -> None:
        self._last_lines[line["split"]] = line
        for output in self._outputs:
            output.write(line)
