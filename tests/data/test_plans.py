"""Plans: every step has one track and one batch of it, and counting agrees with enumerating."""

import collections
import dataclasses

import pytest

from t5like.data.mixture import Mixture
from t5like.data.plans import Always, Interleaved, PlannedBatches, Successive, steps_of_parts

TURNS = Interleaved(Mixture((3.0, 1.0), 7), (Always("a"), Always("b")))
PLANS = {
    "always": Always("a"),
    "turns": TURNS,
    "phases": Successive((Always("a"), Always("b")), (40,)),
    "there and back": Successive((Always("a"), Always("b"), Always("a")), (10, 30)),
    "an empty phase": Successive((Always("a"), Always("b"), Always("c")), (20, 20)),
    "turns in phases": Successive((Always("c"), TURNS), (1030,)),
    "phases in turns": Interleaved(
        Mixture((1.0, 1.0), 0), (Successive((Always("a"), Always("b")), (300,)), Always("c"))
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_counts_are_those_of_the_steps_one_by_one(name):
    plan, counts = PLANS[name], collections.Counter()
    for step in range(1100):
        if step % 97 == 0 or step in (1024, 1030):
            assert {t: n for t, n in plan.counts(step).items() if n} == dict(counts)
        counts[plan.at(step)[0]] += 1
        assert plan.at(step)[0] in plan.active(step + 1)


def test_turns_have_exact_rates_and_each_track_counts_from_0():
    for step in (1024, 4096, 7 * 1024):
        assert TURNS.counts(step) == {"a": step * 3 // 4, "b": step // 4}
    drawn = [TURNS.at(step) for step in range(2048)]
    for track, count in (("a", 1536), ("b", 512)):
        assert sorted(n for t, n in drawn if t == track) == list(range(count))
    assert drawn != [TURNS.at(step) for step in range(1024, 3072)]  # the order is shuffled
    assert TURNS.active(5) == ("a", "b")


def test_phases_switch_at_their_ends_and_read_at_the_step_of_the_run():
    plan = PLANS["there and back"]
    assert [plan.at(s) for s in (0, 9, 10, 29, 30, 99)] == [
        ("a", 0), ("a", 9), ("b", 10), ("b", 29), ("a", 30), ("a", 99),
    ]  # fmt: skip
    assert [plan.active(s) for s in (0, 10, 11, 30, 31)] == [
        ("a",), ("a",), ("b",), ("b",), ("a",),
    ]  # fmt: skip
    assert plan.counts(35) == {"a": 15, "b": 20}


def test_renaming_renames_every_track():
    plan = PLANS["phases in turns"].renamed({"a": "x/a", "b": "x/b", "c": "y"})
    assert plan.counts(700) == dict(
        zip(("x/a", "x/b", "y"), PLANS["phases in turns"].counts(700).values(), strict=True)
    )


def test_steps_of_parts_sum_to_the_step():
    mixture = Mixture((0.2, 0.5, 0.3), 1)
    for step in (0, 1, 1023, 1024, 1025, 5000):
        assert sum(steps_of_parts(mixture, step)) == step


def test_planned_batches_ask_the_tracks_pipeline_for_its_own_batch():
    @dataclasses.dataclass
    class Asked:
        name: str

        def batch(self, *arguments):
            return self.name, *arguments

    batches = PlannedBatches({t: Asked(t) for t in "ab"}, TURNS)
    for step in (0, 5, 100):
        assert batches.batch(step, (range(2),)) == (*TURNS.at(step), (range(2),))
