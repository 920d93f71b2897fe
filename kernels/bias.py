"""T5's relative position bias (Raffel et al. 2020, section 2.1), symbolic like the masks."""

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
      distance: int, key position minus query position, any shape.
      bidirectional: keys after the query get the upper half of the buckets; when False they all
        fall in bucket 0.
      num_buckets: rows of the table, a positive even number when bidirectional.
      max_distance: distances from here on share the last bucket.

    Returns:
      int32 of distance's shape, in [0, num_buckets).
    """
    side, buckets = jnp.zeros_like(distance), num_buckets
    if bidirectional:
        buckets //= 2
        side = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    # The added epsilon is part of T5's own float32 formula: boundaries such as 16, 32 and 64
    # fall where its checkpoints were trained to have them.
    ratio = distance.astype(jnp.float32) / exact + np.finfo(np.float32).eps
    steps = jnp.log(ratio) / np.log(max_distance / exact) * (buckets - exact)
    far = jnp.minimum(exact + steps.astype(jnp.int32), buckets - 1)
    return (side + jnp.where(distance < exact, distance, far)).astype(jnp.int32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table", "q_positions", "kv_positions"],
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
    """

    table: jax.Array
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None
    bidirectional: bool = True
    max_distance: int = 128

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
        q = jnp.arange(q_len)[None] if self.q_positions is None else self.q_positions
        kv = jnp.arange(kv_len)[None] if self.kv_positions is None else self.kv_positions
        bucket = self.buckets(kv[:, None, :] - q[:, :, None])  # [B or 1, Q, K]
        return jnp.moveaxis(self.table[bucket], -1, 1)

    def _between_slots(self, q_len: int, kv_len: int) -> jax.Array:
        """[H, Q, K] whose entry (i, j) is the value of distance j - i.

        A sequence w of period n = Q + K, with w[d mod n] the value of distance d, repeated Q
        times and cut into rows of n - 1 shifts by one a row: row i holds w[(j - i) mod n].
        Reshapes alone, so the gradient is a sum and no scatter over Q * K.
        """
        period = q_len + kv_len
        distance = (jnp.arange(period) + q_len) % period - q_len  # 0..K-1, then -Q..-1
        values = self.table[self.buckets(distance)].T  # [H, Q + K]
        heads = values.shape[0]
        rows = jnp.broadcast_to(values[:, None], (heads, q_len, period)).reshape(heads, -1)
        rows = rows[:, : q_len * (period - 1)].reshape(heads, q_len, period - 1)
        return rows[:, :, :kv_len]
