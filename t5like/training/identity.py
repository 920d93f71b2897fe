"""Which settings make a run what it is, so that a resumed run is the same run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from t5like.errors import UserError


def split(
    bindings: Mapping[str, str], free: Iterable[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """(identity, free) parts of the resolved bindings {name: value}.

    Args:
      free: names of bindings ("train.steps"), or of everything under a configurable
        ("Checkpointing"), that a resumed run may change. The rest is identity.
    """
    names = tuple(free)

    def is_free(binding: str) -> bool:
        return any(binding == name or binding.startswith(name + ".") for name in names)

    identity = {name: value for name, value in bindings.items() if not is_free(name)}
    return identity, {n: value for n, value in bindings.items() if n not in identity}


def compare(old: Mapping[str, str], new: Mapping[str, str], workdir: str) -> None:
    """Raises UserError when a workdir's run and this one differ in an identity binding.

    The message names every binding that differs, with both values.
    """
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            was, now = (b.get(name, "not set") for b in (old, new))
            lines.append(f"{name} was {_short(was, now)} and is now {_short(now, was)}")
    if lines:
        raise UserError(
            f"{workdir} holds a run with other settings: {'; '.join(lines)}. Set them back to "
            "resume it, or choose another --workdir (train.init_from can start from this run's "
            "parameters)"
        )


def _short(value: str, other: str, limit: int = 100) -> str:
    """`value`, or the part of a long one from a little before where it leaves `other`."""
    if len(value) <= limit:
        return value
    start = max(0, len(os.path.commonprefix([value, other])) - limit // 4)
    stop = start + limit
    return f"{'...' * (start > 0)}{value[start:stop]}{'...' * (stop < len(value))}"
