"""Word statistics of a corpus, and the words that are drawn from a document's language model."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest

from objectives import word_sets, word_statistics
from t5like.data.corpus import build_corpus
from t5like.data.rng import generator
from t5like.data.sources import TextSource
from t5like.data.vocabularies import ByteVocabulary
from t5like.errors import UserError
from tests.objectives.toy_corpus import VOCABULARY, ToyCorpus, bind, brute_force, toy_corpus


@pytest.fixture(scope="module")
def corpus():
    return toy_corpus()


# --- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [20, 1000])
def test_statistics_are_a_brute_force_count(corpus, max_tokens):
    counting = word_statistics.Counting(max_tokens, "[a-zA-Z]+", 30, 5)
    found = word_statistics.word_statistics(corpus, VOCABULARY, counting)
    frequency, documents, pieces = brute_force(corpus, max_tokens)
    kept = sorted(word for word, n in frequency.items() if n >= 30)
    assert 5 < len(kept) < len(frequency)
    assert list(found.words) == kept
    assert found.frequency.tolist() == [frequency[w] for w in kept]
    assert found.documents.tolist() == [documents[w] for w in kept]
    assert found.total_words == sum(frequency.values())
    assert found.mean_words == pytest.approx(sum(frequency.values()) / pieces)
    assert [VOCABULARY.decode(found.tokens(i)).strip() for i in range(len(kept))] == kept


def test_a_corpus_of_rare_words_lends_its_most_frequent(corpus):
    counting = word_statistics.Counting(1000, "[a-zA-Z]+", 10**6, 7)
    found = word_statistics.word_statistics(corpus, VOCABULARY, counting)
    frequency, _, _ = brute_force(corpus, 1000)
    seventh = sorted(frequency.values())[-7]
    assert set(found.words) == {w for w, n in frequency.items() if n >= seventh}


def test_stopwords_are_no_words(tmp_path):
    (tmp_path / "a.txt").write_text("The cat and THE dog were on it; Cat's cradle, 2nd")
    vocabulary = ByteVocabulary()
    corpus = build_corpus(TextSource(str(tmp_path / "a.txt")), vocabulary, tmp_path / "store")
    counting = word_statistics.Counting(1000, "[a-zA-Z]+", 1, 1)
    found = word_statistics.word_statistics(corpus, vocabulary, counting)
    assert found.words == ("cat", "cradle", "dog", "nd")
    assert found.frequency.tolist() == [2, 1, 1, 1] and found.total_words == 5
    assert found.documents.tolist() == [1, 1, 1, 1]


def test_processes_and_chunks_do_not_change_the_counts(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    words = ["whale", "ship", "sea", "harpoon", "captain", "ocean"]
    text = "\n".join(" ".join(rng.choice(words, 40)) for _ in range(60))
    (tmp_path / "a.txt").write_text(text)
    vocabulary = ByteVocabulary()
    corpus = build_corpus(TextSource(str(tmp_path / "a.txt")), vocabulary, tmp_path / "store")
    counting = word_statistics.Counting(100, "[a-zA-Z]+", 1, 1)
    whole = word_statistics.word_statistics(corpus, vocabulary, counting, workers=1)
    monkeypatch.setattr(word_statistics, "_CHUNK_TOKENS", 1500)
    for workers in (1, 2):
        parts = word_statistics.word_statistics(corpus, vocabulary, counting, workers=workers)
        assert_equal(whole, parts)


def assert_equal(first, second):
    for name, value in first._asdict().items():
        np.testing.assert_array_equal(value, getattr(second, name), err_msg=name)


def test_statistics_are_counted_once_for_equal_settings(tmp_path, monkeypatch):
    counted = []
    count = word_statistics._count
    monkeypatch.setattr(
        word_statistics, "_count", lambda *given: counted.append(1) or count(*given)
    )
    first = bind(cache_dir=tmp_path)
    assert_equal(first._sampler._statistics, bind(cache_dir=tmp_path)._sampler._statistics)
    bind(cache_dir=tmp_path, mean_set_words=5.0, rate=0.3)  # not about counts
    assert len(counted) == 1
    bind(cache_dir=tmp_path, min_frequency=30)
    bind(cache_dir=tmp_path, word_pattern="[a-z]+")
    bind(cache_dir=tmp_path, length=32)
    other = ToyCorpus(seed=1)
    other.fingerprint = "another"
    bind(cache_dir=tmp_path, corpus=other)
    assert len(counted) == 5 == len(list(tmp_path.iterdir()))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    assert_equal(first._sampler._statistics, bind(cache_dir=tmp_path)._sampler._statistics)
    assert len(counted) == 6


# --- word sets -------------------------------------------------------------------------------


def test_lengths_are_poisson_without_zero():
    cumulative = word_sets.length_distribution(3.0)
    probability = np.diff(cumulative, prepend=0)
    assert probability[0] == pytest.approx(3 * math.exp(-3) / (1 - math.exp(-3)))
    assert probability[0] == pytest.approx(0.157, abs=5e-4)
    mean = (probability * np.arange(1, len(probability) + 1)).sum()
    assert mean == pytest.approx(3.157, abs=5e-4)
    assert cumulative[-1] == 1.0 and (probability > 0).all()


def test_words_that_are_too_rare_to_be_subsampled_are_kept():
    keep = word_sets.keep_probabilities(np.array([10, 99, 100, 400, 10_000]), 100_000, 1e-4, 100)
    ratios = np.array([10 / 100, 10 / 400, 10 / 10_000])
    np.testing.assert_allclose(keep, [1, 1, *np.sqrt(ratios) + ratios])
    assert word_sets.keep_probabilities(np.array([200]), 10**7, 1e-4, 100).tolist() == [1.0]


def test_smoothed_probabilities_by_hand_and_in_sum(corpus):
    sampler = bind(min_frequency=1, length=2000)._sampler
    frequency, documents, pieces = brute_force(corpus, 2000)
    assert set(sampler.words) == set(frequency)
    text = VOCABULARY.decode(corpus.record(5).tokens)
    document = sampler.count(text)
    counts = collections.Counter(text.split())
    mu = sum(frequency.values()) / pieces
    by_hand = [
        (counts[w] + mu * documents[w] / sum(documents.values())) / (len(text.split()) + mu)
        for w in sampler.words
    ]
    every = np.arange(len(sampler.words))
    np.testing.assert_allclose(sampler.probabilities(document, every), by_hand)
    assert sum(by_hand) == pytest.approx(1.0)
    some = np.array([3, 1, 3])
    expected = math.log(by_hand[3]) * 2 + math.log(by_hand[1])
    assert sampler.score(document, some) == pytest.approx(expected)
    assert sampler.score(document, some) == sampler.score(document, some[::-1].copy())


def test_words_are_drawn_by_smoothed_probability_and_subsampling(corpus):
    """With so many sampled words that all are candidates; the document's own come most."""
    sampler = bind(sampled_words=5000, min_frequency=1, subsample_threshold=2e-3)._sampler
    document = sampler.count(VOCABULARY.decode(corpus.record(5).tokens))
    every = np.arange(len(sampler.words))
    expected = sampler.probabilities(document, every) * sampler._keep
    expected /= expected.sum()
    assert sampler._keep.min() < 0.3 < sampler._keep.max() == 1.0
    draws = [sampler.draw(document, 50, generator(0, "x", i)) for i in range(200)]
    counts = np.bincount(np.concatenate(draws, axis=None), minlength=len(every))
    assert np.abs(counts / counts.sum() - expected).max() < 0.01


