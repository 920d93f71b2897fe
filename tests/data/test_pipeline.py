import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from t5like.data.examples import Document, Seq2Seq, Window
from t5like.data.pipeline import Component, Pipeline
from t5like.data.rng import Stream, generator
from t5like.errors import UserError
from tests.data.tiny import Copy, Cut, Mark, MemoryCorpus, TinyVocabulary, lognormal_corpus

CORPUS = lognormal_corpus(300, mean=3.0)


def pipeline(*components, **settings):
    defaults = {"architecture": "decoder", "length": 64, "batch_size": 8, "seed": 11}
    components = components or (
        Component("windows", CORPUS, Copy(Window(50, separator=1)), 1.0),
        Component("documents", CORPUS, Cut(Document(40)), 2.5),
    )
    return Pipeline(components, vocabulary=TinyVocabulary(), **(defaults | settings))


VARIANTS = [
    {"pack": False},
    {"pack": True},
    {"pack": True, "shuffle": False, "attend_across_documents": False},
    {"pack": True, "architecture": "encoder_decoder", "targets_length": 50},
]


def both_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], name)


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_batch_is_a_function_of_seed_and_step(settings):
    ran_through = pipeline(**settings)
    batches = [ran_through.batch(step) for step in range(40)]
    asked_backwards = pipeline(**settings)
    for step in (39, 17, 16, 0):
        both_equal(asked_backwards.batch(step), batches[step])
    both_equal(pickle.loads(pickle.dumps(asked_backwards)).batch(21), batches[21])
    assert len({Pipeline.hash(batch) for batch in batches}) == 40
    other = pipeline(**settings, seed=12)
    assert Pipeline.hash(other.batch(0)) != Pipeline.hash(batches[0])


def ranges_of(batch_size):
    bounds = st.lists(st.integers(0, batch_size - 1), min_size=2, max_size=2).map(sorted)
    return st.lists(bounds.map(lambda b: range(b[0], b[1] + 1)), min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(rows=ranges_of(8), step=st.integers(0, 300))
def test_rows_are_those_of_the_whole_batch(variant, rows, step):
    """Asked alone, by another process, rows are what they are in the whole batch."""
    chosen = [row for part in rows for row in part]
    whole = pipeline(**variant).batch(step)
    both_equal(
        pipeline(**variant).batch(step, rows), {name: x[chosen] for name, x in whole.items()}
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_pass_are_those_of_its_whole_batches(variant):
    rows = (range(6, 8), range(1, 3))
    parts = list(pipeline(**variant).one_pass(rows=rows))
    wholes = list(pipeline(**variant).one_pass())
    assert len(parts) == len(wholes) > 1
    for part, whole in zip(parts, wholes, strict=True):
        both_equal(part, {name: x[[6, 7, 1, 2]] for name, x in whole.items()})


def test_rows_outside_of_the_batch_are_refused():
    for rows in [(range(7, 9),), (range(0, 4, 2),), (range(3, 3),), (range(-1, 2),)]:
        with pytest.raises(ValueError, match="of a batch of 8"):
            pipeline().batch(0, rows)


@pytest.mark.parametrize("settings", VARIANTS)
def test_spec_tells_shapes_and_dtypes(settings):
    made = pipeline(**settings)
    assert made.spec() == {k: (v.shape, v.dtype) for k, v in made.batch(0).items()}


def real_targets(batch):
    return batch["decoder_target_tokens"][batch["decoder_segment_ids"] > 0].tolist()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum),
    unit=st.sampled_from([Window(7), Document(7)]),
    shuffle=st.booleans(),
)
def test_every_token_comes_exactly_once_an_epoch(lengths, unit, shuffle):
    corpus = MemoryCorpus(lengths)
    all_tokens = list(range(2, corpus.num_tokens + 2))
    made = pipeline(Component("all", corpus, Copy(unit)), shuffle=shuffle, length=16, batch_size=1)
    step = 0
    for _ in range(3):
        tokens = []
        while len(tokens) < corpus.num_tokens:
            tokens += real_targets(made.batch(step))
            step += 1
        assert sorted(tokens) == all_tokens
        assert shuffle or tokens == all_tokens


def test_packed_rows_hold_every_example_of_the_stream_once():
    made = pipeline(Component("all", CORPUS, Copy(Document(20))), pack=True, batch_size=1)
    stream = made.examples()
    expected = sum((next(stream).record.tokens.tolist() for _ in range(2048)), [])
    tokens, step = [], 0
    while len(tokens) < len(expected):  # packing moves examples within a group of 2048
        tokens += real_targets(made.batch(step))
        step += 1
    assert sorted(tokens) == sorted(expected)


def test_epochs_differ_in_order_unless_told_not_to_shuffle():
    corpus = MemoryCorpus([400])
    for shuffle in (True, False):
        made = pipeline(Component("all", corpus, Copy(Window(4))), shuffle=shuffle, batch_size=100)
        first, second = (real_targets(made.batch(step)) for step in (0, 1))
        assert sorted(first) == sorted(second)
        assert (first == second) == (not shuffle)


def test_examples_are_those_of_the_batches():
    made = pipeline()
    drawn = made.examples(start=16)
    for row in made.batch(2)["decoder_target_tokens"]:
        one = next(drawn)
        assert one.example.inputs.tolist() + one.example.targets.tolist() == [
            t for t in row.tolist() if t
        ]
        assert one.component.name in ("windows", "documents")
    assert one.index == 23


