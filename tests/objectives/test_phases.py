"""Phases: where they switch, and that they read on where the phase before them stopped."""

from __future__ import annotations

import pytest

from objectives.causal_lm import CausalLM
from objectives.mixture import Mixture
from objectives.mlm import MaskedLM
from objectives.phases import Phases
from objectives.prefix_lm import PrefixLM
from t5like.data.pipeline import Component, Pipeline
from t5like.errors import UserError
from t5like.training.schedules import WarmupStableDecay
from tests.data.tiny import MemoryCorpus

BIPHASIC = Phases(phases=[CausalLM(), MaskedLM()], until=[0.25])


@pytest.fixture
def decoder(setting):
    return setting("decoder")


@pytest.mark.parametrize(
    "until, total, end",
    [
        (0.25, 100, 25),
        (0.25, 42_000, 10_500),
        (0.25, 7, 1),
        (0.5, 7, 3),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in binary
        (0.1, 5, 0),
        (40, 100, 40),
        (40, 30, 40),
    ],
)
def test_the_switch_is_at_floor_of_the_fraction_or_at_the_step(decoder, until, total, end):
    phases = Phases(phases=[CausalLM(), MaskedLM()], until=[until]).bind(decoder)
    plan = phases.plan(total, seed=0)
    assert phases.ends(total) == (end,)
    tracks = [plan.at(step) for step in range(total)]
    switch = min(end, total)
    assert tracks == [("CausalLM" if step < switch else "MaskedLM", step) for step in range(total)]
    assert plan.counts(total) == {"CausalLM": switch, "MaskedLM": total - switch}


def test_the_learning_rate_at_the_switch_is_the_peak_and_decays_once_at_the_end(decoder):
    """Of the paper's run: 2,000 steps up, 38,000 level, 2,000 down."""
    for until in (0.25, 0.5, 0.75):
        phases = Phases(phases=[CausalLM(), MaskedLM()], until=[until]).bind(decoder)
        [switch] = phases.ends(42_000)
        rate = WarmupStableDecay(peak=5e-4, warmup=2000, decay=2000 / 42_000).build(42_000)
        for step in (switch - 1, switch, switch + 1):
            assert float(rate(step)) == pytest.approx(5e-4)
        assert float(rate(41_999)) < 1e-6


def windows(pipeline, steps):
    """The windows that batches of 4 rows read, no two of the corpus being alike."""
    examples = (4 * step + row for step in steps for row in range(4))
    return {tuple(next(pipeline.examples(index)).record.tokens.tolist()) for index in examples}


def test_the_second_phase_reads_on_where_the_first_stopped(decoder):
    """Within an epoch no window comes twice."""
    corpus = MemoryCorpus([40] * 160)
    bound = BIPHASIC.bind(decoder)
    orders = bound.reading_orders()
    assert len(set(orders.values())) == 1 and orders.keys() == bound.tracks().keys()
    read = []
    steps = len(corpus.offsets) * 41 // 64 // 4
    plan = bound.plan(steps, seed=0)
    for track, objective in bound.tracks().items():
        pipeline = Pipeline(
            [Component(track, corpus, objective, order=orders[track])],
            vocabulary=decoder.vocabulary, architecture="decoder", length=64, batch_size=4, seed=0,
        )  # fmt: skip
        own = [plan.at(s)[1] for s in range(steps) if plan.at(s)[0] == track]
        read.append(windows(pipeline, own))
    assert read[0] and read[1] and not read[0] & read[1]
    assert len(read[0] | read[1]) == 4 * steps


def test_a_phase_that_comes_again_goes_on_with_its_track(decoder):
    phases = Phases(
        phases=[CausalLM(), MaskedLM(), CausalLM(), MaskedLM(rate=0.3)], until=[2, 4, 0.75]
    ).bind(decoder)
    assert list(phases.tracks()) == ["CausalLM", "MaskedLM", "MaskedLM_2"]
    plan = phases.plan(8, seed=0)
    assert [plan.at(step) for step in range(8)] == [
        ("CausalLM", 0), ("CausalLM", 1), ("MaskedLM", 2), ("MaskedLM", 3),
        ("CausalLM", 4), ("CausalLM", 5), ("MaskedLM_2", 6), ("MaskedLM_2", 7),
    ]  # fmt: skip
    evaluated = phases.evaluation()
    assert evaluated.phases[0] is evaluated.phases[2]
    assert list(evaluated.tracks()) == list(phases.tracks())


def test_a_mixture_can_be_a_phase(decoder):
    mixture = Mixture(objectives={"clm": CausalLM(), "mlm": MaskedLM()})
    phases = Phases(phases=[PrefixLM(), mixture, PrefixLM()], until=[1024, 3072]).bind(decoder)
    assert list(phases.tracks()) == ["PrefixLM", "clm", "mlm"]
    plan = phases.plan(4096, seed=0)
    assert plan.counts(4096) == {"PrefixLM": 2048, "clm": 1024, "mlm": 1024}
    assert plan.active(1024) == ("PrefixLM",) and set(plan.active(1025)) == {"clm", "mlm"}


def test_a_model_is_asked_what_its_last_phase_taught_first(decoder):
    phases = Phases(phases=[PrefixLM(), CausalLM()], until=[0.5]).bind(decoder)
    assert phases.parts == (phases.phases[1], phases.phases[0])
    assert phases.lengths.inputs == 64 and phases.lengths.targets == 0


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(phases=[], until=[]), "Phases.phases is"),
        (dict(phases=[3], until=[]), "Phases.phases has 3"),
        (dict(phases=[CausalLM(), MaskedLM()], until=[]), "2 phases need 1 ends"),
        (dict(phases=[CausalLM(), MaskedLM()], until=0.5), "Phases.until is 0.5"),
        (dict(phases=[CausalLM(), MaskedLM()], until=[1.0]), "Phases.until has 1.0"),
        (dict(phases=[CausalLM(), MaskedLM()], until=[0]), "Phases.until has 0"),
        (dict(phases=[CausalLM(), MaskedLM()], until=[True]), "Phases.until has True"),
        (dict(phases=[CausalLM()] * 3, until=[0.5, 0.25]), "must rise"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        Phases(**fields)
