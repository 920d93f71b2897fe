"""What the backends' softmaxes have in common."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

LOG2_E = math.log2(math.e)
# A logit at or below this hides its pair, whatever the mask says. Running maxima of kernels start
# here: finite, so that hidden logits of -inf get exp2(-inf - LOWEST) = 0 exactly even in a row that
# has seen nothing yet.
LOWEST = -1e30


def scale_is_fused(scale: float, soft_cap: float | None, has_bias: bool = False) -> bool:
    """Whether the scale can wait for the multiply-add before exp2: the products' maximum is then
    the logits'."""
    return scale > 0 and soft_cap is None and not has_bias


def tanh(x: jax.Array, factor: float) -> jax.Array:
    """tanh(x * factor) by exp2, float32: the GPUs' own has 11 bits, too few for a soft cap's
    logits."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * LOG2_E * factor)))
