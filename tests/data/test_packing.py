import dataclasses

import numpy as np
import pytest
from hypothesis import given, strategies as st

from t5like.data.examples import Document, Lengths, Seq2Seq
from t5like.data.packing import PackedRows, pack
from t5like.data.pipeline import Component, Pipeline
from tests.data.tiny import TinyVocabulary, lognormal_corpus

CAPACITY = (40, 15)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), min_size=1, max_size=60),
    st.sampled_from([CAPACITY, (40, 0)]),
)
def test_every_example_is_in_one_row_and_every_row_holds(sizes, capacity):
    sizes, capacity = np.array(sizes), np.array(capacity)
    rows = pack(sizes, capacity)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(sizes)))
    for row in rows:
        assert (np.diff(row) > 0).all()
        used = sizes[row].sum(axis=0)[capacity > 0]
        assert (used <= capacity[capacity > 0]).all()


def test_known_packings():
    sizes = np.array([[5, 0], [6, 0], [4, 0], [5, 0], [10, 0]])
    rows = {tuple(row.tolist()) for row in pack(sizes, np.array([10, 0]))}
    assert rows == {(4,), (1, 2), (0, 3)}
    # The second side forbids what the first would allow.
    rows = pack(np.array([[1, 8], [1, 8], [1, 2]]), np.array([10, 10]))
    assert len(rows) == 2


def c4_like_pieces(size, count=2048):
    documents = np.random.default_rng(0).lognormal(5.5, 1.1, 4 * count).astype(int) + 1
    pieces = [min(size, n - at) for n in documents for at in range(0, n, size)]
    return np.array(pieces[:count])


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096])
def test_waste_is_under_three_percent_on_c4_like_lengths(length):
    sizes = c4_like_pieces(length)[:, None]
    rows = pack(sizes, np.array([length]))
    waste = 1 - sizes.sum() / (len(rows) * length)
    print(f"length {length}: {waste:.2%} of the slots are empty")
    assert waste < 0.03


@pytest.mark.parametrize("length, raw, targets", [(512, 568, 114), (1024, 1137, 229)])
def test_waste_of_both_sides_of_span_corruption(length, raw, targets):
    pieces = c4_like_pieces(raw)
    noise = np.maximum(1, np.round(0.15 * pieces))
    spans = np.maximum(1, np.round(noise / 3))
    sizes = np.stack([pieces - noise + spans + 1, noise + spans + 1], axis=1).astype(int)
    rows = pack(sizes, np.array([length, targets]))
    waste = 1 - sizes.sum(axis=0) / (len(rows) * np.array([length, targets]))
    print(f"({length}, {targets}): {waste[0]:.2%} and {waste[1]:.2%} are empty")
    assert (waste < 0.03).all()


@dataclasses.dataclass(frozen=True)
class Noised:
    """Bounds of span corruption: 15% noise in spans of three."""

    unit: Document

    def bounds(self, raw_length, rng):
        noise = max(1, round(0.15 * raw_length))
        spans = max(1, round(noise / 3))
        return Lengths(raw_length - noise + spans + 1, noise + spans + 1)

    def corrupt(self, record, rng):
        sizes = self.bounds(len(record.tokens), rng)
        return Seq2Seq(np.ones(sizes.inputs, np.int32), np.ones(sizes.targets, np.int32))


def test_waste_of_both_sides_of_a_pipelines_batches():
    part = Component("spans", lognormal_corpus(2000), Noised(Document(568)), 1.0)
    pipeline = Pipeline(
        [part],
        vocabulary=TinyVocabulary(),
        architecture="encoder_decoder",
        length=512,
        targets_length=114,
        batch_size=64,
        seed=0,
        pack=True,
    )
    batches = [pipeline.batch(step) for step in range(8)]
    for side in ("encoder", "decoder"):
        full = np.mean([batch[f"{side}_segment_ids"] > 0 for batch in batches])
        print(f"{side}: {1 - full:.2%} of the slots are empty")
        assert full > 0.97


class Sizes:
    """Counts the groups that were planned."""

    def __init__(self):
        self.planned = []

    def __call__(self, group):
        self.planned.append(group)
        return np.random.default_rng(group).integers(1, 30, (64, 2)) % np.array([30, 10])


def packed(sizes, cache=None):
    return PackedRows(sizes, 64, CAPACITY, seed=3, cache=cache)


def rows_of(packed, count):
    found = []
    for number in range(count):
        group, at = packed.locate(number)
        found.append((group, packed.rows(group)[at].tolist()))
    return found


def test_rows_go_through_the_groups_one_after_another():
    rows = rows_of(packed(Sizes()), 150)
    groups = [group for group, _ in rows]
    assert groups == sorted(groups) and groups[-1] >= 2
    for group in range(groups[-1]):
        members = sum((row for g, row in rows if g == group), [])
        assert sorted(members) == list(range(64))


def test_a_far_row_asked_first_is_the_same():
    group, at = (far := packed(Sizes())).locate(149)
    assert rows_of(packed(Sizes()), 150)[149] == (group, far.rows(group)[at].tolist())


def test_the_cache_saves_planning_and_may_be_lost_torn_or_unwritable(tmp_path):
    cache = tmp_path / "deep" / "rows.bin"
    expected = rows_of(packed(Sizes(), cache), 150)
    whole = cache.read_bytes()

    restarted = Sizes()
    packed(restarted, cache).locate(149)
    assert restarted.planned == []

    for damage in (whole[:-3], whole + b"\0" * 16, whole[:8] + whole[:8] + whole[16:], b""):
        cache.write_bytes(damage)
        assert rows_of(packed(Sizes(), cache), 150) == expected
        assert cache.read_bytes()[: len(whole)] == whole

    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("")
    assert rows_of(packed(Sizes(), not_a_folder / "rows.bin"), 150) == expected
