"""Where a run's state comes from: its own last checkpoint, another run's, or fresh values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax
from absl import logging

from t5like.data.plans import Plan
from t5like.errors import UserError
from t5like.training import distributed, identity, placement, step as step_lib
from t5like.training.cadence import Every
from t5like.training.checkpoints import Checkpoints
from t5like.training.init_from import InitFrom
from t5like.training.optimizers import Optimizer
from t5like.training.state import Frozen, TrainState


def restore_or_init(
    checkpoints: Checkpoints,
    *,
    init_fn: Callable[[jax.Array], Any],
    transform: optax.GradientTransformation,
    seed: int,
    template: TrainState,
    frozen: Frozen | None = None,
    init_from: InitFrom | None = None,
    vocabulary: str = "",
    check: Callable[[dict[str, Any]], None] = lambda info: None,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns (state, the checkpoint's info or {} for a fresh run), placed as `template` says.

    No device, and no host, ever holds more than its part of it.

    Args:
      init_fn: key -> parameters; traced, and run only when there is no checkpoint.
      template: see placement.template.
      check: called with the info of a checkpoint before it is used; may raise.

    Raises:
      UserError: see Checkpoints.restore_latest and InitFrom.apply.
    """
    found = checkpoints.restore_latest(template, check)
    if found is not None:
        return found
    fresh = placement.fresh_state(init_fn, transform)
    places = placement.shardings(template.replace(frozen=None))
    state = jax.jit(fresh, out_shardings=places)(step_lib.run_key(seed, step_lib.INIT_STREAM))
    if frozen is not None:
        state = state.replace(frozen=frozen.read(template.frozen))
    return (state if init_from is None else init_from.apply(state, template, vocabulary)), {}


def check_same_everywhere(settings: Mapping[str, Any]) -> None:
    """Raises UserError where processes of one run differ in a setting, or in jax's version.

    All call it at the same time. What differs would be waited for in vain later on.

    Args:
      settings: {name: value}, compared as text.
    """
    said = {name: str(value) for name, value in settings.items()}
    ours, *others = distributed.gather("same", {"jax": jax.__version__, **said})
    for process, theirs in enumerate(others, 1):
        for name in sorted(ours.keys() | theirs.keys()):
            here, there = (known.get(name, "not set") for known in (ours, theirs))
            if here != there:
                raise UserError(
                    f"process {process} is not set up as process 0 is: {name} is {there} there, "
                    f"but {here} in process 0: give all processes the same command, code and files"
                )


def check_joined() -> None:
    """Raises UserError where jax and this package disagree on how many processes there are."""
    ours, of_jax = distributed.process_count(), jax.process_count()
    if ours != of_jax:
        raise UserError(
            f"jax has {of_jax} processes, but this run knows of {ours}: start them with "
            "launch/train.py, or call t5like.training.distributed.initialize before jax is used"
        )


def check_same_run(info: Mapping[str, Any], record: Mapping[str, Any], workdir: str) -> None:
    """Raises UserError where a checkpoint's identity, vocabulary or data are not this run's."""
    identity.compare(info["identity"], record["identity"], workdir)
    if info["vocabulary"] != record["vocabulary"]:
        raise UserError(
            f"{workdir} was trained with another vocabulary (fingerprint {info['vocabulary']}, "
            f"now {record['vocabulary']}): put the old vocabulary back or choose another --workdir"
        )
    old, new = info.get("data", ""), record["data"]
    if old and new and old != new:
        raise UserError(
            f"the training text has changed since {workdir} was begun (fingerprint {old}, now "
            f"{new}): put it back, or choose another --workdir (train.init_from can start from "
            "this run's parameters)"
        )


def check_steps_left(init_from: InitFrom, step: int, total_steps: int) -> None:
    """Raises UserError where a run that takes over another's step would have nothing to do."""
    if step >= total_steps:
        raise UserError(
            f"{init_from.path} is at step {step}, and with train.init_reset=False this run of "
            f"{total_steps} steps starts from there and is over at once: raise train.steps, "
            "train.tokens or train.flops above it, or set train.init_reset=True"
        )


def missed_evals(info: Mapping[str, Any], evals: Iterable[str], every: Every) -> list[str]:
    """Evaluations due at a checkpoint's step that its info lacks: cut short, or new since.

    Args:
      evals: those of what is in training at that step.
    """
    if not info or not every.due(every.evaluate, info["step"]):
        return []
    done = {name.rpartition("/")[0] for name in info.get("metrics") or {}}
    return [split for split in evals if split not in done]


def warn_of_new_total(optimizer: Optimizer, step: int, old: int, new: int) -> None:
    """Says so when a changed budget changes the learning rate of a run in progress."""
    schedule = optimizer.learning_rate
    if old == new or not schedule.depends_on_total:
        return
    logging.warning(
        "the run is now %d updates long, not %d: %s depends on that, so the learning rate at step "
        "%d is %.3g instead of %.3g",
        new,
        old,
        type(schedule).__name__,
        step,
        schedule.build(new)(step),
        schedule.build(old)(step),
    )


def warn_of_new_plan(
    plan: Callable[[int], Plan], done: Mapping[str, int], step: int, old: int, new: int
) -> None:
    """Says so when a changed budget changes which track the steps that are done belong to.

    Args:
      plan: total steps -> plan.
      done: updates of each track that were made, `step` in all.
      old, new: total steps of the run before and now.
    """
    planned = plan(new).counts(step)
    moved = [name for name in planned if planned[name] != done.get(name, 0)]
    if old == new or not moved:
        return
    logging.warning(
        "the run is now %d updates long, not %d, and its phases depend on that: of the %d updates "
        "done, %s",
        new,
        old,
        step,
        ", ".join(
            f"{done.get(name, 0)} trained {name} where {planned[name]} should have"
            for name in moved
        ),
    )
