"""Loss over an evaluation set, exact: sums over all its batches over their summed weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from t5like.errors import UserError
from t5like.training.meter import add_terms, means
from t5like.training.signals import StopFlag

_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out data of a run.

    Attributes:
      track: whose loss is measured, while it is in training (see tracks.py).
      batches: gives the host batches, anew at each call.
    """

    track: str
    batches: Callable[[], Iterable[dict[str, np.ndarray]]]


class Interrupted(Exception):
    """The evaluation was given up because the process was asked to stop."""


def evaluate(
    eval_step: Callable[..., Any],
    params: Any,
    frozen: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    put: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    key: jax.Array,
    stop: StopFlag | None = None,
) -> dict[str, float]:
    """Means of all loss terms over `batches`, fetched in one `jax.device_get`.

    Args:
      eval_step: see `step.make_eval_step`; one shape of batch compiles once.
      batches: host batches of one shape; weights of 0 mark what does not count.
      put: copies a host batch to the devices.
      key: batch i is given `fold_in(key, i)`.

    Returns:
      {"loss": total, each term's name: mean}.

    Raises:
      Interrupted: between batches, `stop` said so.
      UserError: there are no batches.
    """
    waiting = []
    for index, batch in enumerate(batches):
        if stop is not None and stop.agreed():
            raise Interrupted
        waiting.append(eval_step(params, frozen, put(batch), jax.random.fold_in(key, index)))
        if len(waiting) > _IN_FLIGHT:
            jax.block_until_ready(waiting[-1 - _IN_FLIGHT])
    if not waiting:
        raise UserError("an evaluation set has no batches: give it more text or a smaller batch")
    sums: dict[str, list[float]] = {}
    for terms in jax.device_get(waiting):
        add_terms(sums, terms)
    return means(sums)
