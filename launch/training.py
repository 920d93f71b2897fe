"""What `launch/train.py` does: a configuration becomes a run that starts or resumes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import linen as nn

from launch import assemble, cli, config as config_lib
from launch.compilations import compilations_kept
from launch.files import write_whole
from launch.networks import Network, assemble_frozen, assemble_networks, union_of
from launch.run_config import FREE, FREE_ELSEWHERE, RunConfig
from t5like.data.atomic import is_remote
from t5like.data.loader import load
from t5like.data.pipeline import Pipeline
from t5like.data.plans import PlannedBatches
from t5like.errors import UserError
from t5like.training import distributed, identity, init_from, manifest, startup
from t5like.training.budget import Budget
from t5like.training.checkpoints import steps_in
from t5like.training.evaluation import HeldOut
from t5like.training.loop import FitResult, fit
from t5like.training.signals import Preempted
from t5like.training.tracks import Track, spent

# Bindings in which processes of one run may differ.
OF_A_MACHINE = ("train.cache_dir", "train.workers")
# How XLA's errors say that a restart cures what happened.
LOST = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "CANCELLED")


def train(gin_files: Sequence[str], bindings: Sequence[str], workdir: str) -> int:
    """Runs or resumes the configured training in `workdir`; returns the exit status."""
    resolved = config_lib.load(gin_files, bindings)

    def run() -> int:
        tell_next(train_resolved(resolved, workdir).result, workdir)
        return 0

    return stoppable(run)


def stoppable(run: Callable[[], int]) -> int:
    """The exit status of a command that trains: `run`'s own, or what it was stopped by.

    Raises:
      Restart: a device or host was lost.
    """
    try:
        return run()
    except Preempted as stopped:
        cli.complain(stopped)
        return stopped.exit_status
    except jax.errors.JaxRuntimeError as error:
        distributed.wait_for_the_reason(error)
        if not str(error).startswith(LOST):
            raise
        raise distributed.Restart(
            f"a device or host was lost ({error}): run the command again"
        ) from error


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training that has come to its end.

    Attributes:
      result: what `fit` returned.
      points: steps whose checkpoints are kept for `train_resolved`'s points; the last is the end.
      spent: step -> (tokens, model FLOPs) until then.
    """

    result: FitResult
    points: tuple[int, ...]
    spent: Callable[[int], tuple[int, float]]


def train_resolved(
    resolved: config_lib.Resolved, workdir: str, *, points: int = 1, progress: bool = True
) -> Trained:
    """Runs or resumes a training in `workdir`; see `fit` for what is raised.

    Args:
      points: evenly spaced checkpoints to keep besides those that are configured, the end's
        among them.
      progress: whether it is shown on the screen.
    """
    run: RunConfig = resolved.run
    startup.check_same_everywhere(shared_settings(resolved))
    same = run_identity(resolved)
    check_workdir(workdir, same)
    # Beside a remote workdir, where a machine that takes over finds them.
    with compilations_kept(run.cache_dir or epath.Path(workdir) / "cache"):
        return _train(resolved, workdir, same, points, progress)


def _train(
    resolved: config_lib.Resolved, workdir: str, same: dict[str, str], points: int, progress: bool
) -> Trained:
    """As train_resolved, of a workdir whose run is this one."""
    run: RunConfig = resolved.run
    if run.cache_dir is None and is_remote(workdir):
        place = assemble.cache_directory(run, workdir)
        logging.warning("the cache of %s is on this machine: %s", workdir, place)
    # What the first process puts into the caches the others find there.
    with distributed.first_alone("data"):
        data = assemble.assemble_data(run, workdir)
        evals = assemble.assemble_evals(run, data, workdir)
    networks = assemble_networks(data)
    check_keep_best(run, evals)
    rows = local_rows(run, data)
    tracks = {name: make_track(data, networks, name) for name in networks}
    plan = functools.partial(data.objective.plan, seed=run.seed)
    total_steps = Budget(run.steps, run.tokens, run.flops).total_steps(
        lambda steps: spent(tracks, plan(steps).counts(steps))
    )
    kept = sorted({max(1, round(total_steps * k / points)) for k in range(1, points + 1)})
    steps_plan = plan(total_steps)
    batches = PlannedBatches(data.pipelines, steps_plan)
    if distributed.process_index() == 0:
        write_whole(epath.Path(workdir) / "config.gin", resolved.text())
    result = fit(
        init_fn=union_of(networks),
        tracks=tracks,
        plan=plan,
        optimizer=run.optimizer,
        total_steps=total_steps,
        batches=lambda step: load(batches, step, workers=run.workers, rows=rows),
        seed=run.seed,
        workdir=workdir,
        config_text=resolved.text(),
        identity=same,
        vocabulary_fingerprint=data.vocabulary.fingerprint(),
        data_fingerprint=" ".join(corpus.fingerprint for corpus, _ in data.corpora.values()),
        evals={
            split: HeldOut(name, functools.partial(pipeline.one_pass, run.eval_batches, rows))
            for split, (name, pipeline) in evals.items()
        },
        log_every=run.log_every,
        eval_every=run.eval_every,
        checkpoint_every_steps=run.checkpoint_every_steps,
        checkpoint_every_minutes=run.checkpoint_every_minutes,
        keep=run.keep,
        keep_best=f"{run.keep_best}/loss" if run.keep_best else None,
        points=frozenset(kept[:-1]),
        accumulate=run.accumulate,
        init_from=starting_point(run),
        frozen=assemble_frozen(data),
        sharding=run.sharding,
        hash_fn=functools.partial(hash_batch, rows) if run.batch_hashes else None,
        progress=progress,
        profile=run.profile,
        compiler_options=run.compiler_options,
    )
    active = steps_plan.active(total_steps)
    measured = [(name, pipeline) for name, pipeline in evals.values() if name in active]
    # Its generator works in one process.
    if run.quality and measured and distributed.process_count() == 1:
        from launch import quality

        name, pipeline = measured[0]
        params, limit = result.state.params, run.eval_batches
        quality.report(data, networks[name], pipeline, params, workdir, limit)
    return Trained(result, tuple(kept), lambda step: spent(tracks, steps_plan.counts(step)))


