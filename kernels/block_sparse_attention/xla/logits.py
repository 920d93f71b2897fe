"""Logits of a strip with their bias and soft cap, and the gradient of the bias."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bias import Array, Buckets, Distances, Lowered, shifted_rows
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.xla.strips import Strip, Walk
from kernels.block_sparse_attention.xla.windows import added, joined, start_of, window


@dataclasses.dataclass(frozen=True)
class Spread:
    """A Distances for some heads, written out for one row of blocks at every place it may have.

    Attributes:
      array: float32 [1, h, block_q, Q + K - block_q]: entry (i, x) is the value of the distance
        x - i - (Q - block_q), so that any block's bias is one window of it, and its gradient is
        added to one. Its size is linear in the length; within a step nothing but copies is left.
    """

    array: jax.Array

    @staticmethod
    def of(walk: Walk, bias: Distances, head: jax.Array) -> Spread:
        values = window(bias.values, (head,), (walk.heads,)).astype(jnp.float32)
        rows, period = walk.problem.block_q, values.shape[1]
        shifted = shifted_rows(jnp.roll(values, -rows, 1), rows)
        return Spread(shifted[None, ..., : period - rows])

    def d_values(self) -> jax.Array:
        """float32 [h, Q + K], where self holds a gradient: its sums over each distance."""
        _, heads, rows, width = self.array.shape
        period = width + rows
        shifted = jnp.pad(self.array[0], ((0, 0), (0, 0), (0, rows - 1)))
        repeated = jnp.pad(shifted.reshape(heads, -1), ((0, 0), (0, rows)))
        repeated = repeated.reshape(heads, rows, period)
        # A product: XLA's CPU reduction over an axis other than the last strides through memory.
        total = jnp.einsum("r,hrp->hp", jnp.ones(rows, jnp.float32), repeated, precision="highest")
        return jnp.roll(total, rows, 1)


Ready = Spread | Buckets | Array | None


def ready(walk: Walk, bias: Lowered, head: jax.Array) -> Ready:
    """The bias as steps of these heads read it."""
    return Spread.of(walk, bias, head) if isinstance(bias, Distances) else bias


def scaled(problem: Problem, q: jax.Array) -> tuple[Problem, jax.Array]:
    """The scale moved from the logits to the queries, where that loses nothing."""
    if q.dtype != jnp.float32:
        return problem, q
    return dataclasses.replace(problem, scale=1.0), q * problem.scale


def logits(
    walk: Walk, bias: Ready, strip: Strip, q: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """(float32 logits [b, h, block_q, w] of q [b, h, block_q, Dh] and k [b, n, w, Dh], and their
    slope under the soft cap, if there is one)."""
    products = jnp.einsum(
        "bnqd,bnkd->bnqk", walk.by_kv_head(q), k, preferred_element_type=jnp.float32
    )
    values = walk.by_head(products)
    if walk.problem.scale != 1.0:
        values = values * walk.problem.scale
    if bias is not None:
        values = values + _tile(walk, bias, strip)
    if walk.problem.soft_cap is None:
        return values, None
    share = jnp.tanh(values / walk.problem.soft_cap)
    return share * walk.problem.soft_cap, 1 - share * share


def _tile(walk: Walk, bias: Ready, strip: Strip) -> jax.Array:
    """The strip's bias, float32 [b or 1, h or 1, block_q or 1, w]."""
    if isinstance(bias, Array):
        return walk.pairs(bias.array, strip).astype(jnp.float32)
    if isinstance(bias, Buckets):
        table = window(bias.table.T, (strip.head,), (walk.heads,)).astype(jnp.float32)
        return jnp.swapaxes(jnp.take(table, _index(walk, bias, strip), axis=1), 0, 1)
    rows, width = bias.array.shape[2], walk.problem.block_kv
    sizes = 1, walk.heads, rows, width
    return joined([window(bias.array, start, sizes) for start in _places(walk, strip)], 3)


def _places(walk: Walk, strip: Strip) -> list[tuple[jax.Array | int, ...]]:
    """Where the strip's blocks are in a Spread."""
    last = walk.problem.q_len // walk.problem.block_q - 1
    below = (last - strip.row) * walk.problem.block_q
    return [(0, 0, 0, below + col * walk.problem.block_kv) for col in strip.cols]


def _index(walk: Walk, bias: Buckets, strip: Strip) -> jax.Array:
    """Rows of the table: int32 [b or 1, block_q, w]."""
    block_q, block_kv = walk.problem.block_q, walk.problem.block_kv
    q = window(bias.q_positions, (strip.batch, strip.row * block_q), (walk.batch, block_q))
    parts = [
        window(bias.kv_positions, (strip.batch, col * block_kv), (walk.batch, block_kv))
        for col in strip.cols
    ]
    return bias.index(joined(parts, 1)[:, None, :] - q[:, :, None])


def no_gradient(bias: Lowered) -> jax.Array | None:
    """float32 zeros like the bias's differentiable leaf."""
    return None if bias is None else jnp.zeros(jax.tree.leaves(bias)[0].shape, jnp.float32)


def open_gradient(bias: Ready, total: jax.Array | None) -> jax.Array | None:
    """What the gradient of these heads' bias is gathered in; None if it is not asked for."""
    return jnp.zeros_like(bias.array) if isinstance(bias, Spread) and total is not None else total


def close_gradient(
    bias: Ready, total: jax.Array | None, part: jax.Array | None, head: jax.Array
) -> jax.Array | None:
    """The gradient of the whole bias after these heads."""
    if part is None or not isinstance(bias, Spread):
        return part
    return jax.lax.dynamic_update_slice(total, Spread(part).d_values(), start_of(total, (head,)))


def add_gradient(
    walk: Walk, bias: Ready, strip: Strip, part: jax.Array | None, d_logits: jax.Array
) -> jax.Array | None:
    """part plus the gradient d_logits, float32 [b, h, block_q, w], of this strip's bias."""
    if part is None:
        return None
    if isinstance(bias, Array):
        return walk.add_pairs(part, strip, d_logits)
    if isinstance(bias, Buckets):
        index = jnp.broadcast_to(
            _index(walk, bias, strip), (d_logits.shape[0], *d_logits.shape[2:])
        )
        is_row = index[..., None] == np.arange(part.shape[0], dtype=np.int32)
        sums = jnp.einsum(
            "bqkr,bhqk->rh", is_row.astype(jnp.float32), d_logits, precision="highest"
        )
        return added(part, (0, strip.head), sums)
    width = walk.problem.block_kv
    over_batch = d_logits.sum(0, keepdims=True)
    for i, start in enumerate(_places(walk, strip)):
        part = added(part, start, over_batch[..., i * width : (i + 1) * width])
    return part
