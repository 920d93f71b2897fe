"""Causal, prefix and span objectives: what goes in comes out, nothing lost, within bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from objectives.causal_lm import CausalLM
from objectives.prefix_lm import PrefixLM
from objectives.span_corruption import SpanCorruption
from t5like.data.examples import Document, Window
from t5like.data.rng import generator
from t5like.errors import UserError

EOS = 1


def rebuild(example, sentinels):
    """The text before span corruption: each sentinel of the inputs replaced by its tokens."""
    sentinels = set(sentinels.tolist())
    noise, current = {}, None
    assert example.inputs[-1] == EOS and example.targets[-1] == EOS
    for token in example.targets[:-1].tolist():
        if token in sentinels:
            current = token
            noise[current] = []
        else:
            noise[current].append(token)
    out = []
    for token in example.inputs[:-1].tolist():
        out += noise.pop(token) if token in sentinels else [token]
    assert not noise
    return out


def draw_documents(data, length):
    """Lengths of one to three documents that make up `length` tokens, or None."""
    if length < 3 or not data.draw(st.booleans()):
        return None
    first = data.draw(st.integers(1, length - 2))
    return [first, 1, length - first - 1]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["encoder_decoder", "decoder"]),
    st.integers(8, 120),
    st.sampled_from([(0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.15, 64.0), (0.75, 2.0)]),
    st.booleans(),
    st.integers(0, 10**6),
    st.data(),
)
def test_span_corruption_rebuilds(setting, record, architecture, length, noise, roll, seed, data):
    density, mean = noise
    objective = SpanCorruption(
        noise_density=density, mean_noise_span_length=mean, random_roll=roll
    ).bind(setting(architecture, length))
    full = objective.unit.raw_length
    raw = data.draw(st.one_of(st.just(full), st.integers(0, full)))
    drawn = record(raw, seed, draw_documents(data, raw))
    example = objective.corrupt(drawn, generator(seed, "corrupt"))
    sentinels = objective.setting.vocabulary.sentinels

    assert rebuild(example, sentinels) == drawn.tokens.tolist()
    used = [t for t in example.inputs.tolist() if t in set(sentinels.tolist())]
    assert used == sentinels[: len(used)].tolist()
    assert [t for t in example.targets.tolist() if t in set(used)] == used
    assert example.inputs.dtype == example.targets.dtype == np.int32

    bounds = objective.bounds(raw, generator(seed, "corrupt"))
    sizes = len(example.inputs), len(example.targets)
    assert sizes[0] <= bounds.inputs and sizes[1] <= bounds.targets
    if not roll:
        assert sizes == (bounds.inputs, bounds.targets)
    rows = objective.lengths
    if architecture == "encoder_decoder":
        assert bounds.inputs <= rows.inputs == length and bounds.targets <= rows.targets
    else:
        assert bounds.inputs + bounds.targets <= rows.inputs == length
        assert rows.targets == 0

    if example.input_documents is not None:
        where = {token: doc for token, doc in zip(drawn.tokens, drawn.documents, strict=True)}
        for tokens, documents in (
            (example.inputs, example.input_documents),
            (example.targets, example.target_documents),
        ):
            assert len(tokens) == len(documents) and (np.diff(documents) >= 0).all()
            if len(where) == raw:  # tokens do not repeat
                for token, document in zip(tokens.tolist(), documents.tolist(), strict=True):
                    assert where.get(token, document) == document


def test_span_corruption_of_t5_fills_its_rows(setting, record):
    objective = SpanCorruption().bind(setting(length=512))
    assert objective.unit == Window(568)
    assert (objective.lengths.inputs, objective.lengths.targets) == (512, 114)
    example = objective.corrupt(record(568), generator(0, "x"))
    assert (len(example.inputs), len(example.targets)) == (512, 114)
    assert example.inputs[0] < 890 and example.inputs[-2] == 999 - 27  # the last token is noise


def test_span_corruption_on_a_decoder_fills_its_row(setting, record):
    objective = SpanCorruption().bind(setting("decoder", 512))
    raw = objective.unit.raw_length
    example = objective.corrupt(record(raw), generator(0, "x"))
    longer = objective.bounds(raw + 1, generator(0, "x"))
    assert len(example.inputs) + len(example.targets) in (511, 512)
    assert longer.inputs + longer.targets > 512


@pytest.mark.parametrize("raw", [0, 1])
def test_nothing_to_corrupt(setting, record, raw):
    objective = SpanCorruption(random_roll=True).bind(setting())
    example = objective.corrupt(record(raw), generator(0, "x"))
    assert example.inputs.tolist() == [*record(raw).tokens.tolist(), EOS]
    assert example.targets.tolist() == [EOS]


def test_rolled_spans_keep_their_sentinels_when_noise_comes_first(setting, record):
    objective = SpanCorruption(noise_density=0.5, random_roll=True).bind(setting())
    raw = record(objective.unit.raw_length)
    for seed in range(100):
        example = objective.corrupt(raw, generator(seed, "x"))
        if example.inputs[0] == 999:
            assert example.targets[0] == 999 and example.targets[1] == raw.tokens[0]
            return
    raise AssertionError("no roll put noise first")


def test_more_spans_than_sentinels_cannot_be_bound(setting):
    with pytest.raises(UserError, match="needs 128 sentinels; the vocabulary has 100"):
        SpanCorruption(noise_density=0.5).bind(setting(length=512))
    SpanCorruption(noise_density=0.5).bind(setting(length=512, num_sentinels=128))


def test_targets_that_are_too_short_cannot_be_bound(setting):
    with pytest.raises(UserError, match="targets_length is 113.*set it to 114"):
        SpanCorruption().bind(setting(length=512, targets_length=113))
    assert SpanCorruption().bind(setting(length=512, targets_length=200)).lengths.targets == 200
    with pytest.raises(UserError, match="targets_length is 63.*set it to 64"):
        PrefixLM().bind(setting(length=65, targets_length=63))


@pytest.mark.parametrize("objective", [SpanCorruption, PrefixLM, CausalLM])
def test_a_vocabulary_without_an_end_cannot_be_bound(setting, objective):
    with pytest.raises(UserError, match="no end-of-sequence token"):
        objective().bind(setting("decoder", eos_id=None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpanCorruption(cut="line"), "SpanCorruption.cut is 'line'"),
        (lambda: SpanCorruption(noise_density=1.5), "SpanCorruption.noise_density is 1.5"),
        (lambda: SpanCorruption(mean_noise_span_length=0.5), "mean_noise_span_length is 0.5"),
        (lambda: PrefixLM(noise_density=1.0), "PrefixLM.noise_density is 1.0"),
        (lambda: CausalLM(label_smoothing=1.0), "CausalLM.label_smoothing is 1.0"),
    ],
)
def test_bad_fields_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_an_architecture_that_cannot_be_trained_is_named(setting):
    with pytest.raises(UserError, match="CausalLM cannot train architecture 'encoder'"):
        CausalLM().bind(setting("encoder"))


# --- prefix language modelling ---


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["encoder_decoder", "decoder"]),
    st.sampled_from(["window", "document"]),
    st.integers(0, 63),
    st.sampled_from([0.5, 0.25, 0.0]),
    st.integers(0, 10**6),
    st.data(),
)
def test_prefix_lm_rebuilds(setting, record, architecture, cut, raw, density, seed, data):
    objective = PrefixLM(cut=cut, noise_density=density).bind(setting(architecture, 64))
    drawn = record(raw, seed, draw_documents(data, raw) if cut == "window" else None)
    example = objective.corrupt(drawn, generator(seed, "x"))
    inputs, targets = example.inputs.tolist(), example.targets.tolist()
    if architecture == "encoder_decoder":
        assert inputs.pop() == EOS
    if architecture == "encoder_decoder" or cut == "document":
        assert targets.pop() == EOS
    assert inputs + targets == drawn.tokens.tolist()
    assert len(targets) >= min(raw, 1) and len(inputs) >= min(raw - 1, 1)

    bounds = objective.bounds(raw, generator(seed, "x"))
    assert (bounds.inputs, bounds.targets) == (len(example.inputs), len(example.targets))
    rows = objective.lengths
    if architecture == "encoder_decoder":
        assert bounds.inputs <= rows.inputs and bounds.targets <= rows.targets
    else:
        assert bounds.inputs + bounds.targets <= rows.inputs
    if example.input_documents is not None:
        documents = example.input_documents[: len(inputs)].tolist()
        documents += example.target_documents[: len(targets)].tolist()
        assert documents == drawn.documents.tolist()


def test_prefix_lm_units(setting):
    both, decoder = setting(length=64), setting("decoder", 64)
    assert PrefixLM().bind(both).unit == Window(63)
    assert PrefixLM(cut="document").bind(both).unit == Document(63)
    assert PrefixLM().bind(decoder).unit == Window(64, separator=EOS)
    assert PrefixLM(cut="document").bind(decoder).unit == Document(63)
    # Prefixes of a quarter's density are at least half: 63 - 31, and EOS.
    assert PrefixLM(noise_density=0.25).bind(both).lengths.targets == 33


def test_prefix_lengths_vary(setting, record):
    objective = PrefixLM().bind(setting(length=100))
    drawn = record(99)
    lengths = {len(objective.corrupt(drawn, generator(s, "x")).inputs) for s in range(100)}
    assert len(lengths) > 20


# --- causal language modelling ---


def test_causal_lm_windows_are_the_stream(setting, record):
    objective = CausalLM().bind(setting("decoder", 16))
    assert objective.unit == Window(16, separator=EOS)
    drawn = record(16, documents=[4, 12])
    example = objective.corrupt(drawn, generator(0, "x"))
    assert example.targets is drawn.tokens and len(example.inputs) == 0
    assert example.target_documents.tolist() == [0] * 4 + [1] * 12


@pytest.mark.parametrize("raw", [0, 1, 2, 15])
def test_causal_lm_documents_end_where_they_end(setting, record, raw):
    objective = CausalLM(cut="document").bind(setting("decoder", 16))
    assert objective.unit == Document(15)
    drawn = record(raw)
    whole = objective.corrupt(drawn, generator(0, "x"))
    assert whole.targets.tolist() == [*drawn.tokens.tolist(), EOS]
    assert objective.bounds(raw, generator(0, "x")).targets == raw + 1
    part = type(drawn)(drawn.tokens, drawn.documents, ends_document=False)
    assert objective.corrupt(part, generator(0, "x")).targets.tolist() == drawn.tokens.tolist()


@pytest.mark.parametrize(
    ("objective", "architecture"),
    [(SpanCorruption(), "encoder_decoder"), (PrefixLM(), "decoder"), (CausalLM(), "decoder")],
)
def test_equal_draws_give_equal_examples(setting, record, objective, architecture):
    bound = objective.bind(setting(architecture, 64))
    first, second = (bound.corrupt(record(64), generator(7, "x", 3)) for _ in range(2))
    assert np.array_equal(first.inputs, second.inputs)
    assert np.array_equal(first.targets, second.targets)
