"""Embeddings: what is read, what pooling takes, and what padding must not change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from t5like.errors import UserError
from t5like.evaluation.model import embed_rows, pool

TEXTS = ["a", "some words", "def f(x):\n    return x + 1", ""]
ARCHITECTURES = ["encoder", "decoder", "encoder_decoder"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_embedding_depends_neither_on_its_batch_nor_on_padding(trained, architecture):
    model = trained(architecture, speaks=architecture != "encoder")
    whole = model.embed(TEXTS, length=32, batch_size=4)
    assert whole.shape == (4, 16) and whole.dtype == np.float32
    assert np.isfinite(whole).all()
    in_pairs = model.embed(TEXTS[:3], length=40, batch_size=2)
    assert in_pairs == pytest.approx(whole[:3], abs=1e-5)


@pytest.mark.parametrize("pooling", ["first", "last"])
def test_pooling_takes_the_slot_it_names(trained, pooling):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, 5, 3)).astype(np.float32)
    present = np.arange(5) < np.array([[2], [5]])
    expected = {"first": states[[0, 1], [0, 0]], "last": states[[0, 1], [1, 4]]}[pooling]
    assert np.array_equal(pool(states, present, pooling), expected)
    mean = pool(states, present, "mean")
    assert np.asarray(mean) == pytest.approx(np.stack([states[0, :2].mean(0), states[1].mean(0)]))


def test_rows_are_framed_as_the_model_was_trained(trained):
    (encoder, masked, causal, both) = (
        trained("encoder", speaks=False).rows(["ab"], 6),
        trained("decoder", speaks=False).rows(["ab"], 6),
        trained("decoder").rows(["ab"], 6),
        trained("encoder_decoder").rows(["ab"], 6),
    )
    vocabulary = trained("encoder").vocabulary
    a, b = vocabulary.encode("ab")
    eos, bos, pad = vocabulary.eos_id, vocabulary.bos_id, vocabulary.pad_id
    assert encoder["encoder_input_tokens"].tolist() == [[a, b, eos, pad, pad, pad]]
    assert both["encoder_input_tokens"].tolist() == [[a, b, eos, pad, pad, pad]]
    assert masked["decoder_input_tokens"].tolist() == [[a, b, eos, pad, pad, pad]]
    assert masked["decoder_causal_attention"].tolist() == [[1, 1, 1, 0, 0, 0]]
    assert causal["decoder_input_tokens"][0, :3].tolist() == [bos, a, b]
    assert causal["decoder_segment_ids"].tolist() == [[1, 1, 1, 0, 0, 0]]
    assert "decoder_causal_attention" not in causal


def test_a_decoder_that_reads_both_ways_sees_later_words(trained):
    causal, both = trained("decoder"), trained("decoder", both_ways=True)
    texts = ["ab", "ac"]
    kwargs = dict(length=6, batch_size=2, pooling="first")
    one, other = causal.embed(texts, **kwargs)
    assert one == pytest.approx(other, abs=1e-6)
    one, other = both.embed(texts, **kwargs)
    assert np.abs(one - other).max() > 1e-3


def test_long_texts_are_cut_and_one_shape_is_compiled(trained):
    model = trained("encoder", speaks=False)
    before = embed_rows._cache_size()
    long, cut = model.embed(["x" * 99, "x" * 19], length=20, batch_size=3)
    model.embed(["y"] * 7, length=20, batch_size=3)
    assert np.array_equal(long, cut)
    assert embed_rows._cache_size() == before + 1


def test_rows_longer_than_the_learned_positions_are_refused(trained):
    with pytest.raises(UserError, match="length=97 .* 96 learned positions"):
        trained("encoder", speaks=False).rows(["a"], 97)
    free = dataclasses.replace(trained("encoder").config, position="rope")
    model = dataclasses.replace(trained("encoder"), config=free)
    assert model.rows(["a"], 97)["encoder_input_tokens"].shape == (1, 97)