def test_the_sampling_vocabulary_is_the_documents_words_and_some_by_document_frequency():
    sampler = bind(sampled_words=8, min_frequency=1)._sampler
    own = word_sets.BagOfWords(np.array([50, 51, 52]), np.array([1, 1, 1]), 3)
    for i in range(20):
        assert len(np.unique(sampler.draw(own, 2000, generator(0, "x", i)))) <= 8
    full = word_sets.BagOfWords(np.arange(40, 50), np.ones(10, int), 10)
    words = np.unique(sampler.draw(full, 5000, generator(0, "x")))
    assert set(range(40, 50)) < set(words.tolist())  # still some of others


def test_sets_that_exceed_their_room_lose_their_last_words_alike():
    sampler = bind()._sampler
    sizes = sampler._lengths
    long, short = np.flatnonzero(sizes == 2)[0], np.flatnonzero(sizes == 1)[0]
    sets = np.array([[short, short, short, short], [long, short, long, long]])
    assert sampler.fitting(sets, 7).tolist() == sets.tolist()
    assert sampler.fitting(sets, 6).tolist() == sets[:, :3].tolist()
    assert sampler.fitting(sets, 2).tolist() == sets[:, :1].tolist()


def test_corpora_without_words_are_errors():
    with pytest.raises(UserError, match="no word of the pattern.*PROP.word_pattern"):
        bind(word_pattern="[0-9]+")
    only_long = ToyCorpus()
    only_long._all = np.tile([30, 31, 32], only_long.num_tokens)[: only_long.num_tokens]
    with pytest.raises(UserError, match="fits into 2 tokens.*PROP.max_set_tokens"):
        bind(corpus=only_long, max_set_tokens=2, min_frequency=10**6, sampled_words=1)
