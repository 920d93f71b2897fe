"""The gradient of one tile's logits, for kernels that sum it in an order of their own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.block_sparse_attention import cost
from kernels.block_sparse_attention.manual import struct
from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.triton.biases import KernelBias
from kernels.block_sparse_attention.triton.softmax import weights_and_gradient
from kernels.block_sparse_attention.triton.tiles import Tile, Tiling, dot


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every kernel here reads, as a pytree of arrays or of refs.

    q, d_out [B, H, Q, Dh]; k, v [B, N, K, Dh]; log2_sum, delta float32 [B, H, Q].
    """

    operands: Any
    bias: KernelBias
    q: Any
    k: Any
    v: Any
    log2_sum: Any
    delta: Any
    d_out: Any


jax.tree_util.register_dataclass(Inputs)


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the kernels here are called."""

    problem: Problem
    tiling: Tiling
    interpret: bool

    def __call__(self, kernel: Callable, grid: tuple[int, int, int], shape: tuple[int, ...], *args):
        inputs = args[-1]
        estimate = cost.d_bias(self.problem, inputs.q, inputs.k, inputs.v)
        call = pl.pallas_call(
            functools.partial(kernel, launch=self),
            grid=grid,
            out_shape=struct(shape, jnp.float32, args),
            compiler_params=self.tiling.params,
            cost_estimate=estimate,
            interpret=self.interpret,
            name="block_sparse_attention_bias" + kernel.__name__,
        )
        return cost.told(call, estimate)(*args)

    def d_logits(self, inputs: Inputs, tile: Tile, flags: jax.Array | None) -> jax.Array:
        """Gradient of a tile's biased logits, float32 as it lies."""
        kv_head = lax.div(tile.head, jnp.int32(inputs.q.shape[1] // inputs.k.shape[1]))
        q, d_out = (x[tile.batch, tile.head, tile.queries, :] for x in (inputs.q, inputs.d_out))
        k, v = (x[tile.batch, kv_head, tile.keys, :] for x in (inputs.k, inputs.v))
        pairs = ((k, q), (v, d_out)) if tile.transposed else ((q, k), (d_out, v))
        _, ds = weights_and_gradient(
            self.problem,
            inputs.operands,
            inputs.bias,
            tile,
            flags,
            *(dot(a, b, (1, 1), self.interpret) for a, b in pairs),
            inputs.log2_sum[tile.batch, tile.head, tile.queries],
            inputs.delta[tile.batch, tile.head, tile.queries],
            self.interpret,
        )
        return ds
