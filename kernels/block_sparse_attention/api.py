"""The public attention call: checks shapes, chooses a backend."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from kernels.bias import RelativeBias
from kernels.block_sparse_attention import flash, reference, xla
from kernels.block_sparse_attention.checks import check_bias, check_mask, check_shapes, check_sizes
from kernels.masks import Full, Mask

# Loaded when first asked for: a CPU never imports what Pallas needs for a GPU.
_MODULES = {
    "tpu": "kernels.block_sparse_attention.tpu",
    "gpu": "kernels.block_sparse_attention.gpu",
    "xla": "kernels.block_sparse_attention.xla",
}
BACKENDS = ("gpu", "reference", "tpu", "xla")


class BackendRefusal(ValueError):
    """The backend that a call names cannot serve it."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask | None = None,
    *,
    bias: jax.Array | RelativeBias | None = None,
    scale: float | jax.Array | None = None,
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

    A logit at or below -1e30, as a bias of -inf or of float32's least number makes it, hides its
    pair like the mask does; under a soft cap none is.

    To be called under jax.jit: eager calls lay out the blocks and compile kernels anew each time.
    Calls of several blocks can be differentiated in reverse mode alone, and once.

    Args:
      q: [B, Q, H, Dh].
      k: [B, K, N, Dh]; H is a multiple of N, and query head h reads kv head h // (H / N)
        (Ainslie et al. 2023).
      v: [B, K, N, Dh].
      mask: who sees whom (kernels/masks); None lets every query see every key.
      bias: added to the scaled logits: [B or 1, H or 1, Q or 1, K], or a RelativeBias.
      scale: multiplies the logits; None means Dh ** -0.5. T5 uses 1. An array, [] or of one
        value, as a learned temperature is, multiplies q beforehand, in q's dtype.
      logits_soft_cap: c maps a logit x, bias included, to c * tanh(x / c).
      return_residuals: also return the log of the softmax's denominator.
      backend: "tpu" and "gpu" (Pallas kernels; interpreted, so slow, where there is no such
        device), "xla" (any device) or "reference" (the definition, a whole float32 product).
        None chooses the best that can serve on the devices at hand: those of the mesh in force,
        or JAX's default; short rows and decoding steps are left to XLA everywhere, and so is a
        mesh of several devices outside jax.shard_map.
      block_sizes: slots of a block of queries and of keys; None lets the backend choose. Where
        masks are made of blocks, it is the largest size up to this that divides theirs.

    Returns:
      [B, Q, H, Dh] of q's dtype; with return_residuals also the log-sum-exp of each query's
      visible logits, float32 [B, Q, H], -inf for a query that sees nothing.

    Raises:
      TypeError: the mask is an array, or the arrays are not of 16 or 32 bit floats.
      BackendRefusal: the backend is unknown, or the named one cannot serve.
      ValueError: shapes do not fit.
    """
    check_shapes(q, k, v)
    check_sizes(block_sizes)
    if backend is not None and backend not in BACKENDS:
        known = list(BACKENDS)
        raise BackendRefusal(f"attention backend {backend!r} is unknown; there are {known}")
    mask = Full() if mask is None else mask
    check_mask(mask, q, k)
    check_bias(bias, q, k)
    q, scale = _scaled(q, scale)
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    settings = {"bias": bias, "scale": scale, "logits_soft_cap": cap}
    if 0 in (*q.shape[:2], k.shape[1]):
        output = jnp.zeros_like(q)
        log_sum_exp = jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    elif backend == "reference":
        output, log_sum_exp = reference.attention(q, k, v, mask, **settings)
    else:
        settings["block_sizes"] = block_sizes
        output, log_sum_exp = _by_blocks(backend, q, k, v, mask, settings)
    return (output, log_sum_exp) if return_residuals else output


def platform() -> str:
    """Where a program will run: "tpu", "gpu" or "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def _by_blocks(backend, q, k, v, mask: Mask, settings) -> tuple[jax.Array, jax.Array]:
    """The named backend, or the first of those for this platform that can serve."""
    here, apart = platform(), _is_left_to_the_compiler()
    is_short = xla.is_one_block(q.shape[1], k.shape[1])
    fast = [here] if here in ("tpu", "gpu") and not is_short and not apart else []
    if apart and backend == here:
        raise BackendRefusal(
            f"attention backend {backend!r} cannot serve this call: {apart}; no compiler "
            "partitions a kernel: call attention inside jax.shard_map"
        )
    for name in [backend] if backend else [*fast, "xla"]:
        module = importlib.import_module(_MODULES[name])
        prepared = flash.prepare(module, q, k, v, mask, **settings)
        call = (prepared.problem, prepared.bias, prepared.q, prepared.k, prepared.v)
        reason = module.refusal(*call)
        if reason is None:
            return flash.run(module, prepared, q.shape[1], interpret=here != name)
        if backend:
            raise BackendRefusal(f"attention backend {name!r} cannot serve this call: {reason}")
    raise AssertionError("the xla backend serves every call")


def _is_left_to_the_compiler() -> str | None:
    """What of the mesh in force the compiler is to split arrays over, in a clause."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    axes = [name for name, size, kind in kinds if size > 1 and kind == AxisType.Auto]
    return f"the mesh's axes {axes} are automatic" if axes else None


def _scaled(q: jax.Array, scale: float | jax.Array | None) -> tuple[jax.Array, float]:
    """(q, scale) where the scale is a number known while tracing."""
    if scale is None:
        return q, float(q.shape[-1] ** -0.5)
    if not isinstance(scale, jax.Array):
        return q, float(scale)
    if scale.size != 1:
        raise ValueError(f"attention's scale is one number; got an array {scale.shape}")
    return (q * scale.reshape(()).astype(jnp.float32)).astype(q.dtype), 1.0
