"""The parts that do not mix tokens: dense layers, norms, embeddings, MLPs, dropout."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5like.models.config import ModelConfig
from t5like.models.partitioning import AxisNames, constrain, gathered, named, over_batch

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dot(
    x: jax.Array, kernel: jax.Array, axes: AxisNames, dtype: str, out_dtype: str
) -> jax.Array:
    """x [..., in] times kernel [in, out], with a gradient that suits every backend.

    The kernel's gradient is written as x transposed times the cotangent, accumulated and kept in
    float32. (Left to itself, differentiation writes it the other way round, and XLA's CPU
    backend then transposes the cotangent, recomputing the activation's gradient element by
    element in the slow order: a gated MLP's backward pass takes 1.5 times as long.)

    Args:
      x: [..., in].
      kernel: [in, out], in the parameter dtype.
      axes: names of the kernel's two axes; a kernel in pieces is gathered in `dtype`, and its
        gradient goes back to the pieces.
      dtype: in which both are multiplied.
      out_dtype: of the result.

    Returns:
      [..., out].
    """
    return _product(x, kernel, axes, dtype, out_dtype)


def _product(
    x: jax.Array, kernel: jax.Array, axes: AxisNames, dtype: str, out_dtype: str
) -> jax.Array:
    x, kernel = x.astype(dtype), gathered(kernel.astype(dtype), *axes)
    return jnp.dot(x, kernel, preferred_element_type=jnp.dtype(out_dtype))


def _dot_forward(x: jax.Array, kernel: jax.Array, axes: AxisNames, dtype: str, out_dtype: str):
    # Not `dot` again: a remat policy must see the product itself to know that it may keep it.
    return _product(x, kernel, axes, dtype, out_dtype), (x, kernel)


def _dot_backward(axes: AxisNames, dtype: str, out_dtype: str, residuals, gradient: jax.Array):
    x, kernel = residuals
    gradient, leading = gradient.astype(dtype), tuple(range(x.ndim - 1))
    whole = gathered(kernel.astype(dtype), *axes)
    x_gradient = jnp.einsum("...o,io->...i", gradient, whole)
    kernel_gradient = jax.lax.dot_general(
        x.astype(dtype),
        gradient,
        ((leading, leading), ((), ())),
        preferred_element_type=jnp.float32,
    )
    kernel_gradient = constrain(kernel_gradient, *axes)
    return x_gradient.astype(x.dtype), kernel_gradient.astype(kernel.dtype)


dot.defvjp(_dot_forward, _dot_backward)


class Dense(nn.Module):
    """x [..., in] -> [..., features], with a bias where the config has biases.

    Attributes:
      axes: names of the kernel's axes, see partitioning.py; the bias has the last one.
      init_scale: multiplies the standard deviation of the kernel's initial values.
    """

    config: ModelConfig
    features: int
    axes: AxisNames = ("embed", None)
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        shape = (x.shape[-1], self.features)
        param_dtype = jnp.dtype(config.param_dtype)
        init = named(kernel_init(config, self.init_scale), *self.axes)
        kernel = self.param("kernel", init, shape, param_dtype)
        y = dot(x, kernel, self.axes, config.dtype, config.dtype)
        if config.use_bias:
            zeros = named(nn.initializers.zeros_init(), self.axes[-1])
            bias = self.param("bias", zeros, (self.features,), param_dtype)
            y += gathered(bias.astype(dtype), self.axes[-1])
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
        # Not split: gathering so little costs more than it saves.
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", named(ones, None), width, param_dtype)
        y = x.astype(dtype) * scale.astype(dtype)
        if config.norm == "layernorm" and config.use_bias:
            y += self.param("bias", named(zeros, None), width, param_dtype).astype(dtype)
        return y


class Embed(nn.Module):
    """A table looked up by gathering rows.

    Ids outside [0, rows) read the nearest row: compiled code cannot raise, and a NaN (what
    jnp.take gives by default) would spread through the whole batch. Nothing checks ids on the way
    here; those of a vocabulary are below its size, and so is vocab_size unless it is set smaller.

    Attributes:
      rows, width: of the table.
      axes: names of its axes.
    """

    config: ModelConfig
    rows: int
    width: int
    axes: AxisNames = (None, "embed")

    def setup(self):
        self.embedding = self.param(
            "embedding",
            named(embedding_init(self.config), *self.axes),
            (self.rows, self.width),
            jnp.dtype(self.config.param_dtype),
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [B, L] -> [B, L, width] in the compute dtype."""
        rows = look_up(self.embedding, ids, self.axes, self.config.dtype)
        return constrain(rows, "batch", "length", "width") if rows.ndim == 3 else rows

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> its product with every row, float32 [..., rows]."""
        return dot(x, self.embedding.T, self.axes[::-1], self.config.dtype, "float32")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(table: jax.Array, ids: jax.Array, axes: AxisNames, dtype: str) -> jax.Array:
    """Rows of a table, with a gradient that never gathers activations.

    Args:
      table: [rows, width], in the parameter dtype.
      ids: int [...]; those outside [0, rows) read the nearest row.
      axes: names of the table's axes.
      dtype: of the result.

    Returns:
      [..., width].
    """
    table = gathered(table.astype(dtype), *axes) if over_batch(*axes) else table
    return jnp.take(table, ids, axis=0, mode="clip").astype(dtype)


def _look_up_forward(table: jax.Array, ids: jax.Array, axes: AxisNames, dtype: str):
    return look_up(table, ids, axes, dtype), (table, ids)


def _look_up_backward(axes: AxisNames, dtype: str, residuals, gradient: jax.Array):
    table, ids = residuals
    zeros = jnp.zeros(table.shape, jnp.float32)
    # Each device adds up its own rows of the batch, in float32; their sum goes to the pieces.
    total = zeros.at[jnp.clip(ids, 0, table.shape[0] - 1)].add(gradient.astype(jnp.float32))
    return constrain(gathered(total, *axes), *axes).astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class Mlp(nn.Module):
    """Feed-forward sublayer, plain or gated: [B, L, D] -> [B, L, F] -> [B, L, D]."""

    config: ModelConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        activation = ACTIVATIONS[config.activation]
        if config.gated_mlp:
            gate = activation(self._widen(x, "wi_0"))
            x = gate * self._widen(x, "wi_1")
        else:
            x = activation(self._widen(x, "wi"))
        x = Dropout(config, self.train)(x)
        x = Dense(config, config.d_model, ("mlp", "embed"), name="wo")(x)
        return checkpoint_name(x, "mlp_output")

    def _widen(self, x: jax.Array, name: str) -> jax.Array:
        """[B, L, D] -> [B, L, F], before the activation."""
        x = Dense(self.config, self.config.d_ff, ("embed", "mlp"), name=name)(x)
        return checkpoint_name(constrain(x, "batch", "length", "mlp"), "mlp_hidden")


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
