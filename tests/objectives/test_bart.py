"""BART's denoising: exact counts, what a [MASK] stands for, and whole sentences."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest

from objectives.bart import Bart
from objectives.base import Setting
from t5like.data.examples import Record
from t5like.data.rng import generator
from t5like.data.vocabularies.bytes import ByteVocabulary
from t5like.errors import UserError

MASK, EOS = 2, 1


@pytest.fixture
def bound(setting):
    """(fields, length) -> Bart bound to the toy vocabulary, whose tokens end no sentence."""

    def make(length=512, **fields):
        return Bart(**fields).bind(setting("encoder_decoder", length))

    return make


def test_counts_are_exact_and_bounds_are_met(bound, record):
    objective = bound()
    for seed in range(50):
        length = [511, 100, 10, 4, 3, 2, 1][seed % 7]
        example = objective.corrupt(record(length, seed), generator(seed, "x"))
        masks = int((example.inputs == MASK).sum())
        kept = len(example.inputs) - masks - 1
        assert kept == length - round(0.3 * length)
        assert objective.bounds(length, generator(seed, "x")).inputs == len(example.inputs)
        assert len(example.inputs) <= 512 and example.inputs[-1] == EOS
        assert example.targets.tolist() == [*record(length, seed).tokens, EOS]


@pytest.mark.parametrize(("mean", "length"), [(3.0, 16), (1.0, 64), (1.0, 512), (3.0, 3)])
def test_inputs_never_outgrow_the_row_however_short_the_spans(bound, record, mean, length):
    objective = bound(length, mean_span_length=mean)
    raw = length - 1
    for seed in range(300):
        assert len(objective.corrupt(record(raw, seed), generator(seed, "x")).inputs) <= length
        assert objective.bounds(raw, generator(seed, "x")).inputs <= length


def numbered(length):
    """A text whose i-th token is 3 + i, so that what is left of it tells what is not."""
    return Record(np.arange(3, 3 + length, dtype=np.int32), np.zeros(length, np.int32))


def test_one_mask_a_span_and_lengths_are_poisson(bound):
    objective, text = bound(permute_sentences=False), numbered(511)
    sizes = collections.Counter()
    for seed in range(60):
        inputs = objective.corrupt(text, generator(seed, "x")).inputs[:-1]
        masks = np.flatnonzero(inputs == MASK)
        assert (np.diff(masks) > 1).all()  # no two touch
        places = np.concatenate([[-1], inputs - 3, [511]])
        sizes.update((places[masks + 2] - places[masks] - 1).tolist())
    total = sum(sizes.values())
    for k in range(7):
        # One span in fifty is cut short, for which the tolerance leaves room.
        expected = math.exp(-3) * 3**k / math.factorial(k)
        assert abs(sizes[k] / total - expected) < 0.025, (k, sizes)


def test_spans_lie_anywhere(bound):
    """Away from the ends, which fewer spans can reach, every token is as often hidden."""
    objective, text = bound(length=61, permute_sentences=False), numbered(60)
    hidden = np.zeros(60)
    for seed in range(2000):
        inputs = objective.corrupt(text, generator(seed, "x")).inputs
        hidden += ~np.isin(text.tokens, inputs)
    np.testing.assert_allclose(hidden[3:-3] / 2000, 0.31, atol=0.05)
    np.testing.assert_allclose(hidden[:3], hidden[:-4:-1], atol=80)


def test_sentences_stay_whole_and_change_places():
    sentences = ["One two.", " Is it? ", "No!", "\n\n", "Who knows...", "the end"]
    vocabulary = ByteVocabulary()
    objective = Bart(mask_rate=0.0).bind(Setting("encoder_decoder", vocabulary, 64))
    tokens = vocabulary.encode("".join(sentences))
    found = set()
    for seed in range(40):
        record = Record(tokens, np.zeros(len(tokens), np.int32))
        example = objective.corrupt(record, generator(seed, "x"))
        assert vocabulary.decode(example.targets) == "".join(sentences)
        found.add(vocabulary.decode(example.inputs))
    # The bare line breaks go with the exclamation mark before them; blanks with what follows.
    whole = ["One two.", " Is it?", " No!\n\n", "Who knows...", "the end"]
    for text in found:
        assert sorted(map(text.find, whole)) == sorted({text.find(s) for s in whole})
        assert -1 not in map(text.find, whole) and len(text) == sum(map(len, whole))
    assert len(found) > 30


def test_what_is_refused(setting):
    with pytest.raises(UserError, match="Bart.mask_rate is 0.6"):
        Bart(mask_rate=0.6)
    with pytest.raises(UserError, match="extra_ids"):
        Bart().bind(setting("encoder_decoder", 64, mask=False))
    with pytest.raises(UserError, match="targets_length to None"):
        Bart().bind(setting("encoder_decoder", 64, targets_length=32))
    with pytest.raises(UserError, match="cannot train architecture 'decoder'"):
        Bart().bind(setting("decoder", 64))
