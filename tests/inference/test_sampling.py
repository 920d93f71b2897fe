"""Temperature, top-k and top-p against their definitions written out in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from t5like.errors import UserError
from t5like.inference.sampling import (
    GREEDY,
    Sampling,
    choose,
    keep_top_k,
    keep_top_p,
    row_keys,
    warp,
)


def ranked(logits):
    """Token ids from likeliest to least likely; ties by the lower id."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def nucleus(logits, p):
    """The smallest set of likeliest tokens with mass >= p."""
    probabilities = np.exp(logits - logits.max(), dtype=np.float64)
    probabilities /= probabilities.sum()
    kept, mass = set(), 0.0
    for token in ranked(logits):
        if kept and mass >= p:
            break
        kept.add(token)
        mass += probabilities[token]
    return kept


def kept(logits):
    return set(np.flatnonzero(np.isfinite(np.asarray(logits))).tolist())


LOGITS = st.lists(st.integers(-8, 8).map(lambda x: x / 2 + 0.0), min_size=12, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.integers(1, 14))
def test_top_k_keeps_exactly_the_k_first_by_rank(values, k):
    logits = np.array([values], np.float32)
    out = keep_top_k(jnp.asarray(logits), k)
    assert kept(out[0]) == set(ranked(logits[0])[:k])
    np.testing.assert_array_equal(np.asarray(out)[np.isfinite(out)], logits[np.isfinite(out)])


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.sampled_from([0.013, 0.11, 0.37, 0.513, 0.83, 0.937, 0.9993]))
def test_top_p_keeps_the_smallest_set_with_that_mass(values, p):
    logits = np.array([values], np.float32)
    assert kept(keep_top_p(jnp.asarray(logits), p)[0]) == nucleus(logits[0], p)


def test_top_p_stops_exactly_at_p_and_splits_ties_by_id():
    logits = jnp.log(jnp.array([[0.125, 0.25, 0.5, 0.125]]))
    assert kept(keep_top_p(logits, 0.5)[0]) == {2}
    assert kept(keep_top_p(logits, 0.75)[0]) == {1, 2}
    assert kept(keep_top_p(logits, 0.8)[0]) == {0, 1, 2}
    assert kept(keep_top_p(logits, 1e-6)[0]) == {2}


def test_top_p_of_one_keeps_tokens_that_rounding_would_lose():
    logits = jnp.concatenate([jnp.zeros((1, 1)), jnp.full((1, 63), -25.0)], axis=1)
    assert len(kept(keep_top_p(logits, 1.0)[0])) == 64


def test_top_p_is_taken_of_what_temperature_and_top_k_left():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    # Of the two kept by top-k, token 0 has 4/7 < 0.6, so both stay; of all four it would be
    # 0.4 and 0.7. At temperature 1/2 it has 16/25 >= 0.6 and stays alone.
    assert kept(warp(logits, Sampling(top_k=2, top_p=0.6))[0]) == {0, 1}
    assert kept(warp(logits, Sampling(temperature=0.5, top_k=2, top_p=0.6))[0]) == {0}
    assert kept(warp(logits, Sampling(top_k=2, top_p=0.57))[0]) == {0}


def test_rows_are_warped_independently():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 9)), jnp.float32)
    settings_ = Sampling(0.7, top_k=5, top_p=0.8)
    together = warp(logits, settings_)
    for row in range(5):
        np.testing.assert_allclose(together[row], warp(logits[row : row + 1], settings_)[0])


@pytest.mark.parametrize(
    "setting",
    [Sampling(), Sampling(0.5), Sampling(2.0, top_k=4), Sampling(1.3, top_k=5, top_p=0.8)],
)
def test_draws_follow_the_distribution(setting):
    logits = np.array([1.0, 0.2, -0.7, 0.5, 0.0, 1.4], np.float32)
    draws, count = 20_000, 6
    keys = jax.random.split(jax.random.key(3), draws)
    tokens = choose(keys, jnp.broadcast_to(logits, (draws, count)), setting)
    order = ranked(logits)[: setting.top_k or count]
    weights = np.zeros(count)
    weights[order] = np.exp(logits[order] / setting.temperature)
    if setting.top_p is not None:
        left = np.where(weights > 0, logits / setting.temperature, -np.inf)
        weights[list(set(range(count)) - nucleus(left, setting.top_p))] = 0
    expected = draws * weights / weights.sum()
    observed = np.bincount(tokens, minlength=count)
    assert observed[expected == 0].sum() == 0
    live = expected > 0
    chi_square = ((observed - expected)[live] ** 2 / expected[live]).sum()
    # The 99.9% points of chi-square with 5 degrees of freedom (fewer have lower ones).
    assert chi_square < 20.5


def test_greedy_and_tiny_temperatures_take_the_argmax():
    logits = jnp.array([[0.0, 3.0, 2.0], [5.0, 4.999, -jnp.inf]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert choose(keys, logits, GREEDY).tolist() == [1, 0]
    assert choose(keys, logits, Sampling(1e-30)).tolist() == [1, 0]


def test_forbidden_tokens_are_never_drawn():
    logits = jnp.tile(jnp.array([-jnp.inf, 0.0, -jnp.inf, 0.0]), (500, 1))
    keys = jax.random.split(jax.random.key(0), 500)
    assert set(choose(keys, logits, Sampling(5.0, top_k=3, top_p=0.99)).tolist()) == {1, 3}


def test_row_keys_do_not_depend_on_the_batch():
    key = jax.random.key(7)
    rows, samples = jnp.array([4, 0, 4]), jnp.array([1, 0, 0])
    data = jax.random.key_data(row_keys(key, rows, samples))
    alone = jax.random.key_data(row_keys(key, rows[:1], samples[:1]))
    np.testing.assert_array_equal(data[0], alone[0])
    assert len({tuple(row) for row in data.tolist()}) == 3


@pytest.mark.parametrize(
    "bad", [dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_k=0),
            dict(top_p=0.0), dict(top_p=1.5)]
)  # fmt: skip
def test_meaningless_settings_name_themselves(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)
