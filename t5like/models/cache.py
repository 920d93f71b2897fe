"""The decoding cache: keys and values of every slot seen so far."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from t5like.models.config import ModelConfig

Cache = dict[str, Any]


def init_cache(
    config: ModelConfig, batch_size: int, max_length: int, encoder_length: int | None = None
) -> Cache:
    """An empty cache for `Transformer.decode_step`, of zeros in the compute dtype.

    Args:
      config: of a model with a decoder.
      batch_size: B.
      max_length: slots S of each row.
      encoder_length: K of the encoder's output; given, cross-attention's keys and values are
        kept by the call that is given `encoded`, and later calls need not compute them again.

    Returns:
      a tree with leaves [B, S or K, N, Dh], or [layers, B, ...] where layers are scanned.
    """

    def keys_and_values(length: int) -> Cache:
        shape = (batch_size, length, config.kv_heads, config.head_dim)
        if config.scan_layers:
            shape = (config.stacks["decoder"], *shape)
        return {name: jnp.zeros(shape, config.dtype) for name in ("key", "value")}

    def layer() -> Cache:
        layer = {"self_attention": keys_and_values(max_length)}
        if encoder_length is not None:
            layer["cross_attention"] = keys_and_values(encoder_length)
        return layer

    if config.scan_layers:
        return {"decoder": {"layers": layer()}}
    return {"decoder": {f"layers_{i}": layer() for i in range(config.stacks["decoder"])}}


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache of a new batch whose row i was row rows[i]: beams reordered or repeated.

    Args:
      cache: of B rows.
      rows: int [B'].

    Returns:
      a cache of B' rows.
    """
    scanned = "layers" in cache["decoder"]
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=int(scanned), mode="clip"), cache)
