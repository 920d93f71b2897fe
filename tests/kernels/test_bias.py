"""T5's relative position buckets against known values and a transcription of the definition."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import RelativeBias, relative_position_bucket
from kernels.bias import lowered


def bucket_by_definition(distance: int, bidirectional: bool, num: int, max_distance: int) -> int:
    """One distance (key minus query) at a time, in exact integer comparisons.

    Bucket exact + s holds n with exact * r ** s <= n < exact * r ** (s + 1), where r is the
    ratio (max_distance / exact) ** (1 / (buckets - exact)): so s is the largest with
    exact ** S * (max_distance / exact) ** s <= n ** S in units of S = buckets - exact.
    """
    base = 0
    if bidirectional:
        num //= 2
        base = num if distance > 0 else 0
        n = abs(distance)
    else:
        n = max(-distance, 0)
    exact = num // 2
    if n < exact:
        return base + n
    steps = num - exact
    s = max(s for s in range(steps + 1) if n**steps * exact**s >= exact**steps * max_distance**s)
    return base + min(exact + s, num - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num, max_distance", [(32, 128), (32, 20), (12, 20), (64, 256)])
def test_definition(bidirectional, num, max_distance):
    distance = np.arange(-400, 401)
    actual = relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=num, max_distance=max_distance
    )
    expected = [bucket_by_definition(int(d), bidirectional, num, max_distance) for d in distance]
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == jnp.int32


def test_known_values():
    """T5's own settings: the first distance of each bucket of 8, 11.3, 16, 22.6, 32, ..."""
    bidirectional = relative_position_bucket(
        np.array([-128, -91, -90, -64, -16, -11, -8, -7, -1, 0, 1, 7, 8, 12, 16, 127, 5000]),
        bidirectional=True,
        num_buckets=32,
        max_distance=128,
    )
    assert bidirectional.tolist() == [15, 15, 14, 14, 10, 8, 8, 7, 1, 0, 17, 23, 24, 25, 26, 31, 31]
    causal = relative_position_bucket(
        np.array([-113, -112, -32, -19, -18, -16, -15, 0, 1, 99]),
        bidirectional=False,
        num_buckets=32,
        max_distance=128,
    )
    assert causal.tolist() == [31, 30, 21, 17, 16, 16, 15, 0, 0, 0]
    assert math.ceil(8 * 16 ** (1 / 8)) == 12


@pytest.mark.parametrize(
    "num_buckets, max_distance, bidirectional",
    [(8, 4, False), (8, 2, True), (32, 16, False), (2, 9, True)],
)
def test_exact_buckets_end_before_the_largest_distance(num_buckets, max_distance, bidirectional):
    bias = RelativeBias(
        jnp.zeros((num_buckets, 1)), bidirectional=bidirectional, max_distance=max_distance
    )
    with pytest.raises(ValueError, match=f"max_distance = {max_distance}"):
        bias.dense(4, 4)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 9), (9, 1), (7, 7), (5, 12), (12, 5)])
def test_slots_equal_explicit_positions(bidirectional, q_len, kv_len):
    """Values and the table's gradient, laid out from distances or gathered one by one."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    weights = jnp.arange(q_len * kv_len, dtype=jnp.float32).reshape(q_len, kv_len)

    @functools.partial(jax.jit, static_argnums=1)
    def dense_and_gradient(table, explicit):
        positions = (jnp.arange(q_len)[None], jnp.arange(kv_len)[None]) if explicit else ()

        def weighted(table):
            bias = RelativeBias(table, *positions, bidirectional=bidirectional, max_distance=10)
            dense = bias.dense(q_len, kv_len)
            return (dense * weights).sum(), dense

        gradient, dense = jax.grad(weighted, has_aux=True)(table)
        return dense, gradient

    dense, gradient = dense_and_gradient(table, False)
    expected, expected_gradient = dense_and_gradient(table, True)
    assert dense.shape == (1, 3, q_len, kv_len)
    np.testing.assert_array_equal(dense, expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5)


def test_rows_of_positions():
    table = jnp.arange(8.0)[:, None]
    q = jnp.array([[3], [0]])
    bias = RelativeBias(table, q, None, bidirectional=False, max_distance=8)
    np.testing.assert_array_equal(bias.dense(1, 5)[:, 0, 0], [[3, 2, 1, 0, 0], [0, 0, 0, 0, 0]])


def test_queries_that_start_later():
    """Their bias is the last rows' of all."""
    table, start = jnp.arange(16.0).reshape(8, 2), jnp.int32(5)
    bias = RelativeBias(table, max_distance=6)
    part = dataclasses.replace(bias, q_start=start)
    np.testing.assert_array_equal(part.dense(3, 9), bias.dense(8, 9)[:, :, 5:])
    positions = jnp.arange(9)[None]
    part = dataclasses.replace(part, kv_positions=positions)
    np.testing.assert_array_equal(part.dense(3, 9), bias.dense(8, 9)[:, :, 5:])
    distances = lowered(bias, (8, 9), (8, 9)).values
    shifted = lowered(dataclasses.replace(bias, q_start=start), (3, 9), (3, 9)).values
    np.testing.assert_array_equal(shifted, distances[:, :12])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 6), (12, 20)])
def test_thresholds_find_the_same_buckets(bidirectional, num_buckets, max_distance):
    """Where a distance skips a bucket too, as 5 does for 8 buckets up to 6."""
    bias = RelativeBias(
        jnp.zeros((num_buckets, 1)),
        jnp.zeros((1, 1), int),
        bidirectional=bidirectional,
        max_distance=max_distance,
    )
    distance = jnp.arange(-200, 201)
    buckets = lowered(bias, (1, 4), (1, 4))
    np.testing.assert_array_equal(buckets.index(distance), bias.buckets(distance))
