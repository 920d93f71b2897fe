import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from t5like.data.mixture import Mixture
from t5like.errors import UserError

RATES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12).map(tuple)


@settings(max_examples=40)
@given(rates=RATES, seed=st.integers(0, 2**32))
def test_each_component_counts_without_a_gap_at_its_rate(rates, seed):
    mixture = Mixture(rates, seed)
    n = 6 * mixture.block_size
    component, k = mixture.locate(0, n)
    for c, rate in enumerate(rates):
        mine = component == c
        np.testing.assert_array_equal(np.sort(k[mine]), np.arange(mine.sum()))
        expected = rate / sum(rates) * np.arange(1, n + 1)
        assert np.abs(np.cumsum(mine) - expected).max() <= mixture.block_size


@given(start=st.integers(0, 5000), size=st.integers(1, 3000))
def test_any_range_agrees_with_the_whole(start, size):
    mixture = Mixture((0.3, 0.7), 1)
    whole = mixture.locate(0, 10_000)
    for part, all_of in zip(mixture.locate(start, start + size), whole, strict=True):
        np.testing.assert_array_equal(part, all_of[start : start + size])


def test_rates_are_exact_in_the_long_run():
    mixture = Mixture((0.1, 0.2, 0.7), 0)
    np.testing.assert_allclose(mixture.given(10**9) / (10**9 * 1024), [0.1, 0.2, 0.7], rtol=1e-11)


def test_a_rare_component_comes_at_last_and_a_zero_rate_never():
    component, _ = Mixture((1.0, 1e-4, 0.0), 0).locate(0, 40 * 1024)
    np.testing.assert_array_equal(np.bincount(component, minlength=3), [40 * 1024 - 4, 4, 0])


def test_the_order_in_a_block_is_shuffled_and_seeded():
    first, second = (Mixture((1.0, 1.0), seed).locate(0, 1024)[0] for seed in (0, 1))
    assert (first != second).any()
    assert 400 < (np.diff(first) != 0).sum() < 624  # sorted would change once, fair draws 512


@pytest.mark.parametrize("rates", [(), (0.0,), (1.0, -1.0), (float("nan"),)])
def test_impossible_rates_are_refused(rates):
    with pytest.raises(UserError, match="rates"):
        Mixture(rates, 0)
