"""TrainState: everything an update reads and writes, one pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a run's `frozen` will be: shapes now, values when it is known where they go.

    Attributes:
      shapes: nested dict of jax.ShapeDtypeStruct, in boxes that name their axes where they may be
        split (see t5like/models/partitioning.py).
      read: that tree without boxes and with shardings -> arrays placed by them.
    """

    shapes: Any
    read: Callable[[Any], Any]

    @classmethod
    def of(cls, tree: Any) -> Frozen:
        """A tree of arrays that are at hand."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

        def read(template: Any) -> Any:
            return jax.device_put(tree, jax.tree.map(lambda x: x.sharding, template))

        return cls(shapes, read)

    @classmethod
    def joined(cls, parts: Mapping[str, Frozen]) -> Frozen:
        """Several under names of their own."""
        return cls(
            {name: part.shapes for name, part in parts.items()},
            lambda template: {name: part.read(template[name]) for name, part in parts.items()},
        )
