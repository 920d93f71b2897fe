"""Logits of one tile and, for the gradients, what follows from them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.block_sparse_attention.problem import Problem
from kernels.block_sparse_attention.softmax import LOG2_E, scale_is_fused, tanh
from kernels.block_sparse_attention.triton.biases import KernelBias, bias_values
from kernels.block_sparse_attention.triton.tiles import Tile, exp2_of, visible


def logits(
    problem: Problem, bias: KernelBias, tile: Tile, products: jax.Array
) -> tuple[jax.Array, float, jax.Array | None]:
    """Logits from q k^T, as (x, factor, slope).

    exp2(x * factor) is the exponential of the logits: without bias or cap x is the products, and
    the scale costs nothing, for it is part of the multiply-add before exp2. slope is the
    derivative of the logits by those before the cap; None stands for 1.
    """
    if scale_is_fused(problem.scale, problem.soft_cap, bias is not None):
        return products, problem.scale * LOG2_E, None
    x = products * problem.scale
    if bias is not None:
        x += bias_values(bias, tile)
    if problem.soft_cap is None:
        return x, LOG2_E, None
    share = tanh(x, 1 / problem.soft_cap)
    return share * problem.soft_cap, LOG2_E, 1.0 - share * share


def weights_and_gradient(
    problem: Problem,
    operands: Any,
    bias: KernelBias,
    tile: Tile,
    flags: jax.Array | None,
    products: jax.Array,
    d_weights: jax.Array,
    log2_sum: jax.Array,
    delta: jax.Array,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """(p, ds) of a tile, float32 as it lies: softmax weights, gradient of biased logits.

    Args:
      flags: of its entry; None for a full block.
      products: q k^T.
      d_weights: d_out v^T.
      log2_sum, delta: [q].
    """
    x, factor, slope = logits(problem, bias, tile, products)
    p = exp2_of(x, factor, tile.along_q(log2_sum), interpret)
    if flags is not None:
        p = jnp.where(visible(problem, operands, tile, flags), p, 0.0)
    ds = p * (d_weights - tile.along_q(delta))
    return p, ds if slope is None else ds * slope
