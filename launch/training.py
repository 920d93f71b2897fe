"""What `launch/train.py` does: a configuration becomes a run that starts or resumes."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence

import jax
from etils import epath

from launch import assemble, cli, config as config_lib
from launch.run_config import FREE, RunConfig
from t5like.data.loader import load
from t5like.data.pipeline import Pipeline
from t5like.errors import UserError
from t5like.training import identity, init_from, manifest
from t5like.training.budget import Budget
from t5like.training.checkpoints import steps_in
from t5like.training.loop import FitResult, fit
from t5like.training.signals import Preempted

# The run stopped in a way that a restart cures, and how XLA's errors say so.
RESTART = 75
LOST = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "CANCELLED")


def train(gin_files: Sequence[str], bindings: Sequence[str], workdir: str) -> int:
    """Runs or resumes the configured training in `workdir`; returns the exit status."""
    resolved = config_lib.load(gin_files, bindings)
    run: RunConfig = resolved.run
    same = run_identity(resolved)
    check_workdir(workdir, same)
    data = assemble.assemble_data(run, workdir)
    network = assemble.assemble_network(data.objective, data.model, data.pipeline)
    evals = {
        name: assemble.assemble_eval(run, data, name, workdir) for name in run.evals or {}
    }
    tokens_per_step = slots(data.pipeline)
    budget = Budget(run.steps, run.tokens, run.flops)
    write_config(workdir, resolved.text())
    try:
        result = fit(
            init_fn=network.init,
            loss_fn=network.loss,
            optimizer=run.optimizer,
            total_steps=budget.total_steps(tokens_per_step, network.flops_per_step),
            batches=lambda step: load(data.pipeline, step, workers=run.workers),
            seed=run.seed,
            workdir=workdir,
            tokens_per_step=tokens_per_step,
            flops_per_step=network.flops_per_step,
            config_text=resolved.text(),
            identity=same,
            vocabulary_fingerprint=data.vocabulary.fingerprint(),
            data_fingerprint=" ".join(corpus.fingerprint for corpus, _ in data.corpora.values()),
            evals={
                name: functools.partial(pipeline.one_pass, run.eval_batches)
                for name, pipeline in evals.items()
            },
            log_every=run.log_every,
            eval_every=run.eval_every,
            checkpoint_every_steps=run.checkpoint_every_steps,
            checkpoint_every_minutes=run.checkpoint_every_minutes,
            keep=run.keep,
            keep_best=f"{run.keep_best}/loss" if run.keep_best else None,
            accumulate=run.accumulate,
            init_from=starting_point(run),
            hash_fn=data.pipeline.hash if run.batch_hashes else None,
        )
    except Preempted as stopped:
        cli.complain(stopped)
        return stopped.exit_status
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith(LOST):
            raise
        cli.complain(UserError(f"a device or host was lost ({error}): run the command again"))
        return RESTART
    if run.quality and evals:
        from launch import quality

        pipeline = next(iter(evals.values()))
        quality.report(data, network, pipeline, result.state.params, workdir, run.eval_batches)
    tell_next(result, workdir)
    return 0


def run_identity(resolved: config_lib.Resolved) -> dict[str, str]:
    """The bindings that make the run what it is; what only evaluations use is free."""
    free = [f"train.{name}" for name in sorted(FREE)]
    same, _ = identity.split(resolved.bindings | resolved.objects, free)
    scopes = tuple(f"{scope}/" for scope in resolved.eval_scopes)
    return {name: value for name, value in same.items() if not name.startswith(scopes)}


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


def write_config(workdir: str, text: str) -> None:
    """Writes the resolved configuration, whole or not at all."""
    directory = epath.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    fresh = directory / f"config.gin.tmp-{os.getpid()}"
    fresh.write_text(text)
    fresh.replace(directory / "config.gin")


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
