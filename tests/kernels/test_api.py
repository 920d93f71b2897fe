"""The attention call itself: the definition against a peer, the choice of a backend, errors."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import RelativeBias, attention, masks
from kernels.block_sparse_attention import api, xla
from tests.kernels.backends import (
    MASKS,
    Shape,
    assert_same,
    draw,
    evaluate,
    fast_jit,
    make_bias,
    mask_cases,
)

BLOCK = 16


@pytest.mark.parametrize("name", MASKS)
def test_the_definition_is_jax_nn_attention(name):
    """On rows that see anything; jax.nn gives a mean of all values to the others."""
    shape = Shape()
    q, k, v = draw(shape, BLOCK)
    q_len, kv_len = shape.lengths(BLOCK)
    bias = make_bias("distances", shape, BLOCK)
    mask = mask_cases(BLOCK, q_len, kv_len)[name]
    visible = mask.dense(q_len, kv_len)
    output, log_sum_exp = attention(
        q, k, v, mask, bias=bias, backend="reference", return_residuals=True
    )
    with jax.default_matmul_precision("highest"):
        expected, expected_residual = jax.nn.dot_product_attention(
            q, k, v, bias.dense(q_len, kv_len), visible, return_residual=True
        )
    sees = np.broadcast_to(visible.any(-1), (shape.batch, shape.heads, q_len)).swapaxes(1, 2)
    np.testing.assert_allclose(np.asarray(output)[sees], np.asarray(expected)[sees], atol=2e-5)
    np.testing.assert_allclose(
        np.asarray(log_sum_exp)[sees], np.asarray(expected_residual)[sees], atol=2e-5
    )


@pytest.mark.parametrize("backend", ["reference", None])
def test_symbolic_mask_equals_its_dense_form(backend):
    shape = Shape()
    q, k, v = draw(shape, BLOCK)
    mask = masks.Causal() & masks.SlidingWindow(left=2)
    dense = masks.Dense(mask.dense(*shape.lengths(BLOCK)))
    outputs = [attention(q, k, v, m, backend=backend) for m in (mask, dense)]
    np.testing.assert_allclose(*outputs, rtol=1e-6, atol=1e-6)


def test_bias_given_as_numpy():
    shape = Shape()
    q, k, v = draw(shape, BLOCK)
    table = np.random.default_rng(0).normal(size=(8, shape.heads)).astype(np.float32)
    output = attention(q, k, v, bias=RelativeBias(table))
    expected = attention(q, k, v, bias=RelativeBias(jnp.asarray(table)))
    np.testing.assert_array_equal(output, expected)
    assert not np.allclose(output, attention(q, k, v), atol=1e-2)


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
        attention(*draw(Shape(), BLOCK), backend="abacus")


@pytest.mark.parametrize(
    "mask, complaint",
    [
        (masks.Segments(np.ones((1, 5), int), np.ones((1, 48), int)), "5 query slots, not 40"),
        (masks.Dense(np.ones((40, 41), bool)), "40 by 41 for 40 queries and 48 keys"),
        (masks.BlockIndex(np.zeros((1, 1, 2, 1), int), 16, 16), r"\[B or 1, H or 1, 3, any\]"),
    ],
)
def test_masks_of_other_lengths_are_named(mask, complaint):
    with pytest.raises(ValueError, match=complaint):
        attention(*draw(Shape(), BLOCK), mask)


@pytest.mark.parametrize("backend", [None, "reference", "tpu"])
@pytest.mark.parametrize(
    "mask, bias, complaint",
    [
        (masks.Segments(np.ones((3, 40), int), np.ones((2, 48), int)), None, "3 batch rows .* 2"),
        (masks.Dense(np.ones((2, 3, 40, 48), bool)), None, "3 heads where q has 4"),
        (masks.BlockIndex(np.zeros((1, 2, 3, 1), int), 16, 16), None, "2 heads where q has 4"),
        (None, np.zeros((40, 48)), "got \\(40, 48\\)"),
        (None, np.zeros((1, 4, 40, 1)), "48\\] for q"),
        (None, np.zeros((1, 2, 1, 48)), "4 or 1"),
        (None, RelativeBias(np.zeros((8, 2))), "table .num_buckets, 4."),
        (None, RelativeBias(np.zeros((8, 4)), np.zeros((2, 39), int)), "q_positions .2 or 1, 40."),
    ],
)
def test_data_of_other_shapes_is_named(backend, mask, bias, complaint):
    with pytest.raises(ValueError, match=complaint):
        attention(*draw(Shape(), BLOCK), mask, bias=bias, backend=backend)


def test_what_is_no_argument_is_named():
    q, k, v = draw(Shape(), BLOCK)
    with pytest.raises(TypeError, match="masks.Dense"):
        attention(q, k, v, jnp.ones((40, 48), bool))
    for sizes in (16, (16,), (16, 0), (16, 1.5)):
        with pytest.raises(ValueError, match="two positive integers"):
            attention(q, k, v, block_sizes=sizes)


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu", "gpu"])
def test_lowest_logits_hide_their_pairs(backend):
    """A row of -inf, one of float32's least number, one of -1e30, and some entries elsewhere."""
    shape = Shape()
    q, k, v = draw(shape, BLOCK)
    q_len, kv_len = shape.lengths(BLOCK)
    values = np.random.default_rng(0).normal(size=(1, 1, q_len, kv_len)).astype(np.float32)
    low = np.random.default_rng(1).random(values.shape) < 0.2
    rows = {3: -np.inf, 18: np.finfo(np.float32).min, 37: -1e30}
    low[:, :, list(rows)] = True
    hidden = np.where(low, -np.inf, values)
    for row, value in rows.items():
        hidden[:, :, row] = value
    sizes = [(BLOCK, BLOCK), None] if backend == "xla" else [(BLOCK, BLOCK)]

    def evaluated(backend, mask, bias, **options):
        call = fast_jit(lambda x, b: evaluate(backend, x, b, mask, **options))
        return call([q, k, v], jnp.asarray(bias))

    expected = evaluated("reference", masks.Dense(~low), values)
    for block_sizes in sizes:
        actual = evaluated(backend, masks.Full(), hidden, block_sizes=block_sizes)
        assert_same(actual, expected, 2e-5)
        assert np.all(np.asarray(actual[0][0])[:, list(rows)] == 0)
        assert np.all(np.asarray(actual[0][1])[:, list(rows)] == -np.inf)


