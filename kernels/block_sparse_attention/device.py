"""Which GPU a program is for."""

from __future__ import annotations

import re

import jax

AMD = "gfx"  # AMD's capabilities start so: "gfx942"
# What an absent device is called, and its compute capability. One of another name counts as of the
# generation with the least shared memory.
_KINDS = (
    (re.compile(r"\bG?H\d{2,3}\b"), "9.0"),  # H100, H200, H800, H20, GH200
    (re.compile(r"\bG?B[23]00\b"), "10.0"),
    (re.compile(r"\b(A100|A800|A30)\b"), "8.0"),
    (re.compile(r"\bT\d{1,4}\b|\bRTX 20\d\d\b|\bTITAN RTX\b|\bQuadro\b"), "7.5"),
    (re.compile(r"\b(Tesla|[VP]100|P40?|GTX|TITAN)\b"), "7.0"),
    (re.compile(r"\bAMD\b|\bRadeon\b|\bInstinct\b|\bMI\d{2,3}|gfx"), AMD),
)
_OTHER = "8.6"


def capability() -> str | None:
    """The compute capability of the mesh in force's devices, or of JAX's default ones: "9.0" or,
    of AMD's, "gfx942". None where they are no GPUs."""
    wanted = jax.sharding.get_abstract_mesh().abstract_device
    if wanted is None:
        return jax.local_devices()[0].compute_capability if jax.default_backend() == "gpu" else None
    if wanted.platform not in ("gpu", "cuda", "rocm"):
        return None
    try:
        present = jax.local_devices(backend="gpu")
    except RuntimeError:
        present = []
    for device in present:
        if device.device_kind == wanted.device_kind:
            return device.compute_capability
    if wanted.platform == "rocm":
        return AMD
    return next((known for name, known in _KINDS if name.search(wanted.device_kind)), _OTHER)


def is_at_least(capability: str, major: int) -> bool:
    """Whether an NVIDIA GPU is of this generation or a later one."""
    number = re.fullmatch(r"(\d+)\.\d+", capability)
    return number is not None and int(number[1]) >= major
