"""TrainState: everything an update reads and writes, one pytree."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """A run between two updates.

    Attributes:
      step: int32 scalar, the number of updates done.
      params: the trained parameters.
      opt_state: optax's state; all counts inside equal `step`.
      frozen: trees that losses read and gradients do not reach (teachers), or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    frozen: Any = None


def create(params: Any, transform: optax.GradientTransformation, frozen: Any = None) -> TrainState:
    """A state at step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=transform.init(params),
        frozen=frozen,
    )
