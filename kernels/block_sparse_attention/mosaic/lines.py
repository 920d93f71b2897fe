"""How programs work on lines of blocks: who computes what, and how tiles reach them.

Every program has computing warpgroups of 64 rows each and one more that feeds them: it reads the
entries of their line and lets the tensor memory accelerator copy the tiles they name into a ring
of buffers. A line of 128 rows (a multiple of which is cut) has two warpgroups that share its
tiles; of lines of 64 rows a program has two where it can, each with a ring of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.block_sparse_attention.mosaic.tiles import WARPGROUP_ROWS
from kernels.block_sparse_attention.order import group_of, longest_first
from kernels.block_sparse_attention.problem import ACTIVE, Blocks

# H100's 227 KiB for a program, less room for barriers and the scratch of reductions.
MAX_SHARED_BYTES = 232448 - 8192
MAX_SLOTS = 4
# Of a thread: 2 * 240 + 24 are the 3 * 168 that a program of three warpgroups starts with.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
# Axes of programs and of their warpgroups. A mesh axis of the same name would be taken instead.
LINE, BATCH, HEAD, WARPGROUP = (
    f"block_sparse_attention_{name}" for name in ("line", "batch", "head", "warpgroup")
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The work of a program.

    Attributes:
      block: rows of a line.
      other: slots of an entry's block on the other side, which is streamed through the ring.
      tile: slots of a tile of it.
      lanes: lines that a program works on.
      warpgroups: computing warpgroups of each.
      slots: buffers of each's ring.
    """

    block: int
    other: int
    tile: int
    lanes: int
    warpgroups: int
    slots: int

    @classmethod
    def make(cls, num_lines: int, block: int, other: int, tile: int, row: int, slot: int) -> Plan:
        """As many buffers as there is room for: `row` bytes a row and `slot` bytes a slot."""
        tile = math.gcd(tile, other)
        warpgroups = 2 if block % (2 * WARPGROUP_ROWS) == 0 else 1

        def slots(lanes: int) -> int:
            room = MAX_SHARED_BYTES // lanes - warpgroups * WARPGROUP_ROWS * row
            return min(MAX_SLOTS, room // (tile * slot))

        pairs = block == WARPGROUP_ROWS and num_lines % 2 == 0 and slots(2) > 1
        lanes = 2 if pairs else 1
        return cls(block, other, tile, lanes, warpgroups, slots(lanes))

    @property
    def computing(self) -> int:
        """Computing warpgroups of a program."""
        return self.lanes * self.warpgroups

    @property
    def rows(self) -> int:
        """Rows of a program in each of its lines."""
        return self.warpgroups * WARPGROUP_ROWS

    @property
    def ring(self) -> int:
        return self.lanes * self.slots

    def lane(self, warpgroup: jax.Array) -> tuple[Any, Any]:
        """A computing warpgroup's lane and its place among the lane's warpgroups."""
        return (0, warpgroup) if self.lanes == 1 else (warpgroup, 0)

    def slot(self, lane: Any, step: jax.Array) -> jax.Array:
        """The buffer of a lane's tile."""
        slot = lax.rem(step, jnp.int32(self.slots))
        return slot if self.lanes == 1 else lane * self.slots + slot

    def feed(
        self, steps: Sequence[jax.Array], copy: Callable[..., None], free: Sequence[Any]
    ) -> None:
        """Calls copy(lane, step, slot, is_reused) for each tile of each lane, in turns.

        Args:
          steps: tiles of each lane.
          copy: starts copies into a slot, having waited for it to be free if it is reused.
          free: the rings' barriers for that; they are left with nobody to wait for them.
        """

        def body(step: jax.Array, _: None) -> None:
            for lane, count in enumerate(steps):
                call = functools.partial(copy, lane, step, self.slot(lane, step))
                if self.lanes == 1:
                    call(step >= self.slots)
                else:
                    pl.when(step < count)(functools.partial(call, step >= self.slots))

        def drain(lane: int, step: jax.Array, _: None) -> None:
            for barriers in free:
                plgpu.barrier_wait(barriers.at[self.slot(lane, step)])

        lax.fori_loop(0, functools.reduce(jnp.maximum, steps), body, None)
        for lane, count in enumerate(steps):
            last = jnp.maximum(count - self.slots, 0)
            lax.fori_loop(last, count, functools.partial(drain, lane), None)

    # A single warpgroup has registers enough as it starts.
    def take_registers(self) -> None:
        if self.computing == 2:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

    def give_registers(self) -> None:
        if self.computing == 2:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

    def resident(self, head_dim: int, dtype: Any) -> Any:
        """Shared memory for the lines' own rows, [computing, 64, head_dim]."""
        return _tiles(self.computing, WARPGROUP_ROWS, head_dim, dtype)

    def streamed(self, head_dim: int, dtype: Any) -> Any:
        """Shared memory for the rings of the lanes, [ring, tile, head_dim]."""
        return _tiles(self.ring, self.tile, head_dim, dtype)

    def rings(self, **copies: int) -> dict[str, Any]:
        """Barriers of streams, by name; so many copies fill a buffer."""
        found = {}
        for name, count in copies.items():
            barriers = {"ready": count, "free": self.warpgroups}
            for kind, arrivals in barriers.items():
                barrier = plgpu.Barrier(num_arrivals=arrivals, num_barriers=self.ring)
                found[f"{name}_{kind}"] = barrier
        return found

    def resident_vector(self, dtype: Any) -> Any:
        return plgpu.SMEM((self.computing, WARPGROUP_ROWS), dtype)

    def streamed_vector(self, dtype: Any) -> Any:
        return plgpu.SMEM((self.ring, self.tile), dtype)

    def launch(self, body: Any, lines: int, batch: int, heads: int, **settings: Any) -> Any:
        """A kernel whose programs start line by line, so that all groups' longest come first."""
        return plgpu.kernel(
            body,
            grid=(lines * self.block // (self.rows * self.lanes), batch, heads),
            grid_names=(LINE, BATCH, HEAD),
            num_threads=self.computing + 1,
            thread_name=WARPGROUP,
            compiler_params=plgpu.CompilerParams(approx_math=True),
            **settings,
        )


@dataclasses.dataclass(frozen=True)
class Lines:
    """A list of blocks as kernels read it: references to arrays [Gb, Gh, ..] in global memory.

    Attributes:
      order: lines, longest first, so that the last programs to start are short.
      offsets, place, flags: of `Blocks`; place is the block on the other side.
      plan: the work of a program.
      batch, head: the program's.
    """

    order: Any
    offsets: Any
    place: Any
    flags: Any
    plan: Plan
    batch: jax.Array
    head: jax.Array

    @classmethod
    def here(cls, plan: Plan, *refs: Any) -> Lines:
        """Of the running program; refs of `arrays`."""
        return cls(*refs, plan, lax.axis_index(BATCH), lax.axis_index(HEAD))

    @staticmethod
    def arrays(blocks: Blocks, by_row: bool) -> list[jax.Array]:
        """What kernels are given of a list: the first four attributes."""
        order = longest_first(blocks.offsets[..., 1:] - blocks.offsets[..., :-1])
        place = blocks.cols if by_row else blocks.rows
        return [jnp.asarray(x) for x in (order, blocks.offsets, place, blocks.flags)]

    def line(self, lane: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The lane's first row, the first entry of its line and the number of its tiles."""
        plan, group = self.plan, self.group(self.offsets)
        parts = plan.block // plan.rows
        program = lax.axis_index(LINE) * plan.lanes + lane
        line = self.order[*group, _div(program, parts)]
        entry = self.offsets[*group, line]
        count = (self.offsets[*group, line + 1] - entry) * (plan.other // plan.tile)
        active = (self.flags[*group, entry] & ACTIVE) != 0
        first_row = line * plan.block + _rem(program, parts) * plan.rows
        return first_row, entry, jnp.where(active, count, 0)

    def tile(self, entry: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first slot of a line's tile and its entry's flags; `entry` is the line's first."""
        plan, group = self.plan, self.group(self.flags)
        pieces = plan.other // plan.tile
        entry = entry + _div(step, pieces)
        slot = self.place[*group, entry] * plan.other + _rem(step, pieces) * plan.tile
        return slot, self.flags[*group, entry]

    def group(self, array: Any) -> tuple[Any, Any]:
        return group_of(array, self.batch, self.head)


def kv_head(head: jax.Array, group: int) -> jax.Array:
    """The head of keys that a head of queries attends with."""
    return _div(head, group)


def _div(x: jax.Array, divisor: int) -> jax.Array:
    return x if divisor == 1 else lax.div(x, jnp.int32(divisor))


def _rem(x: jax.Array, divisor: int) -> jax.Array | int:
    return 0 if divisor == 1 else lax.rem(x, jnp.int32(divisor))


def _tiles(count: int, slots: int, head_dim: int, dtype: Any) -> Any:
    # As wgmma reads them: rows of 128 bytes, swizzled.
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, slots, head_dim), dtype, transforms=transforms)
