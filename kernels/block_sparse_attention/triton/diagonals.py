"""Gradient of a bias by distance: a sum along diagonals, without anything of size Q * K.

Tiles of one block diagonal add up element by element, so a program walks along a diagonal with
one tile of sums in registers, and sums that tile's own diagonals once, at its end.
"""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from kernels.block_sparse_attention.order import group_of
from kernels.block_sparse_attention.problem import ACTIVE, PARTIAL, Problem
from kernels.block_sparse_attention.triton.recompute import Inputs, Launch
from kernels.block_sparse_attention.triton.tiles import Tile

PARTS = 4  # a tile's diagonals are summed in two levels: PARTS x PARTS squares, then their elements
SHORTEST = 32  # a diagonal is not cut in pieces of fewer tiles
PIECES_PER_DIAGONAL = 8

DIAGONAL, BEGIN, END = range(3)  # columns of `Pieces.bounds`


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["bounds", "q_start", "kv_start", "flags"],
    meta_fields=["has_partial"],
)
@dataclasses.dataclass(frozen=True)
class Pieces:
    """Active tiles, diagonal by diagonal, cut in pieces of about one length.

    Attributes:
      bounds: int32 [Gb, Gh, pieces, 3]; a piece's diagonal, its first tile and its end.
      q_start, kv_start, flags: int32 [Gb, Gh, tiles].
      has_partial: False where surely no tile needs a mask.
    """

    bounds: jax.Array | np.ndarray
    q_start: jax.Array | np.ndarray
    kv_start: jax.Array | np.ndarray
    flags: jax.Array | np.ndarray
    has_partial: bool


def of_distances(launch: Launch, inputs: Inputs) -> jax.Array:
    """float32 [H, Q + K]."""
    problem, size = launch.problem, launch.tiling.q
    batch, heads = inputs.q.shape[:2]
    work = _pieces(problem, size)
    count = work.bounds.shape[2]
    part = size // PARTS
    shape = (batch, heads, count, 2 * PARTS, 2 * part)
    sums = launch(_along, (heads, batch, count), shape, work, inputs)
    # Square delta's entry f lies at distance (delta - PARTS) * part + f - part from the tile's
    # corner: the lower half of one square continues the upper half of the square before.
    upper, lower = sums[..., part:], sums[..., :part]
    folded = upper.at[..., :-1, :].add(lower[..., 1:, :])
    folded = folded.reshape(batch, heads, count, 2 * size)
    diagonals = _number_of_diagonals(problem, size)
    diagonal = jnp.broadcast_to(work.bounds[..., DIAGONAL], (batch, heads, count))
    by_head = jnp.moveaxis(folded, 0, 1).reshape(heads, batch * count, 2 * size)
    diagonal = jnp.moveaxis(diagonal, 0, 1).reshape(heads, batch * count)
    total = jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, diagonals + 1))(by_head, diagonal)
    # So do diagonals. Diagonal g begins at distance (g - Q / size) * size - size.
    values = total[:, :-2, size:] + total[:, 1:-1, :size]
    return values.reshape(heads, -1)


def _number_of_diagonals(problem: Problem, size: int) -> int:
    """One more than needed: distances [-Q, K) take Q / size + K / size pieces of `size`."""
    return (problem.q_len + problem.kv_len) // size + 1


