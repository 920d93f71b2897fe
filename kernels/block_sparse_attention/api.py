"""The public attention call: checks shapes, chooses a backend."""

from __future__ import annotations

import jax

from kernels.bias import RelativeBias
from kernels.block_sparse_attention import reference, xla
from kernels.masks import Full, Mask

BACKENDS = {"reference": reference.attention, "xla": xla.attention}


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask | None = None,
    *,
    bias: jax.Array | RelativeBias | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_residuals: bool = False,
    backend: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), grouped-query included.

    Logits, softmax and sums are float32 whatever the inputs' dtype. A query that sees no key
    gives exactly 0 and passes no gradient.

    Args:
      q: [B, Q, H, Dh].
      k: [B, K, N, Dh]; H is a multiple of N, and query head h reads kv head h // (H / N)
        (Ainslie et al. 2023).
      v: [B, K, N, Dh].
      mask: who sees whom (kernels/masks.py); None lets every query see every key.
      bias: added to the scaled logits: [B or 1, H or 1, Q or 1, K], or a RelativeBias.
      scale: multiplies the logits; None means Dh ** -0.5. T5 uses 1.
      logits_soft_cap: c maps a logit x, bias included, to c * tanh(x / c).
      return_residuals: also return the log of the softmax's denominator.
      backend: "xla" or "reference"; None chooses.

    Returns:
      [B, Q, H, Dh] of q's dtype; with return_residuals also the log-sum-exp of each query's
      visible logits, float32 [B, Q, H], -inf for a query that sees nothing.

    Raises:
      ValueError: shapes do not fit, or the backend is unknown.
    """
    _check_shapes(q, k, v)
    name = backend or "xla"
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; there are {sorted(BACKENDS)}")
    output, log_sum_exp = BACKENDS[name](
        q,
        k,
        v,
        Full() if mask is None else mask,
        bias=bias,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        logits_soft_cap=logits_soft_cap,
    )
    return (output, log_sum_exp) if return_residuals else output


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention wants q [B, Q, H, Dh] and k, v [B, K, N, Dh]; got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"attention wants one batch size and one head size; got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention wants a multiple of k's heads in q; got {shapes}")
