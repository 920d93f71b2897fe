"""The public attention call: checks shapes, chooses a backend."""

from __future__ import annotations

import importlib

import jax

from kernels.bias import RelativeBias
from kernels.block_sparse_attention import flash, reference, xla
from kernels.masks import Full, Mask

# Loaded when first asked for: a CPU never imports what Pallas needs for a GPU.
_MODULES = {
    "tpu": "kernels.block_sparse_attention.tpu",
    "gpu": "kernels.block_sparse_attention.gpu",
    "xla": "kernels.block_sparse_attention.xla",
}
BACKENDS = ("gpu", "reference", "tpu", "xla")


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
    block_sizes: tuple[int, int] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), grouped-query included.

    Only blocks of the mask in which something is seen are read and computed, forward and
    backward, and nothing of size Q * K is kept for the gradient. Logits, softmax and sums are
    float32 whatever the inputs' dtype. A query that sees no key gives exactly 0 and passes no
    gradient.

    Args:
      q: [B, Q, H, Dh].
      k: [B, K, N, Dh]; H is a multiple of N, and query head h reads kv head h // (H / N)
        (Ainslie et al. 2023).
      v: [B, K, N, Dh].
      mask: who sees whom (kernels/masks); None lets every query see every key.
      bias: added to the scaled logits: [B or 1, H or 1, Q or 1, K], or a RelativeBias.
      scale: multiplies the logits; None means Dh ** -0.5. T5 uses 1.
      logits_soft_cap: c maps a logit x, bias included, to c * tanh(x / c).
      return_residuals: also return the log of the softmax's denominator.
      backend: "tpu" and "gpu" (Pallas kernels; interpreted, so slow, where there is no such
        device), "xla" (any device) or "reference" (the definition, a whole float32 product).
        None chooses the best that can serve on the devices at hand: those of the mesh in force,
        or JAX's default; short rows and decoding steps are left to XLA everywhere.
      block_sizes: slots of a block of queries and of keys; None lets the backend choose. The
        blocks of masks that are made of blocks must be multiples, or blocks are cut smaller.

    Returns:
      [B, Q, H, Dh] of q's dtype; with return_residuals also the log-sum-exp of each query's
      visible logits, float32 [B, Q, H], -inf for a query that sees nothing.

    Raises:
      ValueError: shapes do not fit, the backend is unknown, or the named one cannot serve.
    """
    _check_shapes(q, k, v)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; there are {list(BACKENDS)}")
    mask = Full() if mask is None else mask
    settings = {
        "bias": bias,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "logits_soft_cap": logits_soft_cap,
    }
    if backend == "reference":
        output, log_sum_exp = reference.attention(q, k, v, mask, **settings)
    else:
        settings["block_sizes"] = block_sizes
        output, log_sum_exp = _by_blocks(backend, q, k, v, mask, settings)
    return (output, log_sum_exp) if return_residuals else output


def platform() -> str:
    """Where a program will run: "tpu", "gpu" or "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def _by_blocks(backend, q, k, v, mask: Mask, settings) -> tuple[jax.Array, jax.Array]:
    """The named backend, or the first of those for this platform that can serve."""
    here = platform()
    fast = [here] if here in ("tpu", "gpu") and not xla.is_one_block(q.shape[1], k.shape[1]) else []
    names = [backend] if backend else [*fast, "xla"]
    for name in names:
        module = importlib.import_module(_MODULES[name])
        prepared = flash.prepare(module, q, k, v, mask, **settings)
        call = (prepared.problem, prepared.bias, prepared.q, prepared.k, prepared.v)
        reason = module.refusal(*call)
        if reason is None:
            return flash.run(module, prepared, q.shape[1], interpret=here != name)
        if backend:
            raise ValueError(f"attention backend {name!r} cannot serve this call: {reason}")
    raise AssertionError("the xla backend serves every call")


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"attention wants q [B, Q, H, Dh] and k, v [B, K, N, Dh]; got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"attention wants one batch size and one head size; got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention wants a multiple of k's heads in q; got {shapes}")
