"""Budgets, the identity of a run, and peak rates."""

import types

import pytest

from t5like.errors import UserError
from t5like.training import identity, peaks
from t5like.training.budget import Budget


@pytest.mark.parametrize(
    "budget, steps",
    [
        (Budget(steps=20), 20),
        (Budget(tokens=1000), 10),
        (Budget(tokens=1001), 11),
        (Budget(flops=1e6), 20),
        (Budget(steps=15, tokens=1000, flops=1e6), 10),
        (Budget(steps=5, tokens=1e12), 5),
    ],
)
def test_the_first_limit_ends_the_run(budget, steps):
    assert budget.total_steps(lambda n: (100 * n, 5e4 * n)) == steps


def test_a_budget_needs_a_limit_above_zero():
    with pytest.raises(UserError, match="set train.steps, train.tokens or train.flops"):
        Budget().total_steps(lambda n: (n, n))
    with pytest.raises(UserError, match="train.steps=0"):
        Budget(steps=0).total_steps(lambda n: (n, n))


def test_free_bindings_are_split_off_by_name_or_configurable():
    bindings = {"train.steps": "5", "train.steps_more": "1", "Mesh.data": "2", "AdamW.b1": "0.9"}
    kept, free = identity.split(bindings, ["train.steps", "Mesh"])
    assert kept == {"train.steps_more": "1", "AdamW.b1": "0.9"}
    assert free == {"train.steps": "5", "Mesh.data": "2"}


def test_differences_are_named_with_both_values_and_the_mend():
    old, new = {"a.x": "1", "a.y": "2", "a.z": "0"}, {"a.x": "1", "a.y": "3", "b.w": "4"}
    with pytest.raises(UserError) as raised:
        identity.compare(old, new, "runs/one")
    message = str(raised.value)
    for part in (
        "runs/one",
        "a.y was 2 and is now 3",
        "a.z was 0 and is now not set",
        "b.w was not set and is now 4",
        "--workdir",
    ):
        assert part in message
    assert "a.x" not in message
    assert "\n" not in message


def test_long_values_are_shown_where_they_differ():
    old, new = {"a.x": "k" * 500 + "1" + "m" * 500}, {"a.x": "k" * 500 + "2" + "m" * 500}
    with pytest.raises(UserError) as raised:
        identity.compare(old, new, "w")
    assert "k1m" in str(raised.value) and "k2m" in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5 lite", 197e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", None),
        ("TPU v99", None),
        ("cpu", None),
    ],
)
def test_peaks_are_known_or_none(kind, peak):
    assert peaks.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
