"""What all backends that work by blocks share: padding, the lists of blocks, and the gradient.

The gradient recomputes each active block from the log-sum-exp of its rows, so that nothing of
size Q * K is kept (FlashAttention, Dao et al. 2022, algorithm 4; Dao 2023, section 3.1).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from kernels.bias import Lowered, RelativeBias, lowered
from kernels.block_sparse_attention.blocks import lists
from kernels.block_sparse_attention.grids import grid_of
from kernels.block_sparse_attention.manual import varying_alike
from kernels.block_sparse_attention.problem import Problem
from kernels.masks import Mask

# Log-sum-exp of a row that sees nothing, in the gradient: exp(logit - this) is 0, not NaN.
NOTHING_SEEN = 1e30


class Backend(Protocol):
    """A module that computes a Problem; heads come first.

    One that prefers JAX's own differentiation for some problems also has
    `differentiates_itself(problem) -> bool` and `attention(problem, bias, q, k, v) -> (out, lse)`.

    Shapes: q, out and d_out [B, H, Q, Dh]; k and v [B, N, K, Dh]; lse and delta float32 [B, H, Q].
    """

    def block_sizes(
        self, q_len: int, kv_len: int, head_dim: int, dtype: jnp.dtype
    ) -> tuple[int, int]:
        """The blocks it likes best, (block_q, block_kv)."""

    def refusal(
        self, problem: Problem, bias: Lowered, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> str | None:
        """Why it cannot serve, in a clause; None if it can."""

    def forward(
        self,
        problem: Problem,
        bias: Lowered,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        interpret: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """(out, lse); 0 and -inf where a query sees nothing."""

    def backward(
        self,
        problem: Problem,
        bias: Lowered,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        out: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        d_out: jax.Array,
        *,
        interpret: bool,
        with_bias_gradient: bool,
    ) -> tuple[Lowered, jax.Array, jax.Array, jax.Array]:
        """(d_bias, dq, dk, dv); d_bias is not read without with_bias_gradient.

        With p = exp(logits - lse), the gradient of the logits is p * (d_out v^T - delta); lse is
        NOTHING_SEEN where a query sees nothing.
        """


def make_problem(
    mask: Mask,
    q_len: int,
    kv_len: int,
    sizes: tuple[int, int],
    *,
    scale: float,
    soft_cap: float | None,
) -> Problem:
    """The mask's active blocks of at most `sizes`, over lengths padded to whole blocks."""
    grid = grid_of(mask, q_len, kv_len, sizes)
    choices, index = mask.choices()
    known = [grid_of(choice, q_len, kv_len, sizes) for choice in choices] if choices[1:] else [grid]
    by_row, by_col = lists(grid, known, index)
    build = grid.build
    return Problem(
        by_row=by_row,
        by_col=by_col,
        query=tuple(build.queries),
        key=tuple(build.keys),
        pair=tuple(build.pairs),
        expression=grid.expr,
        q_len=build.q_len,
        kv_len=build.kv_len,
        block_q=grid.block_q,
        block_kv=grid.block_kv,
        scale=scale,
        soft_cap=soft_cap,
    )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A call ready for a backend: its problem, and padded arrays with their heads first."""

    problem: Problem
    bias: Lowered
    q: jax.Array
    k: jax.Array
    v: jax.Array


def prepare(
    backend: Backend,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    *,
    bias: jax.Array | RelativeBias | None,
    scale: float,
    logits_soft_cap: float | None,
    block_sizes: tuple[int, int] | None,
) -> Prepared:
    """Lays a call of kernels.attention out for a backend."""
    q_len, kv_len = q.shape[1], k.shape[1]
    sizes = block_sizes or backend.block_sizes(q_len, kv_len, q.shape[-1], q.dtype)
    problem = make_problem(mask, q_len, kv_len, sizes, scale=scale, soft_cap=logits_soft_cap)
    padded = problem.q_len, problem.kv_len
    q = _zeros_after(jnp.swapaxes(q, 1, 2), padded[0])
    k, v = (_zeros_after(jnp.swapaxes(x, 1, 2), padded[1]) for x in (k, v))
    return Prepared(problem, lowered(bias, (q_len, kv_len), padded), q, k, v)


def run(
    backend: Backend, prepared: Prepared, q_len: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """(output [B, Q, H, Dh], log-sum-exp [B, Q, H]) of a prepared call."""
    call = (prepared.problem, prepared.bias, prepared.q, prepared.k, prepared.v)
    if getattr(backend, "differentiates_itself", lambda problem: False)(prepared.problem):
        out, lse = _named(*backend.attention(*call))
    else:
        out, lse = _recomputed(backend, prepared, interpret)
    return jnp.swapaxes(out[:, :, :q_len], 1, 2), jnp.swapaxes(lse[:, :, :q_len], 1, 2)


def _recomputed(
    backend: Backend, prepared: Prepared, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) whose gradient computes each active block once more."""
    leaves, tree = jax.tree.flatten((prepared.problem, prepared.bias))
    split = [_Kind.of(leaf) for leaf in leaves]
    floats = [x for x, kind in zip(leaves, split, strict=True) if kind == _Kind.FLOAT]
    integers = [x for x, kind in zip(leaves, split, strict=True) if kind == _Kind.INTEGER]
    known = [x if kind == _Kind.HOST else None for x, kind in zip(leaves, split, strict=True)]
    call = _Call(backend, interpret, tree, tuple(split), known)
    arrays = varying_alike(integers, floats, prepared.q, prepared.k, prepared.v)
    return _attention(call, *arrays)


