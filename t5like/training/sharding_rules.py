"""Rules of a sharding, read and checked: logical axis -> axes of the mesh."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from t5like.errors import UserError
from t5like.models.partitioning import DEFAULT_RULES, MESH_AXES, Rules

# Of layers that are one program in a loop; not split unless a rule says so.
_LAYERS = "layers"
# Axes that arrays of every model have both: activations [B, L, ...], and kernels [D, ...].
_SPLIT = ("heads", "kv_heads", "mlp", "vocab")
_TOGETHER = (
    ("batch", "length"),
    *((first, other) for first in ("batch", "length") for other in ("width", *_SPLIT)),
    *(("embed", other) for other in _SPLIT),
)


def over_defaults(rules: Any) -> Rules:
    """DEFAULT_RULES with {logical axis: mesh axis, list of them, or None} over them.

    Raises:
      UserError: it is no such dict, or names an axis that there is not.
    """
    if rules is None:
        return DEFAULT_RULES
    if not isinstance(rules, Mapping):
        raise UserError(
            f"Sharding.rules is {rules!r}; it must be a dict from logical axes to axes of the "
            "mesh, such as {'mlp': 'tensor'}"
        )
    return {**DEFAULT_RULES, **{name: _axes(name, axes) for name, axes in rules.items()}}


def _axes(name: Any, axes: Any) -> tuple[str, ...]:
    known = (*DEFAULT_RULES, _LAYERS)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        mend = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"Sharding.rules: {name!r} is no logical axis; {mend}")
    if axes is None or isinstance(axes, str):
        axes = () if axes is None else (axes,)
    if not isinstance(axes, (tuple, list)):
        raise UserError(
            f"Sharding.rules puts {name!r} on {axes!r}; it must be an axis of the mesh, a list of "
            f"them, or None; there are {', '.join(MESH_AXES)}"
        )
    for axis in axes:
        if axis not in MESH_AXES:
            raise UserError(
                f"Sharding.rules puts {name!r} on {axis!r}, which is no axis of the mesh: it has "
                f"{', '.join(MESH_AXES)}"
            )
        if list(axes).count(axis) > 1:
            raise UserError(f"Sharding.rules puts {name!r} on {axis!r} twice: name it once")
    return tuple(axes)


def check_collisions(axes: Callable[[str], tuple[str, ...]]) -> None:
    """Raises UserError where two axes of the model's arrays lie on one axis of the mesh.

    Parameters may share mesh axes with activations, never one axis of theirs with another.

    Args:
      axes: logical axis -> the axes of several devices that split it.
    """
    for name, other in _TOGETHER:
        for axis in axes(name):
            if axis in axes(other):
                raise UserError(
                    f"Sharding.rules puts both {name!r} and {other!r} on {axis!r}, and there are "
                    "arrays with both: move one of them, or give that axis one device"
                )
