import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from t5like.data.shuffle import permute

KEYS = st.integers(0, 2**64 - 1)


@given(n=st.integers(1, 3000), key=KEYS)
def test_is_a_bijection_for_every_n(n, key):
    image = permute(np.arange(n), n, key)
    np.testing.assert_array_equal(np.sort(image), np.arange(n))


@settings(max_examples=50)
@given(n=st.integers(1, 2**62), key=KEYS, data=st.data())
def test_scalars_and_arrays_agree_and_stay_inside(n, key, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8, unique=True))
    image = permute(np.array(indices).reshape(1, -1), n, key)
    assert image.shape == (1, len(indices)) and image.dtype == np.int64
    assert [permute(i, n, key) for i in indices] == image[0].tolist()
    assert image.min() >= 0 and image.max() < n
    assert len(set(image[0].tolist())) == len(indices)


def test_keys_give_different_permutations():
    images = [permute(np.arange(1000), 1000, key) for key in (0, 1, 2, 2**63)]
    for i, first in enumerate(images):
        for second in images[:i]:
            assert (first == second).mean() < 0.01  # expected 0.001


@pytest.mark.parametrize("n", [3, 7, 8, 50])
def test_every_place_is_as_likely_over_keys(n):
    keys = 4000
    images = np.array([permute(np.arange(n), n, 7919 * key) for key in range(keys)])
    for index in range(n):
        counts = np.bincount(images[:, index], minlength=n)
        chi_square = ((counts - keys / n) ** 2 / (keys / n)).sum()
        assert chi_square < n - 1 + 5 * np.sqrt(2 * (n - 1))


def test_neighbours_do_not_stay_together():
    n = 100_000
    image = permute(np.arange(n), n, 5)
    assert np.abs(np.diff(image)).mean() == pytest.approx(n / 3, rel=0.02)
    assert abs(np.corrcoef(image, np.arange(n))[0, 1]) < 0.02


@pytest.mark.parametrize("index", [-1, 5, np.array([0, 5])])
def test_an_index_outside_is_refused(index):
    with pytest.raises(ValueError, match="outside"):
        permute(index, 5, 0)
