"""Names, shapes and dtypes of a tree of arrays, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from t5like.errors import UserError


def of(tree: Any) -> dict[str, list[Any]]:
    """{name: [shape, dtype name]} of a tree of arrays, e.g. {"params/w": [[4, 3], "float32"]}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(x.shape), str(x.dtype)]
        for path, x in flat
    }


def compare(old: Mapping[str, Any], new: Mapping[str, Any], path: epath.Path) -> None:
    """Raises UserError naming the first arrays that differ between a checkpoint and a model."""
    missing = [name for name in new if name not in old]
    extra = [name for name in old if name not in new]
    changed = [
        f"{name} is {_show(old[name])} there and {_show(new[name])} here"
        for name in new
        if name in old and list(old[name]) != list(new[name])
    ]
    parts = [
        _some("it lacks", missing),
        _some("it has, and the model lacks,", extra),
        _some("", changed),
    ]
    if missing or extra or changed:
        raise UserError(
            f"checkpoint {path} does not fit this model: " + "; ".join(filter(None, parts))
        )


def _some(what: str, names: list[str], limit: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{what} {', '.join(names[:limit])}{more}".strip()


def _show(array: list[Any]) -> str:
    return f"{array[1]}{array[0]}"
