"""The race on a GPU, benchmarks/attention.py, at sizes that a CPU runs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from benchmarks import attention as race, attention_rivals as rivals
from kernels import masks
from kernels.block_sparse_attention import xla
from kernels.block_sparse_attention.count import visible_pairs

CASE = rivals.Case(length=64, head_dim=16, density=0.5, batch=1, heads=2)


@pytest.fixture
def a_race(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    return race.Race(at_least=0.0, tokens=64, width=32)


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="times the interpreted kernels' stand-in"
)
def test_table(tmp_path, capsys):
    page = tmp_path / "table.md"
    sizes = ["--lengths", "256", "--head_dims", "32", "--densities", "1", "0.5"]
    assert race.main([*sizes, "--seconds", "0", "--out", str(page)]) == 0
    assert page.read_text() == capsys.readouterr().out

    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    heads, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = [dict(zip(heads, line, strict=True)) for line in lines]
    # By hand: blocks of 64; 4 on the diagonal show 2,080 pairs each, of 32,896. Half of those are
    # 16,448: two blocks of 4,096 more come nearest, 16,512.
    cases = [("1.000", "F"), ("0.502", "F"), ("1.000", "F+B"), ("0.502", "F+B")]
    assert [(row["density"], row[""]) for row in rows] == cases
    assert [row["TFLOP"] for row in rows[:2]] == ["8.42e-06", "4.23e-06"]  # 4 * 32 * pairs * 2
    for row in rows:
        assert row["ours"] == "ours, XLA"
        filled = ("ms", "TFLOP/s", "speed-up", "efficiency", "XLA, dense, ms")
        assert all(float(row[name]) > 0 for name in filled)
    assert "- tokamax: " in page.read_text() or all(row["tokamax, ms"] for row in rows)


@pytest.mark.parametrize("density", [1, 1 / 2, 1 / 4, 1 / 8])
@pytest.mark.parametrize("length", [256, 2048])
def test_pairs_and_flops(length, density):
    case = rivals.Case(length, 64, density, batch=3, heads=2)
    pairs = visible_pairs(case.mask(), length, length)
    assert case.flops(gradient=False) == 4 * 64 * pairs * 3 * 2
    assert case.flops(gradient=True) == 3.5 * case.flops(gradient=False)
    triangle = length * (length + 1) / 2
    assert case.share == pairs / triangle
    least = np.diag(np.ones(length // case.block)).sum() * case.block * (case.block + 1) / 2
    wanted = max(density * triangle, least)
    assert abs(pairs - wanted) <= case.block**2 / 2


def ours_with(mask, case, gradient):
    """Ours, with a mask of its own."""
    wrong = type("Wrong", (rivals.Case,), {"mask": lambda self: mask})
    return rivals.ours(xla, wrong(**dataclasses.asdict(case)), gradient)


def raising(error, case, gradient):
    raise error


@pytest.mark.parametrize(
    ("make", "why", "failed"),
    [
        (functools.partial(ours_with, masks.Full()), "Mismatch: output is off", True),
        (functools.partial(raising, ValueError()), "ValueError: ", True),
        (functools.partial(raising, rivals.Refusal("no bias")), "Refusal: no bias", False),
    ],
    ids=["wrong", "broken", "refuses"],
)
@pytest.mark.parametrize("name", ["ours, XLA", "a rival"])
def test_who_cannot_be_timed(a_race, make, why, failed, name):
    assert a_race.time(name, make, CASE, gradient=False) is None
    assert a_race.failed == (failed and name != "a rival")
    (note,) = a_race.notes()
    assert note.startswith(f"- {name}: {why}") and note.endswith(f"(64/16/{CASE.share:.3f}/F)")


def test_a_refusal_in_the_trace_is_ours_own_word(a_race, monkeypatch):
    monkeypatch.setattr(xla, "refusal", lambda *call: "too hot")
    assert a_race.time("ours, XLA", functools.partial(rivals.ours, xla), CASE, True) is None
    assert not a_race.failed and "Refusal: too hot" in a_race.notes()[0]


def test_a_dense_rival_that_disagrees_at_full_length(a_race):
    sample = [np.ones((1, 2, 64, 16), np.float32)]
    a_race._check_beside_dense("cuDNN", sample)
    a_race._check_beside_dense("ours, XLA", [sample[0] * 1.01])
    with pytest.raises(race.Mismatch, match="off cuDNN"):
        a_race._check_beside_dense("ours, XLA", [sample[0] * 1.1])
    sample[0][0, 1, 3] = np.nan
    with pytest.raises(race.Mismatch):
        race.compare(sample, [np.ones_like(sample[0])], "")