@pytest.mark.parametrize("empty", ["batch", "q_blocks", "kv_blocks"])
def test_nothing_to_attend_to(empty):
    q, k, v = draw(dataclasses.replace(Shape(), **{empty: 0}), BLOCK)
    output, log_sum_exp = attention(q, k, v, masks.Causal(), return_residuals=True)
    assert output.shape == q.shape and np.all(np.asarray(output) == 0)
    assert log_sum_exp.shape == q.shape[:3] and np.all(np.asarray(log_sum_exp) == -np.inf)


@pytest.mark.parametrize("block_sizes", [None, (BLOCK, BLOCK)])
def test_64_bits_elsewhere_leave_attention_alone(block_sizes):
    arrays = draw(Shape(), BLOCK)
    bias = make_bias("distances", Shape(), BLOCK)
    mask, options = masks.Causal(), {"block_sizes": block_sizes, "scale": np.float64(0.25)}
    expected = fast_jit(lambda x: evaluate("xla", x, bias, mask, **options))(arrays)
    with jax.enable_x64(True):
        actual = fast_jit(lambda x: evaluate("xla", x, bias, mask, **options))(arrays)
        with pytest.raises(TypeError, match="q float64"):
            attention(arrays[0].astype(jnp.float64), *arrays[1:])
    assert_same(actual, expected, 1e-6)


