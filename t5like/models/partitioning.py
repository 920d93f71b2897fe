"""Logical axes: what each axis of an array is, and which axes of the mesh it is split over.

The model names axes ("embed", "heads", "batch"); rules say over which mesh axes a name is split.
The rules in force are flax's (`flax.linen.logical_axis_rules`), the mesh is jax's (`jax.set_mesh`);
without either everything here does nothing, and a model runs as on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
from flax.core import meta
from jax.sharding import AxisType, PartitionSpec

# The axes of every mesh, slowest links first. "replica" counts slices, which a slow network joins.
MESH_AXES = ("replica", "data", "fsdp", "sequence", "tensor")

Rules = Mapping[str, tuple[str, ...]]
AxisNames = tuple[str | None, ...]

# Logical axis -> mesh axes. Names that are not here are not split.
DEFAULT_RULES: Rules = {
    # Of activations. "width" is their D, which parameters call "embed".
    "batch": ("replica", "data", "fsdp"),
    "length": ("sequence",),
    "width": (),
    # Of parameters, and of activations that have such an axis.
    "embed": ("fsdp", "sequence"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


class Axes(flax.struct.PyTreeNode, meta.AxisMetadata):
    """A parameter and the names of its axes, while a tree is initialised.

    Attributes:
      value: the array.
      names: one an axis; None for one that is never split.
    """

    value: Any
    names: AxisNames = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Axes:
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Axes:
        names = list(self.names)
        names.insert(index, params.get(nn.PARTITION_NAME))
        return self.replace(names=tuple(names))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Axes:
        names = list(self.names)
        del names[index]
        return self.replace(names=tuple(names))


def named(init: Callable[..., jax.Array], *names: str | None) -> Callable[..., Axes]:
    """An initialiser whose parameter's axes are called `names`."""
    return lambda *args: Axes(init(*args), names)


def names_of(boxed: Any) -> Any:
    """A tree of initialised parameters -> the same with a tuple of axis names for each."""
    return jax.tree.map(
        lambda leaf: leaf.names if isinstance(leaf, Axes) else (None,) * leaf.ndim,
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, Axes),
    )


def rules_in_force() -> Rules:
    """Logical axis -> mesh axes, as `flax.linen.logical_axis_rules` was given them."""
    return {name: axes or () for name, axes in nn.get_logical_axis_rules()}


def mesh_axes(name: str | None, size: int | None = None) -> tuple[str, ...]:
    """Axes of the mesh in force, of more than one device and left to the compiler, that split
    the logical axis `name`.

    Args:
      size: of the array's axis; () if it does not divide among them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(
        axis
        for axis in rules_in_force().get(name, ())
        if mesh.shape.get(axis, 1) > 1 and kinds[axis] == AxisType.Auto
    )
    return axes if size is None or size % devices_of(axes) == 0 else ()


def devices_of(axes: Iterable[str]) -> int:
    """Into how many parts some axes of the mesh in force split an array's axis."""
    shape, count = jax.sharding.get_abstract_mesh().shape, 1
    for axis in axes:
        count *= shape.get(axis, 1)
    return count


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` laid out on the mesh in force as the rules in force say.

    An axis whose size does not divide is left whole: activations come in sizes that nobody chose,
    such as the positions that a loss gathers.
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names for an array of shape {x.shape}")
    if not _splits_anything():
        return x
    spec = PartitionSpec(*(mesh_axes(n, s) or None for n, s in zip(names, x.shape, strict=True)))
    return jax.lax.with_sharding_constraint(x, spec)


def gathered(kernel: jax.Array, *names: str | None) -> jax.Array:
    """A parameter as computation wants it: whole along axes that also split the batch.

    Fully sharded parameters lie in pieces where no one computes with them; asking for them whole
    here makes the compiler gather parameters, the smaller thing, and never activations.
    """
    if not _splits_anything():
        return kernel
    return constrain(kernel, *(None if over_batch(name) else name for name in names))


def over_batch(*names: str | None) -> bool:
    """Whether a logical axis among `names` lies on mesh axes that also split batches."""
    taken = {*mesh_axes("batch"), *mesh_axes("length")}
    return any(not taken.isdisjoint(mesh_axes(name)) for name in names)


def _splits_anything() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return bool(rules_in_force()) and any(
        mesh.shape[axis] > 1 and kind == AxisType.Auto
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    )
