"""Positions: RoPE, sinusoids, and the module that holds a relative bias table."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import RelativeBias
from t5like.models.config import ModelConfig
from t5like.models.partitioning import named

Rotation = tuple[jax.Array, jax.Array]


def rope_rotation(positions: jax.Array, head_dim: int, base: float) -> Rotation:
    """Cosines and sines of RoPE's angles (Su et al. 2021, equation 15).

    Args:
      positions: int [B, L].
      head_dim: Dh, even.
      base: the frequencies are base ** (-2 i / Dh) for i in 0..Dh/2 - 1.

    Returns:
      (cos, sin), each float32 [B, L, 1, Dh / 2].
    """
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates each pair (i, i + Dh/2) of x [B, L, H, Dh] by its position's angles.

    Pairs lie half a head apart, as in GPT-NeoX and Llama checkpoints (not interleaved).
    """
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """Sinusoidal position encodings (Vaswani et al. 2017, section 3.5), sines then cosines.

    Args:
      positions: int [B, L].
      width: of the encoding; an odd one loses the last cosine.

    Returns:
      float32 [B, L, width].
    """
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[:, :, None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[..., :width]


class RelativePositionBias(nn.Module):
    """Holds the table [buckets, H] of a relative bias and makes the bias of it."""

    config: ModelConfig
    bidirectional: bool

    @nn.compact
    def __call__(
        self, q_positions: jax.Array | None, kv_positions: jax.Array | None
    ) -> RelativeBias:
        """See kernels.RelativeBias for the arguments and the result."""
        config = self.config
        table = self.param(
            "embedding",
            named(nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"), None, "heads"),
            (config.relative_buckets, config.num_heads),
            jnp.dtype(config.param_dtype),
        )
        bidirectional, max_distance = self.bidirectional, config.relative_max_distance
        return RelativeBias(table, q_positions, kv_positions, bidirectional, max_distance)
