"""The attention call itself: the definition against a peer, the choice of a backend, errors."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import RelativeBias, attention, masks
from kernels.block_sparse_attention import api
from tests.kernels.backends import MASKS, Shape, draw, make_bias, mask_cases

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
    table = np.ones((8, shape.heads), np.float32)
    output = attention(q, k, v, bias=RelativeBias(table))
    np.testing.assert_allclose(output, attention(q, k, v), atol=1e-6)


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


def test_a_named_backend_serves_or_says_why_not(monkeypatch):
    with pytest.raises(ValueError, match="'tpu' cannot serve this call: it is tired"):
        picked(monkeypatch, "tpu", "tpu", {"tpu"})


def test_the_mesh_in_force_says_where_a_program_runs():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert jax.jit(lambda x: x + (api.platform() == "cpu"))(0) == 1
