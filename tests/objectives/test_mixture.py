"""Mixtures: what shares a batch, what takes turns, exact rates, nesting."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from objectives.causal_lm import CausalLM
from objectives.codegen2 import CodeGen2
from objectives.fim import FIM
from objectives.mixture import Mixture
from objectives.mlm import MaskedLM
from objectives.phases import Phases
from objectives.prefix_lm import PrefixLM
from objectives.span_corruption import SpanCorruption
from objectives.ul2 import UL2
from t5like.errors import UserError


@pytest.fixture
def decoder(setting):
    return setting("decoder")


def test_one_network_and_batch_shape_is_one_track_and_others_take_turns(decoder):
    mixture = Mixture(
        objectives={"clm": CausalLM(), "mlm": MaskedLM(), "prefix": PrefixLM()},
        rates={"clm": 1, "mlm": 2, "prefix": 1},
    ).bind(decoder)
    tracks = mixture.tracks()
    assert list(tracks) == ["clm+prefix", "mlm"]
    assert tracks["mlm"] is mixture.objectives["mlm"]
    components = tracks["clm+prefix"].components()
    assert {name: rate for name, (_, rate) in components.items()} == {"clm": 1, "prefix": 1}
    assert mixture.plan(4096, seed=0).counts(4096) == {"clm+prefix": 2048, "mlm": 2048}


def test_rates_are_exact_for_batches_and_do_not_depend_on_the_length_of_the_run(decoder):
    mixture = Mixture(
        objectives={"clm": CausalLM(), "mlm": MaskedLM()}, rates={"clm": 0.75, "mlm": 0.25}
    ).bind(decoder)
    plan = mixture.plan(10_000, seed=3)
    assert plan.counts(8192) == {"clm": 6144, "mlm": 2048}
    turns = [plan.at(step) for step in range(100)]
    assert turns == [mixture.plan(500, seed=3).at(step) for step in range(100)]
    assert turns != [mixture.plan(500, seed=4).at(step) for step in range(100)]


def test_other_row_lengths_are_other_batches(setting):
    parts = {"sparse": SpanCorruption(), "dense": SpanCorruption(noise_density=0.5)}
    apart = Mixture(objectives=parts).bind(setting("encoder_decoder"))
    assert list(apart.tracks()) == ["sparse", "dense"]
    together = Mixture(objectives=parts).bind(setting("encoder_decoder", targets_length=64))
    assert list(together.tracks()) == ["sparse+dense"]
    assert together.lengths.targets == 64


def test_logits_are_computed_for_as_many_positions_as_the_most_demanding_part_asks(decoder):
    """Else a batch with a causal row would be computed twice over, or its FLOPs miscounted."""
    few, more = SpanCorruption(), SpanCorruption(noise_density=0.5)

    def predictions(**parts):
        [track] = Mixture(objectives=parts).bind(decoder).tracks().values()
        return track.usual_predictions

    asked = more.bind(decoder).usual_predictions
    assert few.bind(decoder).usual_predictions < asked
    assert predictions(few=few, more=more) == predictions(more=more, few=few) == asked
    assert predictions(few=few, clm=CausalLM()) is None


def test_masked_language_models_of_other_rates_share_their_batches(decoder):
    """Their loss is one, in which logits are computed for as many positions as any asks for."""
    few, more = MaskedLM(rate=0.15), MaskedLM(rate=0.4, whole_word=True)
    for parts in ({"few": few, "more": more}, {"more": more, "few": few}):
        [(name, track)] = Mixture(objectives=parts).bind(decoder).tracks().items()
        assert name == "+".join(parts)
        assert track.usual_predictions == more.bind(decoder).usual_predictions
        assert track.usual_predictions > few.bind(decoder).usual_predictions
        rates = {part.rate for part, _ in track.evaluation().components().values()}
        assert rates == {0.15}
    other = Mixture(objectives={"few": few, "other": MaskedLM(z_loss=1e-4)}).bind(decoder)
    assert list(other.tracks()) == ["few", "other"]


def test_held_out_data_is_measured_as_each_part_measures_it(decoder):
    parts = {"a": CausalLM(), "b": MaskedLM(rate=0.4, eval_rate=0.15)}
    mixture = Mixture(objectives=parts).bind(decoder)
    assert mixture.tracks()["b"].evaluation().rate == 0.15
    assert mixture.evaluation().objectives["b"].rate == 0.15


def test_a_mixture_in_a_mixture_that_is_one_track_shares_batches_at_its_rate(decoder):
    inner = Mixture(
        objectives={"clm": CausalLM(), "prefix": PrefixLM()}, rates={"clm": 3, "prefix": 1}
    )
    outer = Mixture(objectives={"inner": inner, "spans": SpanCorruption()}).bind(decoder)
    [(name, track)] = outer.tracks().items()
    rates = {name: rate for name, (_, rate) in track.components().items()}
    assert name == "inner+spans"
    assert rates == {"inner/clm": 0.75, "inner/prefix": 0.25, "spans": 1.0}


def test_several_tracks_in_a_mixture_keep_their_turns(decoder):
    phases = Phases(phases=[CausalLM(), MaskedLM()], until=[0.5])
    mixture = Mixture(
        objectives={"phases": phases, "prefix": PrefixLM()}, rates={"phases": 3, "prefix": 1}
    ).bind(decoder)
    assert list(mixture.tracks()) == ["phases/CausalLM", "phases/MaskedLM", "prefix"]
    plan = mixture.plan(4096, seed=0)
    assert plan.counts(4096) == {
        "phases/CausalLM": 1536, "phases/MaskedLM": 1536, "prefix": 1024,
    }  # fmt: skip
    assert set(plan.active(100)) == {"phases/CausalLM", "prefix"}
    assert set(plan.active(4096)) == {"phases/MaskedLM", "prefix"}
    orders = mixture.reading_orders()
    assert orders.keys() == {"phases/CausalLM", "phases/MaskedLM"}
    assert len(set(orders.values())) == 1


def test_what_the_parts_can_be_asked(decoder):
    both_ways = Mixture(objectives={"clm": CausalLM(), "prefix": PrefixLM()}).bind(decoder)
    parts = both_ways.objectives.values()
    assert both_ways.reads_both_ways == any(part.reads_both_ways for part in parts)
    prefix, rest = np.arange(3, 6, dtype=np.int32), np.arange(7, 9, dtype=np.int32)
    asked = [part.continuation(prefix, rest) for part in parts]
    answer = both_ways.continuation(prefix, rest)
    assert (answer is None) == all(example is None for example in asked)
    assert both_ways.evaluation().setting is decoder


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(objectives={}), r"Mixture.objectives is \{\}"),
        (dict(objectives={"a": 3}), r"Mixture.objectives\['a'\] is 3"),
        (dict(objectives={"a/b": CausalLM()}), "without '/'"),
        (dict(objectives={"a+b": CausalLM()}), "the name 'a\\+b'; use one without '/' and '\\+'"),
        (dict(objectives={"a": CausalLM()}, rates={"b": 1.0}), "one rate for each"),
        (dict(objectives={"a": CausalLM()}, rates={"a": 0.0}), "make it more than 0"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        Mixture(**fields)


def test_a_part_that_cannot_train_the_architecture_says_so(setting):
    with pytest.raises(UserError, match="CausalLM cannot train architecture 'encoder'"):
        Mixture(objectives={"mlm": MaskedLM(), "clm": CausalLM()}).bind(setting("encoder"))


SPANS = {"codegen2": CodeGen2(), "fim": FIM()}
MODES = {"codegen2": CodeGen2(), "ul2": UL2()}


@pytest.mark.parametrize(
    "parts, length, extra_ids, clash",
    [
        (SPANS, 256, 12, "CodeGen2 marks .* is <fim_suffix> to FIM: raise .*extra_ids to 16"),
        (SPANS, 2048, 40, "CodeGen2 marks .* is <fim_suffix> to FIM: raise .*extra_ids to 44"),
        # Of UL2's denoisers only those with the most spans reach so far, and R is none of them.
        (MODES, 64, 12, "UL2 marks .* is <eom> to CodeGen2: raise .*extra_ids to 19"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_sentinel_that_means_two_things_is_an_error(
    setting, parts, length, extra_ids, clash, nested
):
    mixture = Mixture(objectives=parts)
    if nested:
        mixture = Phases(phases=[CausalLM(), mixture], until=[0.5])
    with pytest.raises(UserError, match=clash) as error:
        mixture.bind(setting("decoder", length, num_sentinels=extra_ids))
    enough = int(str(error.value).rpartition(" ")[2])
    mixture.bind(setting("decoder", length, num_sentinels=enough))
    for part in parts.values():
        part.bind(setting("decoder", length, num_sentinels=extra_ids))


def test_where_sentinels_are_many_nothing_clashes(setting):
    parts = {**SPANS, **MODES}
    for length in (64, 256):
        bound = Mixture(objectives=parts).bind(setting("decoder", length, num_sentinels=100))
        assert {"<sep>", "[X]", "<fim_suffix>"} <= set(bound.named_tokens.values())


def test_a_bound_mixture_can_be_changed_and_bound_again(decoder, setting):
    bound = Mixture(objectives={"clm": CausalLM(), "mlm": MaskedLM()}).bind(decoder)
    again = dataclasses.replace(bound, rates={"clm": 1.0, "mlm": 3.0})
    assert again.plan(4096, 0).counts(4096) == {"clm": 1024, "mlm": 3072}
    assert bound.bind(setting("decoder", 32)).lengths.inputs == 32
