"""Attention backends against the float32 reference, on drawn masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from kernels import RelativeBias, attention, masks

BATCH, Q_LEN, KV_LEN, HEAD_DIM, HEADS = 2, 6, 6, 4, 4


def draw_inputs(kv_heads: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q = normal(BATCH, Q_LEN, HEADS, HEAD_DIM)
    k, v = (normal(BATCH, KV_LEN, kv_heads, HEAD_DIM) for _ in range(2))
    return q, k, v, RelativeBias(normal(8, HEADS).astype(jnp.float32), max_distance=6)


def ids(draw):
    rows = st.lists(st.integers(0, 2), min_size=Q_LEN, max_size=Q_LEN)
    return np.array(draw(st.lists(rows, min_size=BATCH, max_size=BATCH)))


@st.composite
def simple_masks(draw):
    kind = draw(st.sampled_from(["causal", "prefix", "segments", "window", "dense", "full"]))
    if kind == "causal":
        return masks.Causal(offset=draw(st.integers(-2, 2)))
    if kind == "prefix":
        return masks.Prefix(ids(draw))
    if kind == "segments":
        return masks.Segments(ids(draw), ids(draw))
    if kind == "window":
        sides = st.none() | st.integers(-1, 3)
        return masks.SlidingWindow(draw(sides), draw(sides))
    if kind == "dense":
        bits = draw(st.integers(0, 2 ** (Q_LEN * KV_LEN) - 1))
        flags = [bits >> i & 1 for i in range(Q_LEN * KV_LEN)]
        return masks.Dense(np.array(flags, bool).reshape(Q_LEN, KV_LEN))
    return masks.Full()


@st.composite
def drawn_masks(draw):
    left, right = draw(simple_masks()), draw(simple_masks())
    join = draw(st.sampled_from(["left", "not", "and", "or"]))
    return {"left": left, "not": ~left, "and": left & right, "or": left | right}[join]


def outputs_and_gradients(backend, inputs, visible, soft_cap, scale):
    """Output, log-sum-exp, and the gradients of a scalar of both."""

    def call(q, k, v, table):
        bias = RelativeBias(table, max_distance=6)
        return attention(
            q,
            k,
            v,
            masks.Dense(visible),
            bias=bias,
            scale=scale,
            logits_soft_cap=soft_cap,
            return_residuals=True,
            backend=backend,
        )

    def scalar(*arrays):
        output, log_sum_exp = call(*arrays)
        finite = jnp.where(jnp.isfinite(log_sum_exp), log_sum_exp, 0.0)
        return jnp.sum(jnp.sin(output)) + jnp.sum(finite**2)

    return call(*inputs), jax.grad(scalar, argnums=(0, 1, 2, 3))(*inputs)


both_jitted = {
    backend: jax.jit(
        lambda inputs, visible, soft_cap, scale, backend=backend: outputs_and_gradients(
            backend, inputs, visible, soft_cap, scale
        ),
        static_argnums=(2, 3),
        compiler_options={"xla_backend_optimization_level": 0},  # compiling is most of the test
    )
    for backend in ("reference", "xla")
}


@given(
    mask=drawn_masks(),
    kv_heads=st.sampled_from([1, 2, 4]),
    soft_cap_and_scale=st.sampled_from([(None, None), (2.0, 1.0)]),
)
@settings(max_examples=40, deadline=None)
def test_backends_agree_with_the_reference(mask, kv_heads, soft_cap_and_scale):
    q, k, v, bias = draw_inputs(kv_heads)
    visible = jnp.broadcast_to(mask.dense(Q_LEN, KV_LEN), (BATCH, Q_LEN, KV_LEN))
    results = [
        both_jitted[backend]((q, k, v, bias.table), visible, *soft_cap_and_scale)
        for backend in ("reference", "xla")
    ]
    for expected, actual in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)
    (output, log_sum_exp), (q_gradient, *others) = results[1]
    blind = ~np.asarray(visible).any(-1)
    assert np.all(np.asarray(output)[blind] == 0)
    assert np.all(np.asarray(log_sum_exp)[blind] == -np.inf)
    assert np.all(np.asarray(q_gradient)[blind] == 0)
    assert all(np.isfinite(gradient).all() for gradient in others)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_symbolic_mask_equals_its_dense_form(backend):
    q, k, v, bias = draw_inputs(2)
    mask = masks.Causal() & masks.SlidingWindow(left=2)
    dense = masks.Dense(mask.dense(Q_LEN, KV_LEN))
    outputs = [attention(q, k, v, m, bias=bias, backend=backend) for m in (mask, dense)]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("shape", [(1, 1, 1, 6), (1, 4, 6, 6), (2, 1, 6, 6), (2, 4, 1, 6)])
def test_bias_broadcasts(shape):
    q, k, v, _ = draw_inputs(2)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def scalar(bias, backend):
        return jnp.sin(attention(q, k, v, masks.Causal(), bias=bias, backend=backend)).sum()

    results = [jax.value_and_grad(scalar)(bias, backend) for backend in ("reference", "xla")]
    for expected, actual in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_inputs_accumulate_in_float32():
    q, k, v, bias = draw_inputs(2, jnp.bfloat16)
    output = attention(q, k, v, masks.Causal(), bias=bias)
    expected = attention(q, k, v, masks.Causal(), bias=bias, backend="reference")
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        output.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2, atol=2e-2
    )


def test_large_logits_do_not_overflow():
    q, k, v, _ = draw_inputs(4)
    output = attention(q * 1e4, k * 1e4, v, masks.Causal())
    assert np.isfinite(output).all()
    np.testing.assert_allclose(output[:, 0], v[:, 0], rtol=1e-6)


@pytest.mark.parametrize(
    "shapes, complaint",
    [
        (((2, 3, 4, 8), (2, 3, 3, 8), (2, 3, 3, 8)), "multiple of k's heads"),
        (((2, 3, 4, 8), (2, 3, 4, 4), (2, 3, 4, 4)), "one head size"),
        (((2, 3, 4, 8), (2, 3, 4, 8), (2, 5, 4, 8)), "k, v"),
    ],
)
def test_bad_shapes_are_named(shapes, complaint):
    with pytest.raises(ValueError, match=complaint):
        attention(*(jnp.zeros(shape) for shape in shapes))


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'abacus'"):
        attention(*draw_inputs(4)[:3], backend="abacus")