def test_a_scale_that_is_learned():
    q, k, v = draw(Shape(), BLOCK)

    def total(scale, backend):
        options = {} if backend == "reference" else {"block_sizes": (BLOCK, BLOCK)}
        return jnp.sin(attention(q, k, v, scale=scale, backend=backend, **options)).sum()

    actual, expected = (
        jax.jit(jax.value_and_grad(total), static_argnums=1)(0.3, name)
        for name in ("xla", "reference")
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert abs(expected[1]) > 1e-2


@pytest.mark.parametrize("wanted", [True, False])
def test_a_gradient_of_the_bias_is_computed_if_asked_for(monkeypatch, wanted):
    asked, original = [], xla.backward

    def backward(*args, with_bias_gradient, **options):
        asked.append(with_bias_gradient)
        return original(*args, with_bias_gradient=with_bias_gradient, **options)

    monkeypatch.setattr(xla, "backward", backward)
    q, k, v = draw(Shape(), BLOCK)

    def total(q, bias):
        options = {"backend": "xla", "block_sizes": (BLOCK, BLOCK)}
        return jnp.sin(attention(q, k, v, masks.Causal(), bias=bias, **options)).sum()

    bias = make_bias("array", Shape(), BLOCK)
    gradient = jax.jit(jax.grad(total, (0, 1) if wanted else (0,)))(q, bias)[0]
    assert asked == [wanted]
    np.testing.assert_allclose(gradient, jax.grad(total)(q, bias), atol=1e-6)


def picked(monkeypatch, platform: str, backend: str | None, refuses: set[str], is_long=True):
    """The backend that served, on a platform where some refuse, and whether it interprets."""
    served = []

    def module(name):
        name = name.rpartition(".")[-1]
        return types.SimpleNamespace(
            name=name, refusal=lambda *_: "it is tired" if name in refuses else None
        )

    monkeypatch.setattr(api, "platform", lambda: platform)
    monkeypatch.setattr(api.importlib, "import_module", module)
    monkeypatch.setattr(
        api.flash,
        "prepare",
        lambda *_, **__: types.SimpleNamespace(**dict.fromkeys(("problem", "bias", "q", "k", "v"))),
    )

    def run(module, prepared, q_len, interpret):
        served.append((module.name, interpret))
        return None, None

    monkeypatch.setattr(api.flash, "run", run)
    attention(*draw(Shape(), 8 * BLOCK if is_long else 1), backend=backend)
    return served[0]


@pytest.mark.parametrize(
    "platform, backend, refuses, served",
    [
        ("cpu", None, set(), ("xla", False)),
        ("tpu", None, set(), ("tpu", False)),
        ("gpu", None, set(), ("gpu", False)),
        ("tpu", None, {"tpu"}, ("xla", False)),
        ("cpu", "tpu", set(), ("tpu", True)),
        ("tpu", "xla", set(), ("xla", False)),
    ],
)
def test_choice_of_backend(monkeypatch, platform, backend, refuses, served):
    name, interpret = picked(monkeypatch, platform, backend, refuses)
    assert name == served[0] and (interpret == served[1] or name == "xla")


def test_short_rows_are_left_to_xla(monkeypatch):
    assert picked(monkeypatch, "tpu", None, set(), is_long=False)[0] == "xla"


def test_a_mesh_outside_shard_map_is_left_to_xla(monkeypatch):
    """No compiler partitions a kernel."""
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert picked(monkeypatch, "tpu", None, set())[0] == "xla"
        with pytest.raises(ValueError, match="axes .'data'. are automatic.*jax.shard_map"):
            picked(monkeypatch, "tpu", "tpu", set())


def test_a_named_backend_serves_or_says_why_not(monkeypatch):
    with pytest.raises(ValueError, match="'tpu' cannot serve this call: it is tired"):
        picked(monkeypatch, "tpu", "tpu", {"tpu"})


def test_the_mesh_in_force_says_where_a_program_runs():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: x + (api.platform() == "cpu"))(0) == 1


def test_the_default_device_says_where_a_program_runs(monkeypatch):
    with jax.default_device(jax.devices("cpu")[0]):
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert api.platform() == "cpu"
    with jax.default_device("cpu"):
        assert api.platform() == "cpu"
    assert api.platform() == "tpu"
