"""The attention sublayer: projections, RoPE, dropout, the decoding cache."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import BackendRefusal, RelativeBias, masks
from t5like.errors import UserError
from t5like.models.config import ModelConfig
from t5like.models.layers import Dense
from t5like.models.partitioning import constrain
from t5like.models.positions import Rotation, rotate
from t5like.models.sharding import sharded_attention


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, to itself or to an encoder's output.

    Kernels are 2-D with heads and head size joined ([D, H * Dh]), as in T5X.
    """

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        source: jax.Array | None,
        mask: masks.Mask,
        *,
        bias: RelativeBias | None = None,
        rotation: Rotation | None = None,
        slots: jax.Array | None = None,
    ) -> jax.Array:
        """One sublayer, without norm and residual.

        Args:
          x: [B, Q, D], where queries come from.
          source: [B, K, D], where keys and values come from; None reads those that collection
            "cache" keeps of an earlier call.
          mask: Q by K, or by the length of the cache where `slots` is given.
          bias: of the logits.
          rotation: RoPE's, for queries and keys alike.
          slots: int [B, Q]; keys and values are first written to these slots of the cache, and
            attention runs over the whole cache.

        Returns:
          [B, Q, D].
        """
        config = self.config
        query_scale = 1.0 if config.scale_attention else config.head_dim**-0.5
        joined = config.num_heads * config.head_dim
        axes = "embed", "heads"
        query = Dense(config, joined, axes, query_scale, name="query")(x)
        query = _by_head(query, config.num_heads, "heads")
        if rotation is not None:
            query = rotate(query, rotation)
        query = checkpoint_name(query, "attention_query")
        key, value = self._keys_values(source, rotation, slots)
        scale = None if config.scale_attention else 1.0
        output = self._attend(query, key, self._dropout(value), mask, bias=bias, scale=scale)
        output = constrain(output, "batch", "length", "heads", None)
        output = output.reshape(*output.shape[:2], joined)
        return Dense(config, config.d_model, ("heads", "embed"), name="out")(output)

    def _attend(self, *arguments: Any, **options: Any) -> jax.Array:
        """kernels.attention; a chosen backend that cannot serve is the user's to know."""
        backend = self.config.attention_backend
        try:
            return sharded_attention(*arguments, backend=backend, **options)
        except BackendRefusal as error:
            raise UserError(f"ModelConfig.attention_backend = {backend!r}: {error}") from error

    def _keys_values(
        self, source: jax.Array | None, rotation: Rotation | None, slots: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, N, Dh], through the cache where there is one."""
        config, cached = self.config, self.has_variable("cache", "key")
        if not cached and (source is None or slots is not None):
            raise ValueError(
                f"{'/'.join(self.path)} finds no keys in collection 'cache': start from "
                "init_cache(...), with encoder_length where `encoded` is not given in every call"
            )
        if source is None:
            return self.get_variable("cache", "key"), self.get_variable("cache", "value")
        joined, axes = config.kv_heads * config.head_dim, ("embed", "kv_heads")
        key, value = (
            _by_head(Dense(config, joined, axes, name=name)(source), config.kv_heads, "kv_heads")
            for name in ("key", "value")
        )
        if rotation is not None:
            key = rotate(key, rotation)
        key = checkpoint_name(key, "attention_key")
        value = checkpoint_name(value, "attention_value")
        if not cached:
            return key, value
        if slots is not None:
            key = _write(self.get_variable("cache", "key"), slots, key)
            value = _write(self.get_variable("cache", "value"), slots, value)
        self.put_variable("cache", "key", key)
        self.put_variable("cache", "value", value)
        return key, value

    def _dropout(self, value: jax.Array) -> jax.Array:
        """Dropout of attention weights, drawn once for all queries as T5 does.

        A weight dropped for every query of a head is that key's value dropped, so it is done on
        the values [B, K, N, Dh], before the kernel, and every backend has it. Query heads that
        share a kv head share the draw.
        """
        rate = self.config.dropout_rate
        return nn.Dropout(rate, broadcast_dims=(3,), deterministic=not self.train)(value)


def _by_head(x: jax.Array, heads: int, axis: str) -> jax.Array:
    """[B, L, heads * Dh] -> [B, L, heads, Dh], whose third axis is called `axis`."""
    return constrain(x.reshape(*x.shape[:2], heads, -1), "batch", "length", axis, None)


def _write(cached: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """Writes new [B, T, N, Dh] to slots [B, T] of cached [B, S, N, Dh]; slots beyond S drop."""
    rows = jnp.arange(cached.shape[0])[:, None]
    return cached.at[rows, slots].set(new.astype(cached.dtype), mode="drop")