class _Kind:
    """How a leaf of a problem passes through differentiation."""

    HOST, INTEGER, FLOAT = "host", "integer", "float"

    @staticmethod
    def of(leaf: Any) -> str:
        if isinstance(leaf, np.ndarray):
            return _Kind.HOST
        return _Kind.FLOAT if jnp.issubdtype(leaf.dtype, jnp.floating) else _Kind.INTEGER


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """What of a call is known while tracing. Host arrays stay host arrays: backends may plan by
    them, where an argument of a custom_vjp would have become a tracer."""

    backend: Backend
    interpret: bool
    tree: jax.tree_util.PyTreeDef
    split: tuple[str, ...]
    known: list[np.ndarray | None]

    def restore(
        self, integers: list[jax.Array], floats: list[jax.Array]
    ) -> tuple[Problem, Lowered]:
        sources = {
            _Kind.HOST: iter(x for x in self.known if x is not None),
            _Kind.INTEGER: iter(integers),
            _Kind.FLOAT: iter(floats),
        }
        return jax.tree.unflatten(self.tree, [next(sources[kind]) for kind in self.split])


# What `_forward` saves of a bias that is not differentiated, and of one that is: trees without a
# leaf, for whether the gradient is asked for is known while tracing.
_NO_BIAS_GRADIENT, _BIAS_GRADIENT = None, ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    call: _Call,
    integers: list[jax.Array],
    floats: list[jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    problem, bias = call.restore(integers, floats)
    return call.backend.forward(problem, bias, q, k, v, interpret=call.interpret)


def _forward(call: _Call, integers, floats, q, k, v):
    """Arguments come as `jax.custom_derivatives.CustomVJPPrimal`s."""
    wanted = _BIAS_GRADIENT if any(x.perturbed for x in floats) else _NO_BIAS_GRADIENT
    arguments = jax.tree.map(lambda x: x.value, (integers, floats, q, k, v))
    out, lse = _named(*_attention(call, *arguments))
    return (out, lse), (*arguments, out, lse, wanted)


def _named(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Named for policies of jax.checkpoint: with both kept, nothing runs the forward again."""
    return checkpoint_name(out, "attention_output"), checkpoint_name(lse, "attention_lse")


def _backward(call: _Call, saved, cotangents):
    integers, floats, q, k, v, out, lse, wanted = saved
    d_out, d_lse = (
        jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents
    )
    seen = jnp.isfinite(lse)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    delta -= jnp.where(seen, d_lse, 0.0)
    lse = jnp.where(seen, lse, NOTHING_SEEN)
    problem, bias = call.restore(integers, floats)
    options = {"interpret": call.interpret, "with_bias_gradient": wanted is not _NO_BIAS_GRADIENT}
    d_bias, *gradients = call.backend.backward(
        problem, bias, q, k, v, out, lse, delta, d_out, **options
    )
    d_floats = None
    if options["with_bias_gradient"]:
        # The one floating leaf of a bias is its first.
        d_floats = [jax.tree.leaves(d_bias)[0].astype(x.dtype) for x in floats]
    return None, d_floats, *(d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True))


_attention.defvjp(_forward, _backward, symbolic_zeros=True)


def _zeros_after(x: jax.Array, length: int) -> jax.Array:
    """x [B, H, L, Dh] padded to `length` slots."""
    missing = length - x.shape[2]
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else x