def test_components_come_at_their_rates_with_their_own_units():
    stream = pipeline().examples()
    drawn = [next(stream) for _ in range(1024)]
    names = [d.component.name for d in drawn]
    assert names.count("windows") == pytest.approx(1024 / 3.5, abs=2)
    for d in drawn:
        assert len(d.record.tokens) <= (50 if d.component.name == "windows" else 40)


def test_packed_examples_never_share_a_segment():
    batch = pipeline(pack=True, attend_across_documents=False).batch(0)
    for segments, positions in zip(
        batch["decoder_segment_ids"], batch["decoder_positions"], strict=True
    ):
        length = (segments > 0).sum()
        assert (segments[:length] > 0).all() and not segments[length:].any()
        new = np.diff(segments[:length])
        assert set(new.tolist()) <= {0, 1}
        starts_example = positions[1:length] == 0
        assert (new[starts_example] == 1).all()
    assert batch["decoder_segment_ids"].max() > 2


def test_an_aligned_objective_trains_an_encoder():
    component = Component("all", CORPUS, Mark(Document(30)))
    batch = pipeline(component, architecture="encoder", pack=True).batch(0)
    real = batch["encoder_segment_ids"] > 0
    np.testing.assert_array_equal(
        batch["encoder_input_tokens"][real], batch["encoder_target_tokens"][real]
    )
    assert 0.4 < batch["encoder_loss_weights"][real].mean() < 0.6
    assert real.mean() > 0.9


def test_packing_resumes_from_its_cache(tmp_path):
    first = pipeline(pack=True, cache_dir=tmp_path)
    batch = first.batch(300)
    (cache,) = tmp_path.iterdir()
    both_equal(pipeline(pack=True, cache_dir=tmp_path).batch(300), batch)
    both_equal(pipeline(pack=True).batch(300), batch)
    pipeline(pack=True, cache_dir=tmp_path, seed=12).batch(0)
    assert len(list(tmp_path.iterdir())) == 2 and cache.exists()


def test_hash_sees_names_dtypes_shapes_and_values():
    batch = {"a": np.zeros((2, 3), np.int32)}
    others = [
        {"b": batch["a"]},
        {"a": batch["a"].astype(np.float32)},
        {"a": batch["a"].reshape(3, 2)},
        {"a": batch["a"] + 1},
    ]
    assert len({Pipeline.hash(b) for b in [batch, *others]}) == 5
    assert Pipeline.hash(batch) == Pipeline.hash({"a": np.zeros((3, 2), np.int32).T.copy()})


@given(st.integers(0, 2**32), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_a_rekeyed_stream_draws_what_fresh_generators_draw(seed, indices):
    stream = Stream(seed, "name")
    for index in indices:
        rekeyed, fresh = stream.at(index), generator(seed, "name", index)
        assert rekeyed.random() == fresh.random()
        # An odd number of 32-bit draws leaves half a word behind, which must not be seen later.
        assert rekeyed.integers(9, dtype=np.int32) == fresh.integers(9, dtype=np.int32)


# --- bad settings ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TooLong(Copy):
    """Says at first that it fits."""

    def corrupt(self, record, rng):
        return Seq2Seq(record.tokens, record.tokens)


@pytest.mark.parametrize(
    "components, settings, message",
    [
        ([Component("x", MemoryCorpus([0]), Copy(Window(4)))], {}, "'x' has no tokens"),
        ([Component("x", CORPUS, Copy(Window(4)))] * 2, {}, "one name"),
        ([Component("x", CORPUS, Copy(Window(65)))], {}, "more than a row holds"),
        ([], {"architecture": "encoder_decoder", "targets_length": 10}, "more than a row holds"),
        ([], {"batch_size": 0}, "batch_size"),
        ([Component("x", CORPUS, Copy(Window(4)), -1.0)], {}, "rates"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(components, settings, message):
    with pytest.raises(UserError, match=message):
        pipeline(*components, **settings)


def test_a_broken_bound_names_the_example():
    made = pipeline(Component("liar", MemoryCorpus([160]), TooLong(Window(40))))
    with pytest.raises(ValueError, match=r"example \d+ \(of 'liar'\): 80 inputs and targets"):
        made.batch(0)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("unit", [Window(50), Document(40)])
def test_one_pass_covers_the_corpus_once_and_fills_up_with_empty_rows(pack, unit):
    data = pipeline(Component("all", CORPUS, Copy(unit), 1.0), pack=pack, shuffle=False)
    batches = list(data.one_pass())
    assert {b["decoder_input_tokens"].shape for b in batches} == {(8, 64)}
    targets = np.concatenate([b["decoder_target_tokens"][b["decoder_loss_weights"] > 0]
                              for b in batches])  # fmt: skip
    np.testing.assert_array_equal(np.sort(targets), np.arange(2, CORPUS.num_tokens + 2))
    assert len(list(data.one_pass(limit=3))) == 3


def test_one_pass_of_a_mixture_has_as_many_examples_as_cover_it_in_sum():
    parts = [Component(name, CORPUS, Copy(Window(50)), rate) for name, rate in (("a", 1), ("b", 3))]
    rows = sum((b["decoder_loss_weights"].sum(1) > 0).sum() for b in pipeline(*parts).one_pass())
    assert rows == -(-CORPUS.num_tokens // 50)


def test_spans_that_cross_documents_cannot_be_kept_apart():
    class Crossing(Copy):
        keeps_documents_apart = False

    part = Component("spans", CORPUS, Crossing(Window(50)))
    pipeline(part)
    with pytest.raises(UserError, match="'spans'.*'document'"):
        pipeline(part, attend_across_documents=False)
