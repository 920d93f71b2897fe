"""T5's relative position bias (Raffel et al. 2020, section 2.1), symbolic like the masks.

What kernels add to logits is one of three kinds: `Distances`, a value a distance; `Buckets`,
where positions repeat or jump; and `Array`, any bias written out. `lowered` chooses.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


def relative_position_bucket(
    distance: jax.Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> jax.Array:
    """The bucket of a distance: small distances have their own, larger ones share log-wise.

    Half of the buckets (of each side's, when bidirectional) are exact distances; the others
    cover up to `max_distance` in logarithmic steps, and the last one everything beyond.

    Args:
      distance: int, key position minus query position, any shape; NumPy's is answered in NumPy.
      bidirectional: keys after the query get the upper half of the buckets; when False they all
        fall in bucket 0.
      num_buckets: rows of the table, a positive even number when bidirectional.
      max_distance: distances from here on share the last bucket.

    Returns:
      int32 of distance's shape, in [0, num_buckets).

    Raises:
      ValueError: no bucket is exact, or exact ones alone reach `max_distance`.
    """
    xp = np if isinstance(distance, np.ndarray) else jnp
    side, buckets = xp.zeros_like(distance), num_buckets
    if bidirectional:
        buckets //= 2
        side = xp.where(distance > 0, buckets, 0)
        distance = xp.abs(distance)
    else:
        distance = xp.maximum(-distance, 0)
    exact = buckets // 2
    if not 0 < exact < max_distance:
        raise ValueError(
            f"relative position buckets: {num_buckets} of them hold {exact} exact distances, which "
            f"must be at least 1 and fewer than max_distance = {max_distance}"
        )
    # The added epsilon is part of T5's own float32 formula: boundaries such as 16, 32 and 64
    # fall where its checkpoints were trained to have them.
    ratio = distance.astype(np.float32) / np.float32(exact) + np.finfo(np.float32).eps
    scale = np.float32(np.log(max_distance / exact))
    steps = xp.log(ratio) / scale * np.float32(buckets - exact)
    # As floats: the logarithm of a distance of 0 has no integer.
    far = xp.minimum(exact + xp.trunc(xp.maximum(steps, 0)), buckets - 1)
    return (side + xp.where(distance < exact, distance, far)).astype(np.int32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "q_positions", "kv_positions", "q_start"],
    meta_fields=["bidirectional", "max_distance"],
)
@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """A bias that depends on the distance between query and key, through buckets.

    With `q_positions` and `kv_positions` None, distances are between slots. That holds for packed
    rows too: within a segment whose positions are contiguous the distance of slots is the
    distance of positions, and across segments nothing is visible. The bias is then [1, H, Q, K]
    whatever the batch, and is laid out from Q + K - 1 values without a gather per element.

    Attributes:
      table: float [num_buckets, H].
      q_positions: int [B or 1, Q], or None.
      kv_positions: int [B or 1, K], or None.
      bidirectional: see `relative_position_bucket`.
      max_distance: see `relative_position_bucket`.
      q_start: int32 scalar, the slot of the first query where the queries are a part of a row;
        None: 0. It costs nothing, whether known on the host or not.
    """

    table: jax.Array
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None
    bidirectional: bool = True
    max_distance: int = 128
    q_start: jax.Array | None = None

    def buckets(self, distance: jax.Array) -> jax.Array:
        """Rows of the table for key-minus-query distances of any shape."""
        return relative_position_bucket(
            distance,
            bidirectional=self.bidirectional,
            num_buckets=self.table.shape[0],
            max_distance=self.max_distance,
        )

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        """The bias as an array of the table's dtype, [1, H, Q, K] or [B, H, Q, K]."""
        if self.q_positions is None and self.kv_positions is None:
            return self._between_slots(q_len, kv_len)[None]
        q = self.slots(q_len)[None] if self.q_positions is None else self.q_positions
        kv = jnp.arange(kv_len)[None] if self.kv_positions is None else self.kv_positions
        bucket = self.buckets(kv[:, None, :] - q[:, :, None])  # [B or 1, Q, K]
        return jnp.moveaxis(jnp.asarray(self.table)[bucket], -1, 1)

    def slots(self, q_len: int) -> jax.Array:
        """int32 [Q], of the queries."""
        return jnp.arange(q_len, dtype=jnp.int32) + self.first_slot

    @property
    def first_slot(self) -> jax.Array | int:
        return 0 if self.q_start is None else self.q_start

    def _between_slots(self, q_len: int, kv_len: int) -> jax.Array:
        """[H, Q, K] whose entry (i, j) is the value of the distance of slots i and j.

        A sequence w of period n = Q + K has the value of distance d at w[d mod n].
        """
        period = q_len + kv_len
        distance = (jnp.arange(period) + q_len) % period - q_len  # 0..K-1, then -Q..-1
        values = jnp.asarray(self.table)[self.buckets(distance - self.first_slot)].T  # [H, Q + K]
        return shifted_rows(values, q_len)[:, :, :kv_len]


def shifted_rows(values: jax.Array, rows: int) -> jax.Array:
    """[H, n] -> [H, rows, n - 1] whose entry (i, x) is values[(x - i) mod n].

    A sequence of period n, repeated and cut into rows of n - 1, shifts by one a row. Reshapes
    alone, so the gradient is a sum and no scatter.
    """
    heads, period = values.shape
    repeated = jnp.broadcast_to(values[:, None], (heads, rows, period)).reshape(heads, -1)
    return repeated[:, : rows * (period - 1)].reshape(heads, rows, period - 1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Distances:
    """A bias that depends on the distance of slots.

    Attributes:
      values: [H, Q + K]: values[h, d + Q] is added where the key stands d further in its array
        than the query in its own.
    """

    values: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "q_positions", "kv_positions"],
    meta_fields=["bidirectional", "thresholds"],
)
@dataclasses.dataclass(frozen=True)
class Buckets:
    """A relative position bias between explicit positions, in any order.

    Attributes:
      table: [num_buckets, H].
      q_positions, kv_positions: int32 [B or 1, Q] and [B or 1, K].
      bidirectional: see `relative_position_bucket`.
      thresholds: never falling; a distance falls in the bucket of its side that is the number
        of thresholds up to its absolute value. Sides: keys up to the query from row 0 on; keys
        after it from row num_buckets / 2 on, or row 0 alone when not bidirectional.
    """

    table: jax.Array
    q_positions: jax.Array
    kv_positions: jax.Array
    bidirectional: bool
    thresholds: tuple[int, ...]

    def index(self, distance: jax.Array) -> jax.Array:
        """Rows of the table for distances (key - query), int32 of any shape, without a table."""
        magnitude = jnp.abs(distance) if self.bidirectional else jnp.maximum(-distance, 0)
        bucket = jnp.zeros_like(distance)
        for threshold in self.thresholds:
            bucket += (magnitude >= threshold).astype(jnp.int32)
        if self.bidirectional:
            bucket += jnp.where(distance > 0, self.table.shape[0] // 2, 0)
        return bucket


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Array:
    """Any bias: [B or 1, H or 1, Q or 1, K]."""

    array: jax.Array


Lowered = Distances | Buckets | Array | None


def lowered(
    bias: jax.Array | RelativeBias | None, lengths: tuple[int, int], padded: tuple[int, int]
) -> Lowered:
    """What kernels add to the logits of `lengths` = (Q, K) slots padded to `padded`."""
    if bias is None:
        return None
    more = [p - n for p, n in zip(padded, lengths, strict=True)]
    if isinstance(bias, RelativeBias):
        table = jnp.asarray(bias.table)
        if bias.q_positions is None and bias.kv_positions is None:
            distance = jnp.arange(-padded[0], padded[1]) - bias.first_slot
            return Distances(table[bias.buckets(distance)].T)
        slots = bias.slots(lengths[0]), jnp.arange(lengths[1])
        positions = [
            jnp.pad(n[None] if p is None else p, ((0, 0), (0, m))).astype(jnp.int32)
            for p, n, m in zip((bias.q_positions, bias.kv_positions), slots, more, strict=True)
        ]
        return Buckets(table, *positions, bias.bidirectional, _thresholds(bias))
    widths = [(0, 0), (0, 0), (0, more[0] if bias.shape[2] > 1 else 0), (0, more[1])]
    return Array(jnp.pad(bias, widths) if any(more) else jnp.asarray(bias))


def _thresholds(bias: RelativeBias) -> tuple[int, ...]:
    steps = np.diff(bias.buckets(-np.arange(bias.max_distance + 1)))
    # A distance that skips a bucket is the threshold of both.
    return tuple(int(d) for d in np.repeat(np.arange(1, bias.max_distance + 1), steps))
