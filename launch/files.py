"""Small files of a workdir, written whole or not at all, wherever etils.epath can write."""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath

from t5like.data.atomic import is_remote, writing


def write_whole(path: epath.Path, content: bytes | str) -> None:
    """Writes a file, and its folder if need be, so that no reader ever sees half of it.

    Raises:
      UserError: naming the file, where it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    with writing(path):
        if is_remote(path):
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.parent / f"{path.name}.tmp-{os.getpid()}"
        fresh.write_bytes(content)
        fresh.replace(path)


def read_json(path: epath.Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file, or none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
