"""The parts that do not mix tokens: dense layers, norms, embeddings, MLPs, dropout."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.models.config import ModelConfig

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def kernel_init(config: ModelConfig, scale: float = 1.0) -> nn.initializers.Initializer:
    """Initial values of a kernel [in, out]; `scale` multiplies their standard deviation."""
    if config.initializer == "normal":
        return nn.initializers.truncated_normal(config.initializer_stddev * scale)
    return nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")


def embedding_init(config: ModelConfig) -> nn.initializers.Initializer:
    """Initial values of an embedding [rows, width]."""
    if config.initializer == "normal":
        return nn.initializers.truncated_normal(config.initializer_stddev)
    return nn.initializers.normal(1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(x: jax.Array, kernel: jax.Array, dtype: str, out_dtype: str) -> jax.Array:
    """x [..., in] times kernel [in, out], with a gradient that suits every backend.

    The kernel's gradient is written as x transposed times the cotangent, accumulated and kept in
    float32. (Left to itself, differentiation writes it the other way round, and XLA's CPU
    backend then transposes the cotangent, recomputing the activation's gradient element by
    element in the slow order: a gated MLP's backward pass takes 1.5 times as long.)

    Args:
      x: [..., in].
      kernel: [in, out], in the parameter dtype.
      dtype: in which both are multiplied.
      out_dtype: of the result.

    Returns:
      [..., out].
    """
    return _product(x, kernel, dtype, out_dtype)


def _product(x: jax.Array, kernel: jax.Array, dtype: str, out_dtype: str) -> jax.Array:
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    return jnp.dot(x, kernel, preferred_element_type=jnp.dtype(out_dtype))


def _dot_forward(x: jax.Array, kernel: jax.Array, dtype: str, out_dtype: str):
    # Not `dot` again: a remat policy must see the product itself to know that it may keep it.
    return _product(x, kernel, dtype, out_dtype), (x, kernel)


def _dot_backward(dtype: str, out_dtype: str, residuals, gradient: jax.Array):
    x, kernel = residuals
    gradient, leading = gradient.astype(dtype), tuple(range(x.ndim - 1))
    x_gradient = jnp.einsum("...o,io->...i", gradient, kernel.astype(dtype))
    kernel_gradient = jax.lax.dot_general(
        x.astype(dtype),
        gradient,
        ((leading, leading), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return x_gradient.astype(x.dtype), kernel_gradient.astype(kernel.dtype)


dot.defvjp(_dot_forward, _dot_backward)


class Dense(nn.Module):
    """x [..., in] -> [..., features], with a bias where the config has biases."""

    config: ModelConfig
    features: int
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        shape = (x.shape[-1], self.features)
        kernel = self.param(
            "kernel", kernel_init(config, self.init_scale), shape, jnp.dtype(config.param_dtype)
        )
        y = dot(x, kernel, config.dtype, config.dtype)
        if config.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, (self.features,), jnp.dtype(config.param_dtype))
            y += bias.astype(dtype)
        return y


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis; statistics in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width, param_dtype = x.shape[-1:], jnp.dtype(config.param_dtype)
        x = x.astype(jnp.float32)
        if config.norm == "layernorm":
            x -= x.mean(-1, keepdims=True)
        variance = jnp.square(x).mean(-1, keepdims=True)
        x *= jax.lax.rsqrt(variance + config.norm_epsilon)
        scale = self.param("scale", nn.initializers.ones_init(), width, param_dtype)
        y = x.astype(dtype) * scale.astype(dtype)
        if config.norm == "layernorm" and config.use_bias:
            y += self.param("bias", nn.initializers.zeros_init(), width, param_dtype).astype(dtype)
        return y


class Embed(nn.Module):
    """A table looked up by gathering rows.

    Ids outside [0, rows) read the nearest row: compiled code cannot raise, and a NaN (what
    jnp.take gives by default) would spread through the whole batch. Nothing checks ids on the way
    here; those of a vocabulary are below its size, and so is vocab_size unless it is set smaller.
    """

    config: ModelConfig
    rows: int
    width: int

    def setup(self):
        self.embedding = self.param(
            "embedding",
            embedding_init(self.config),
            (self.rows, self.width),
            jnp.dtype(self.config.param_dtype),
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [B, L] -> [B, L, width] in the compute dtype."""
        rows = jnp.take(self.embedding, ids, axis=0, mode="clip")
        return rows.astype(jnp.dtype(self.config.dtype))

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> its product with every row, float32 [..., rows]."""
        return dot(x, self.embedding.T, self.config.dtype, "float32")


class Mlp(nn.Module):
    """Feed-forward sublayer, plain or gated: [B, L, D] -> [B, L, F] -> [B, L, D]."""

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        activation = ACTIVATIONS[config.activation]
        if config.gated_mlp:
            gate = activation(Dense(config, config.d_ff, name="wi_0")(x))
            x = gate * Dense(config, config.d_ff, name="wi_1")(x)
        else:
            x = activation(Dense(config, config.d_ff, name="wi")(x))
        x = Dropout(config, self.train)(x)
        return Dense(config, config.d_model, name="wo")(x)


class Dropout(nn.Module):
    """Dropout drawn once per example and feature, the same at every position (as T5 does).

    Sharing it along the length makes the random bits negligible; rng collection "dropout".
    """

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rate = self.config.dropout_rate
        return nn.Dropout(rate, broadcast_dims=(1,), deterministic=not self.train)(x)
