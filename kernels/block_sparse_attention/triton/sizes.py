"""Which tile each kernel uses."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kernels.block_sparse_attention import device
from kernels.block_sparse_attention.triton.tiles import SMALLEST, Tiling

# Shared memory that one program may take, by compute capability; others as _SMALL.
_SHARED_KIB = {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}
_SMALL_KIB = 99
# What is lowered without a word of the device is for the GPU that the tiles are chosen for.
_ASSUMED = "9.0"


@dataclasses.dataclass(frozen=True)
class Tilings:
    """One for each kernel: forward, dk and dv (columns), dq (rows), gradients of the bias."""

    forward: Tiling
    columns: Tiling
    rows: Tiling
    bias: Tiling


@dataclasses.dataclass(frozen=True)
class Held:
    """What of a kernel lies in shared memory.

    Attributes:
      fixed: the axis of the tile that a program stays at.
      kept: arrays of which it keeps that axis's rows, if any.
      moved: arrays of which each stage holds the other axis's rows.
    """

    fixed: str
    kept: int
    moved: int

    @property
    def other(self) -> str:
        return "kv" if self.fixed == "q" else "q"

    def shared_bytes(self, tiling: Tiling, width: int, staged: int) -> int:
        """An estimate; width: bytes of a row; staged: see tilings."""
        stay, move = getattr(tiling, self.fixed), getattr(tiling, self.other)
        # Without stages an array that two products read is laid out for each.
        moved = self.moved + (tiling.stages == 1)
        return self.kept * width * stay + tiling.stages * (moved * width + staged * stay) * move


HELD = {
    "forward": Held("q", kept=1, moved=2),
    "columns": Held("kv", kept=2, moved=2),
    "rows": Held("q", kept=2, moved=2),
    "bias": Held("q", kept=0, moved=4),
}

# By head dim, for two-byte inputs on Hopper: the largest that compile with next to no register
# spilled (none in forward and dq, up to 136 bytes in dk and dv), with stages of copies ahead.
_HALF = {
    64: Tilings(
        forward=Tiling(128, 64, warps=4, stages=3),
        columns=Tiling(64, 128, warps=8, stages=3),
        rows=Tiling(128, 64, warps=8, stages=3),
        bias=Tiling(64, 64, warps=4, stages=2),
    ),
    128: Tilings(
        forward=Tiling(128, 128, warps=8, stages=3),
        columns=Tiling(64, 128, warps=8, stages=3),
        rows=Tiling(128, 64, warps=8, stages=3),
        bias=Tiling(64, 64, warps=4, stages=2),
    ),
    256: Tilings(
        forward=Tiling(128, 64, warps=8, stages=2),
        columns=Tiling(64, 64, warps=8, stages=2),
        rows=Tiling(64, 64, warps=8, stages=2),
        bias=Tiling(64, 64, warps=8, stages=1),
    ),
}
# float32 tiles take twice the memory, and a product of them three of TF32.
_SINGLE = {
    64: Tilings(
        forward=Tiling(64, 32, warps=4, stages=2),
        columns=Tiling(32, 64, warps=4, stages=2),
        rows=Tiling(64, 32, warps=4, stages=2),
        bias=Tiling(32, 32, warps=4, stages=2),
    ),
    128: Tilings(
        forward=Tiling(64, 32, warps=4, stages=2),
        columns=Tiling(32, 64, warps=8, stages=1),
        rows=Tiling(32, 32, warps=4, stages=1),
        bias=Tiling(32, 32, warps=4, stages=1),
    ),
    256: Tilings(
        forward=Tiling(64, 32, warps=8, stages=1),
        columns=Tiling(16, 16, warps=4, stages=1),
        rows=Tiling(16, 16, warps=4, stages=1),
        bias=Tiling(32, 32, warps=4, stages=1),
    ),
}


def tilings(
    head_dim: int, dtype: jnp.dtype, staged: int = 0, capability: str | None = None
) -> Tilings:
    """The tiles for a head dim of at most 256.

    Args:
      staged: bytes that are copied ahead for each element of a tile: of bias and mask.
      capability: such as "9.0"; None asks the device.
    """
    table = _SINGLE if jnp.dtype(dtype).itemsize == 4 else _HALF
    chosen = table[next(size for size in table if head_dim <= size)]
    limit = 1024 * _SHARED_KIB.get(capability or device.capability() or _ASSUMED, _SMALL_KIB)
    width = head_dim * jnp.dtype(dtype).itemsize
    # Four warps leave most of a processor idle unless a second program fits beside them.
    limits = dict.fromkeys(HELD, limit) | {"forward": limit * chosen.forward.warps // 8}
    return Tilings(
        **{
            name: _within(getattr(chosen, name), held, limits[name], width, staged)
            for name, held in HELD.items()
        }
    )


def _within(tiling: Tiling, held: Held, limit: int, width: int, staged: int) -> Tiling:
    """Fewer stages, or smaller tiles, until the shared memory, by estimate, is within the limit."""
    fixed, other = held.fixed, held.other
    while True:
        stay, move = getattr(tiling, fixed), getattr(tiling, other)
        fits = held.shared_bytes(tiling, width, staged) <= limit
        if fits or stay == move == SMALLEST:
            return tiling
        if tiling.stages > 2 or (tiling.stages == 2 and move <= 32):
            tiling = dataclasses.replace(tiling, stages=tiling.stages - 1)
        elif move > 32 or stay == SMALLEST:
            tiling = dataclasses.replace(tiling, **{other: move // 2})
        else:
            tiling = dataclasses.replace(tiling, **{fixed: stay // 2})