def _pieces(problem: Problem, size: int) -> Pieces:
    blocks = problem.by_row
    xp = np if isinstance(blocks.flags, np.ndarray) else jnp
    lead = blocks.flags.shape[:2]
    q_parts, kv_parts = problem.block_q // size, problem.block_kv // size
    q_tile = blocks.rows[..., None, None] * q_parts + np.arange(q_parts)[:, None]
    kv_tile = blocks.cols[..., None, None] * kv_parts + np.arange(kv_parts)
    flags = xp.broadcast_to(blocks.flags[..., None, None], (*blocks.flags.shape, q_parts, kv_parts))
    q_tile, kv_tile = (xp.broadcast_to(x, flags.shape) for x in (q_tile, kv_tile))
    q_tile, kv_tile, flags = (x.reshape(*lead, -1) for x in (q_tile, kv_tile, flags))
    diagonals = _number_of_diagonals(problem, size)
    diagonal = xp.where(flags & ACTIVE, kv_tile - q_tile + problem.q_len // size, diagonals)
    order = xp.argsort(diagonal, axis=-1, stable=True)
    diagonal, q_tile, kv_tile, flags = (
        xp.take_along_axis(x, order, -1) for x in (diagonal, q_tile, kv_tile, flags)
    )
    length = max(SHORTEST, flags.shape[-1] // (PIECES_PER_DIAGONAL * diagonals))
    count = flags.shape[-1] // length + diagonals
    bounds = [_cut(xp, x, diagonals, length, count) for x in diagonal.reshape(-1, flags.shape[-1])]
    bounds = xp.stack(bounds).reshape(*lead, count, 3)
    if xp is np:
        bounds = bounds[:, :, : max(1, int((bounds[..., DIAGONAL] < diagonals).sum(-1).max()))]
    arrays = bounds, q_tile * size, kv_tile * size, flags
    has_partial = bool((blocks.flags & PARTIAL).any()) if xp is np else True
    return Pieces(*(x.astype(np.int32) for x in arrays), has_partial=has_partial)


def _cut(
    xp: ModuleType, diagonal: np.ndarray | jax.Array, diagonals: int, length: int, count: int
) -> np.ndarray | jax.Array:
    """[count, 3], the bounds of pieces; those beyond the last are empty.

    Args:
      diagonal: int [tiles], rising.
    """
    first = xp.searchsorted(diagonal, xp.arange(diagonals + 1))
    begin, end = first[:-1], first[1:]
    pieces = xp.concatenate([xp.zeros(1, int), xp.cumsum((end - begin + length - 1) // length)])
    piece = xp.arange(count)
    owner = xp.searchsorted(pieces, piece, side="right") - 1
    exists = owner < diagonals
    known = xp.minimum(owner, diagonals - 1)
    start = begin[known] + (piece - pieces[known]) * length
    stop = xp.minimum(start + length, end[known])
    return xp.stack(
        [xp.where(exists, known, diagonals), xp.where(exists, start, 0), xp.where(exists, stop, 0)],
        -1,
    )


def _along(work: Pieces, inputs: Inputs, out_ref, *, launch: Launch) -> None:
    head, batch, piece = (pl.program_id(axis) for axis in range(3))
    size = launch.tiling.q
    group = group_of(work.bounds, batch, head)
    begin, end = (work.bounds[(*group, piece, i)] for i in (BEGIN, END))
    last = work.flags.shape[-1] - 1

    def place(step):
        here = (*group, jnp.minimum(step, last))
        return work.q_start[here], work.kv_start[here]

    def one(step, carry):
        starts, total = carry
        tile = Tile(batch, head, *starts, size, size)
        flags = work.flags[(*group, step)] if work.has_partial else None
        return place(step + 1), total + launch.d_logits(inputs, tile, flags)

    total = jnp.zeros((size, size), jnp.float32)
    _, total = lax.fori_loop(begin, end, one, (place(begin), total))
    out_ref[batch, head, piece, :, :] = _diagonal_sums(total)


def _diagonal_sums(x: jax.Array) -> jax.Array:
    """x [n, n] to [2 * PARTS, 2 * n / PARTS]: sums where column - row is one number.

    Entry (delta, f) is the part of distance (delta - PARTS) * n / PARTS + f - n / PARTS that lies
    in the squares whose column - row is delta - PARTS. Masked sums of registers, with neither
    scatter nor shared addresses.
    """
    part = x.shape[0] // PARTS
    squares = x.reshape(PARTS, part, PARTS, part)
    at = jnp.arange(PARTS, dtype=jnp.int32)
    apart = (at[None, :] - at[:, None]).reshape(PARTS, 1, PARTS, 1)
    delta = jnp.arange(2 * PARTS, dtype=jnp.int32).reshape(-1, 1, 1)

    def gather_squares(distance, stack):
        total = jnp.where(apart == distance, squares, 0.0).sum((0, 2))
        return jnp.where(delta == distance + PARTS, total[None], stack)

    # Loops, not unrolled: ptxas takes half a minute over the registers of 31 sums in a row.
    stack = jnp.zeros((2 * PARTS, part, part), jnp.float32)
    stack = lax.fori_loop(1 - PARTS, PARTS, gather_squares, stack)
    inner = jnp.arange(part, dtype=jnp.int32)
    inner_apart = (inner[None, :] - inner[:, None])[None]
    place = jnp.arange(2 * part, dtype=jnp.int32)[None, :]

    def gather_elements(distance, sums):
        total = jnp.where(inner_apart == distance, stack, 0.0).sum((1, 2))
        return jnp.where(place == distance + part, total[:, None], sums)

    sums = jnp.zeros((2 * PARTS, 2 * part), jnp.float32)
    return lax.fori_loop(1 - part, part, gather_elements, sums)
