"""The TPU kernels, interpreted, against the definition."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels import RelativeBias, attention, masks
from kernels.block_sparse_attention import flash, tpu
from kernels.block_sparse_attention.tpu import distances, parts, steps
from tests.kernels import backends
from tests.kernels.backends import BackendTests, assert_same, fast_jit


class TestTpu(BackendTests):
    backend = "tpu"

    @pytest.mark.parametrize("mask, kind", [("dense", "distances"), ("causal", "array")])
    def test_blocks_computed_in_parts(self, monkeypatch, mask, kind):
        for name in ("forward", "backward"):
            module = importlib.import_module(f"kernels.block_sparse_attention.tpu.{name}")
            monkeypatch.setattr(module, "CHUNK", 8)
            monkeypatch.setattr(module, "MASKED", 4)
        self.check(mask, bias=kind)

    @pytest.mark.parametrize("shared", [(1, 1), (2, 1), (2, 4)])
    @pytest.mark.parametrize("mask", ["window", "block index"])
    def test_written_out_biases_and_who_shares_them(self, monkeypatch, shared, mask):
        """Rows of the batch, heads, both or none; with one list of blocks, or one a head."""
        sizes = *shared, *self.shape.lengths(self.block)
        bias = jnp.asarray(np.random.default_rng(2).normal(size=sizes), jnp.float32)
        monkeypatch.setattr(backends, "make_bias", lambda *_: bias)
        self.check(mask, bias="given")

    @pytest.mark.parametrize(
        "mask, kind",
        [("segments", "distances"), ("block index", "buckets"), ("block index", "array")],
    )
    def test_lists_larger_than_scalar_memory(self, monkeypatch, mask, kind):
        """By rows of the batch where one row's lists fit, and else by heads."""
        monkeypatch.setattr(parts, "MAX_LIST_BYTES", 80)
        self.check(mask, bias=kind)

    def test_places_that_need_a_word_of_their_own(self, monkeypatch):
        monkeypatch.setattr(steps, "_PLACE_BITS", 1)
        self.check("window")


@pytest.fixture
def detectors(monkeypatch):
    """What the simulator of a TPU knows of races, one of each kernel run."""
    states, make = [], interpret_pallas_call.RaceDetectionState

    def recorded(*args, **kwargs):
        states.append(make(*args, **kwargs))
        return states[-1]

    monkeypatch.setattr(interpret_pallas_call, "RaceDetectionState", recorded)
    return states


def test_no_races_and_nothing_uninitialised_is_read(detectors):
    """In the simulator of a TPU, whose copies are asynchronous and whose memory starts as NaN."""
    x = jax.random.normal(jax.random.key(0), (1, 32, 1, 32))
    bias = RelativeBias(jax.random.normal(jax.random.key(1), (8, 1)), max_distance=20)
    mask = masks.SlidingWindow(10, 2)
    options = {"bias": bias, "scale": 0.2, "logits_soft_cap": None, "block_sizes": (16, 16)}

    @fast_jit
    @jax.value_and_grad
    def simulated(x):
        call = flash.prepare(tpu, x, x, x, mask, **options)
        simulator = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
        return jnp.sin(flash.run(tpu, call, 32, interpret=simulator)[0]).sum()

    @jax.value_and_grad
    def defined(x):
        return jnp.sin(attention(x, x, x, mask, bias=bias, scale=0.2, backend="reference")).sum()

    assert_same(simulated(x), defined(x), 1e-5)
    # Forward, dq with the bias's gradient, dk and dv; each saw accesses to look at.
    assert len(detectors) == 3 and all(state.reads for state in detectors)
    assert not any(state.races_found for state in detectors)


@pytest.mark.parametrize("size, length", [(16, 16), (24, 8), (8, 40)])
def test_a_window_spread_over_diagonals_and_back(size, length):
    window = jnp.arange(size + length, dtype=jnp.float32)[None]
    tile = jax.jit(distances.spread, static_argnums=(1, 2))(window, size, length)
    place = size - 1 - np.arange(size)[:, None] + np.arange(length)[None]
    np.testing.assert_array_equal(tile, place)
    sums = np.bincount(place.ravel(), weights=place.ravel(), minlength=size + length)
    np.testing.assert_allclose(jax.jit(distances.gathered)(tile)[0], sums)


@pytest.mark.parametrize(
    "head_dim, dtype, why",
    [(16, jnp.float32, "head size"), (32, jnp.float16, "dtypes")],
)
def test_refuses(head_dim, dtype, why):
    x = jax.ShapeDtypeStruct((1, 16, 1, head_dim), dtype)
    with pytest.raises(ValueError, match=f"tpu.*cannot serve.*{why}"):
        jax.eval_shape(lambda x: attention(x, x, x, backend="tpu"), x)


def test_refuses_a_list_that_even_alone_does_not_fit():
    x = jax.ShapeDtypeStruct((1, 1 << 13, 1, 32), jnp.float32)
    with pytest.raises(ValueError, match="list of 1048576 bytes"):
        jax.eval_shape(
            lambda x: attention(x, x, x, masks.Full(), backend="tpu", block_sizes=(16, 16)), x
        )