def make_track(data: assemble.Data, networks: Mapping[str, Network], name: str) -> Track:
    """What `fit` needs to know of a track."""
    network, several = networks[name], len(networks) > 1

    def loss(params, frozen, *arguments):
        if several and frozen is not None:
            frozen = frozen.get(name)
        return network.loss(params, frozen, *arguments)

    return Track(
        loss_fn=loss,
        tokens_per_step=slots(data.pipelines[name]),
        flops_per_step=network.flops_per_step,
        declares=nn.unbox(jax.eval_shape(network.init, jax.random.key(0))) if several else None,
    )


def hash_batch(rows: tuple[range, ...], batch: Mapping[str, np.ndarray]) -> str:
    """The hash of a global batch, of which each process has some rows."""
    numbers = [row for part in rows for row in part]
    own = list(zip(numbers, Pipeline.row_hashes(batch), strict=True))
    hashes = dict(pair for pairs in distributed.gather("hashes", own) for pair in pairs)
    return Pipeline.hash_of(hashes[row] for row in sorted(hashes))


def check_keep_best(run: RunConfig, splits: Iterable[str]) -> None:
    """Raises UserError if train.keep_best is none of the splits that evaluations have."""
    if run.keep_best is not None and run.keep_best not in splits:
        raise UserError(
            f"train.keep_best={run.keep_best!r} is no eval of this run, which has several tracks; "
            f"it has {', '.join(splits)}"
        )


def local_rows(run: RunConfig, data: assemble.Data) -> tuple[range, ...]:
    """Rows of each global batch that this process reads.

    Raises:
      UserError: batches do not divide among the devices.
    """
    mesh, lengths = run.sharding.mesh(), data.objective.lengths
    run.sharding.check_batch(
        mesh, run.batch_size, (lengths.inputs, lengths.targets), run.accumulate
    )
    return run.sharding.local_rows(mesh, run.batch_size)


def run_identity(resolved: config_lib.Resolved) -> dict[str, str]:
    """The bindings that make the run what it is; what only evaluations use is free."""
    free = [*(f"train.{name}" for name in sorted(FREE)), *sorted(FREE_ELSEWHERE)]
    same, _ = identity.split(resolved.bindings | resolved.objects, free)
    scopes = tuple(f"{scope}/" for scope in resolved.eval_scopes)
    return {name: value for name, value in same.items() if not name.startswith(scopes)}


def shared_settings(resolved: config_lib.Resolved) -> dict[str, str]:
    """The bindings that all processes of a run must have: all but what concerns one machine."""
    shared, _ = identity.split(resolved.bindings | resolved.objects, OF_A_MACHINE)
    return shared


def check_workdir(workdir: str, same: dict[str, str]) -> None:
    """Raises UserError, before anything is built, if the workdir holds another run."""
    directory = epath.Path(workdir) / "checkpoints"
    for step in reversed(steps_in(directory)):
        try:
            info = manifest.read(directory / str(step))
        except manifest.Damaged:
            continue
        identity.compare(info["identity"], same, workdir)
        return


def slots(pipeline: Pipeline) -> int:
    """Token slots of a batch: what the model reads, inputs and targets."""
    spec = pipeline.spec()
    return sum(
        math.prod(shape) for name, (shape, _) in spec.items() if name.endswith("input_tokens")
    )


def starting_point(run: RunConfig) -> init_from.InitFrom | None:
    """train.init_from and its companions, or None for fresh parameters."""
    if run.init_from is None:
        return None
    return init_from.InitFrom(
        run.init_from, tuple(run.init_prefixes or ()), keep_optimizer=not run.init_reset
    )


def tell_next(result: FitResult, workdir: str) -> None:
    """Says how far the run came and where it lies."""
    if jax.process_index() == 0:
        state = "finished before" if result.stopped_by == "nothing to do" else "done"
        print(f"{state}: step {int(result.state.step)}; the run is in {workdir}")
