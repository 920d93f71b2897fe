"""Attention on a mesh: each device computes the queries and heads that it holds.

A Pallas kernel cannot be partitioned by the compiler, and a walk over blocks would be gathered, so
the call is mapped over the mesh by hand: rows of the batch, heads, and queries over the axes that
the rules in force give them ("batch", "heads", "length"; see partitioning.py).

Context parallelism. Where "length" is split, queries stay where they are, and each device gathers
all keys and values of its rows; their gradients are scattered back. A ring, which passes them on
from device to device, moves as many bytes and holds fewer. All the same they are gathered:
  * any mask works at full sparsity: a device makes one list of its active blocks and runs one
    kernel over it, where a ring runs one for each stop, most of them empty under a window, and
    merges softmaxes between them;
  * there are two collectives a layer, of keys and of values, and one kernel after them; a ring
    hides its copies only behind stops that are long enough;
  * keys and values are small: with grouped queries 2 N Dh numbers a slot, against H Dh of queries,
    as many of outputs, and the MLP's hidden states, all of which are split.
The price is memory: 2 B K N Dh numbers, of one layer at a time, for what a gradient needs is kept
in pieces and gathered again. At 8 kv heads of 128 in bfloat16 that is 4 KiB a slot: 0.5 GB at
128k slots, 4 GB at a million, where a ring would be due.

Load. Under a causal mask the last piece of a row sees everything and the first next to nothing, so
that four devices would take 1.75 times as long as their mean. Where the host knows that a mask is
so lopsided, two devices that lie opposite swap half of their queries (and back, the outputs): each
then has one part that sees little and one that sees much, as in a zig-zag order of slots (Striped
Attention, Brandon et al. 2023, reorders whole rows instead), and no one else needs to know of it.
The swap moves B Q H Dh numbers a device in all. Masks whose shape only the run knows, a prefix's
for one, are not balanced.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_policies

from kernels import RelativeBias, attention, masks
from t5like.models.attention_layout import Axes, Layout
from t5like.models.partitioning import devices_of


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: masks.Mask,
    *,
    bias: RelativeBias | None = None,
    **options: Any,
) -> jax.Array:
    """kernels.attention, [B, Q, H, Dh], of what each device of the mesh in force holds.

    Every array of the mask, and of the bias but its table, has the batch first, of size B or 1. An
    axis that does not divide among its devices stays whole, except those of heads.

    Raises:
      UserError: heads do not divide among the devices that "heads" is split over.
    """
    layout = Layout.of(q, k)
    if layout is None:
        return attention(q, k, v, mask, bias=bias, **options)
    swaps = layout.swaps_queries(mask, q.shape[1], k.shape[1])
    batch = q.shape[0]
    leaves, tree = jax.tree.flatten(mask)
    # What the host knows of a mask stays known.
    moving = [not isinstance(x, np.ndarray) or layout.splits_rows(x, batch) for x in leaves]

    def local(q, k, v, moved, bias):
        given = iter(moved)
        whole = [next(given) if m else x for x, m in zip(leaves, moving, strict=True)]
        whole = jax.tree.unflatten(tree, whole)
        return _local(layout, swaps, options, q, k, v, whole, bias)

    moved = [x for x, m in zip(leaves, moving, strict=True) if m]
    of_bias = layout.of_bias(bias, batch)
    return jax.shard_map(
        local,
        in_specs=(*layout.of_arrays, [layout.rows(x, batch) for x in moved], of_bias),
        out_specs=layout.of_arrays[0],
        axis_names=set(layout.manual),
    )(q, k, v, moved, bias)


def _local(layout: Layout, swaps: bool, options, q, k, v, mask: masks.Mask, bias) -> jax.Array:
    """One device's [b, q, h, Dh], from its queries and its piece of keys and values."""
    head, heads = _index(layout.heads), devices_of(layout.heads)
    if layout.heads and not layout.kv_heads:
        first = head * k.shape[2] // heads
        k, v = (jax.lax.dynamic_slice_in_dim(x, first, 1, 2) for x in (k, v))
    here, devices = _index(layout.queries), devices_of(layout.queries)
    swap = Swap(layout.queries)
    positions = None if bias is None else bias.q_positions
    if swaps:
        count, places = 2 * devices, (2 * here, 2 * (devices - 1 - here) + 1)
        queries, positions = swap.halves(q), swap.halves(positions)
    else:
        count, places, queries, positions = devices, (here,), (q,), (positions,)

    def attend(queries, k, v, table) -> list[jax.Array]:
        if layout.keys:
            k, v = _gathered(k, layout.keys), _gathered(v, layout.keys)
        outputs = []
        for q, place, at in zip(queries, places, positions, strict=True):
            own = bias
            if bias is not None:
                start = place * q.shape[1] if count > 1 else None
                own = dataclasses.replace(bias, table=table, q_positions=at, q_start=start)
            part = masks.Part(mask, place, count, head, heads)
            outputs.append(attention(q, k, v, part, bias=own, **options))
        return outputs

    if layout.keys:
        # The gradient wants keys and values once more: it gathers them again, so that of each layer
        # a device keeps its piece.
        names = checkpoint_policies.save_only_these_names("attention_output", "attention_lse")
        attend = jax.checkpoint(attend, policy=names)
    outputs = attend(queries, k, v, None if bias is None else bias.table)
    return swap.joined(*outputs) if swaps else outputs[0]


@dataclasses.dataclass(frozen=True)
class Swap:
    """Devices that lie opposite along some axes hold each other's second halves of rows."""

    axes: Axes

    def halves(self, x: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
        """x [B, L, ..] in halves: this device's first, the opposite one's second."""
        if x is None:
            return None, None
        first, second = jnp.split(x, 2, axis=1)
        return first, self._swapped(second)

    def joined(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """The inverse of `halves`."""
        return jnp.concatenate([first, self._swapped(second)], 1)

    def _swapped(self, x: jax.Array) -> jax.Array:
        last = devices_of(self.axes) - 1
        return jax.lax.ppermute(x, self.axes, [(i, last - i) for i in range(last + 1)])


def _gathered(x: jax.Array, axes: Axes) -> jax.Array:
    """x [B, K / n, N, Dh] whole, [B, K, N, Dh].

    With its heads joined: of heads apart TPUs' compiler adds gradients up whole instead of
    scattering them, which sends twice the bytes.
    """
    joined = x.reshape(*x.shape[:2], -1)
    whole = jax.lax.all_gather(joined, axes, axis=1, tiled=True)
    return whole.reshape(x.shape[0], -1, *x.shape[2:])


def _index(axes: Axes) -> jax.Array | int:
    return jax.lax.axis_index(axes) if axes else 0
