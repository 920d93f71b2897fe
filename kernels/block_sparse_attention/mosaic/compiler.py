"""Which ptxas Mosaic GPU will call, and whether it is one that miscompiles."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess

# ptxas of CUDA 12.8.0 up to 12.9.1 (release 86 of 12.9) miscompiles masked steps; jax's own
# attention_mgpu refuses causal attention there too.
MISCOMPILES = ((12, 8, 0), (12, 9, 86))


def miscompiles() -> bool:
    found = version()
    return found is not None and MISCOMPILES[0] <= found < MISCOMPILES[1]


@functools.cache
def version() -> tuple[int, ...] | None:
    """The version of the ptxas that Mosaic GPU will call; None if there is none to be found.

    The plugin then assembles by itself, in jax 0.10.2 as CUDA 12.9.1 does.
    """
    root = os.environ.get("MOSAIC_GPU_CUDA_ROOT", "/usr/local/cuda")
    try:
        command = [pathlib.Path(root) / "bin" / "ptxas", "--version"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"V(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(x) for x in found.groups()) if found else None
