"""Bits per byte: what is hidden, what is counted, and that the numbers are the model's."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from t5like.data.sources.base import Document, Source
from t5like.errors import UserError
from t5like.evaluation import pieces
from t5like.evaluation.likelihood import Continuation, Infilling, without_last_eos
from t5like.inference.generate import Generator


@dataclasses.dataclass(frozen=True)
class Words(Source):
    """Two documents of random words, one of them with letters of two bytes."""

    def documents(self, shard=0, num_shards=1, *, skipped=None):
        rng = np.random.default_rng(0)
        for letters in ("abcde", "äöü"):
            words = ["".join(rng.choice(list(letters), rng.integers(1, 7))) for _ in range(60)]
            yield Document(" ".join(words))


SIZES = dict(source=Words(), pieces=6, characters=30, length=72, batch_size=4)
INFILLING = Infilling(**SIZES, hidden=6)
CONTINUATION = Continuation(**SIZES)


def uniform(model):
    """The model with an output layer of zeros."""
    params = jax.tree.map(np.copy, model.params)
    params["head"]["kernel"][:] = 0
    return dataclasses.replace(model, params=params)


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_a_uniform_model_pays_for_every_token_alike(trained, architecture):
    model = uniform(trained(architecture))
    bits = math.log2(model.config.vocab_size)
    # The vocabulary is bytes; infilling pays for a sentinel and EOS too.
    assert CONTINUATION.measure(model, 0) == {"bits_per_byte": pytest.approx(bits, rel=1e-5)}
    chosen = INFILLING._chosen(model.vocabulary)
    text_bytes = sum(piece.hidden_bytes for piece, _ in chosen)
    expected = bits * (text_bytes + 2 * len(chosen)) / text_bytes
    assert INFILLING.measure(model, 0) == {"bits_per_byte": pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_continuation_is_what_generator_scores(trained, architecture):
    model = trained(architecture)
    chosen = [piece for piece, _ in CONTINUATION._chosen(model.vocabulary)]
    assert len(chosen) == 6
    generator = Generator(model.config, model.params, model.vocabulary, batch_size=8)
    encode = model.vocabulary.encode_batch
    prompts = encode([piece.before for piece in chosen])
    scores = generator.score_tokens(prompts, encode([piece.hidden for piece in chosen]))
    expected = -scores.sum() / math.log(2) / sum(piece.hidden_bytes for piece in chosen)
    assert CONTINUATION.measure(model, 0)["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("measure", [INFILLING, CONTINUATION])
def test_what_cannot_be_said_has_no_number(trained, measure):
    assert measure.measure(trained("decoder", speaks=False), 0) == {}
    assert measure.measure(trained("encoder"), 0) == {}
    assert measure.measure(dataclasses.replace(trained("decoder"), objective=None), 0) == {}


def test_pieces_depend_on_seed_and_text_alone():
    found = pieces.texts(Words(), 30, 100, 0)
    assert found == pieces.texts(Words(), 30, 100, 0)
    assert set(found) == set(pieces.texts(Words(), 30, 100, 1)) and len(set(found)) == len(found)
    assert found != pieces.texts(Words(), 30, 100, 1)
    # Those of the first document stand in the same order when the second one is not read.
    first = pieces.texts(Words(), 30, 1, 0)
    assert [text for text in found if text in first] == list(first)
    assert all(len(text) <= 30 for text in found)


def test_hidden_parts_are_whole_words_inside_the_text():
    for text in pieces.texts(Words(), 60, 100, 0):
        middle, end = pieces.hide_middle(text, 12, 0), pieces.hide_end(text, 0.5)
        for piece in (middle, end):
            assert piece.before + piece.hidden + piece.after == text
            assert piece.hidden[0] == " " and piece.before.strip()
            assert not piece.after or piece.after[0] == " "
        assert middle.after.strip() and end.after == ""
        assert 12 <= len(middle.hidden) <= 12 + 7
        assert len(middle.hidden) == len(middle.hidden.encode()) or not middle.hidden.isascii()
    assert pieces.hide_middle("one two", 3, 0) is None and pieces.hide_end("one", 0.5) is None
    assert pieces.hide_middle("a b c", 99, 0) == pieces.Piece("a", " b", " c")


def test_only_a_last_eos_goes_uncounted():
    weights = np.array([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]], np.float32)
    targets = np.array([[1, 5, 1, 1, 1], [1, 1, 5, 1, 1]])
    expected = [[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert without_last_eos(weights, targets, 1).tolist() == expected
    assert without_last_eos(weights, targets, None).tolist() == weights.tolist()


def test_pieces_that_fit_no_row_are_an_error(trained):
    small = dataclasses.replace(CONTINUATION, length=12)
    with pytest.raises(UserError, match="lower Continuation.characters"):
        small.measure(trained("decoder"), 0)
