"""Schedules at steps whose values can be worked out by hand."""

import numpy as np
import pytest

from t5like.training import schedules as S


def rates(schedule, total, steps):
    fn = schedule.build(total)
    return [float(fn(step)) for step in steps]


def test_warmup_ends_at_the_peak_and_wastes_no_update():
    got = rates(S.Constant(peak=2.0, warmup=4), 100, [0, 1, 3, 4, 50])
    np.testing.assert_allclose(got, [0.5, 1.0, 2.0, 2.0, 2.0], rtol=1e-6)


def test_inverse_square_root_is_t5s_by_default():
    steps = [0, 9_999, 10_000, 40_000, 1_000_000]
    got = rates(S.InverseSquareRoot(), 10, steps)
    np.testing.assert_allclose(got, [1 / np.sqrt(max(s, 10_000)) for s in steps], rtol=1e-6)


def test_inverse_square_root_may_ramp_up():
    got = rates(S.InverseSquareRoot(peak=1.0, warmup=100, linear_warmup=True), 10, [0, 99, 400])
    np.testing.assert_allclose(got, [0.01, 1.0, 0.5], rtol=1e-6)


def test_cosine():
    got = rates(S.Cosine(peak=1.0, warmup=10, final=0.1), 110, [9, 10, 60, 110, 500])
    np.testing.assert_allclose(got, [1.0, 1.0, 0.55, 0.1, 0.1], rtol=1e-5)


def test_linear():
    got = rates(S.Linear(peak=4.0, warmup=10), 110, [10, 35, 60, 110])
    np.testing.assert_allclose(got, [4.0, 3.0, 2.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("shape, middle", [("linear", 0.5), ("sqrt", 1 - np.sqrt(0.5))])
def test_warmup_stable_decay(shape, middle):
    schedule = S.WarmupStableDecay(peak=1.0, warmup=5, decay=0.2, shape=shape)
    got = rates(schedule, 100, [0, 4, 5, 80, 90, 100])
    np.testing.assert_allclose(got, [0.2, 1.0, 1.0, 1.0, middle, 0.0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "schedule",
    [S.Constant(), S.InverseSquareRoot(), S.Cosine(), S.Linear(), S.WarmupStableDecay()],
)
def test_a_schedule_says_whether_it_depends_on_the_length_of_the_run(schedule):
    steps = range(0, 50, 7)
    changes = rates(schedule, 50, steps) != rates(schedule, 60, steps)
    assert changes == schedule.depends_on_total


@pytest.mark.parametrize("schedule", [S.Cosine, S.Linear, S.WarmupStableDecay])
def test_a_run_shorter_than_its_warmup_still_has_rates(schedule):
    got = rates(schedule(peak=1.0, warmup=100), 20, range(20))
    assert np.isfinite(got).all() and min(got) >= 0 and max(got) > 0
