"""Under shard_map: the mesh axes that values vary over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax


def varying_axes(*trees: Any) -> frozenset[str]:
    """The manual mesh axes that any leaf varies over."""
    leaves = (x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array))
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))


def varying_alike(*trees: Any) -> tuple[Any, ...]:
    """All leaves made to vary over the axes that any of them varies over, so that the gradient of
    one that did not is summed over those axes."""
    return vary_like(trees, trees)


def struct(shape: Sequence[int], dtype: Any, *like: Any) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes that any leaf of `like` varies over."""
    kind = jax.sharding.ManualAxisType(varying=varying_axes(like))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=kind)


def vary_like(outputs: Any, *like: Any) -> Any:
    """`outputs`, of which JAX does not know over which mesh axes they vary, as `struct` says it."""
    axes = varying_axes(like)

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, outputs)
