"""N-gram counts against brute force, t-scores, and cutting tokens into the fewest units."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from t5like.data import lexicon, ngrams
from t5like.data.corpus import build_corpus
from t5like.data.lexicon import Lexicon
from t5like.data.sources import TextSource
from t5like.data.vocabularies import ByteVocabulary
from t5like.errors import UserError

BASE, SPECIAL = 12, (0, 1)


class Texts:
    """A corpus of documents given as lists of tokens."""

    metadata = {}

    def __init__(self, documents):
        self.offsets = np.cumsum([0, *map(len, documents)])
        self.num_documents, self.num_tokens = len(documents), int(self.offsets[-1])
        self.all = np.array([t for d in documents for t in d], np.uint16)
        self.fingerprint = f"texts {documents}"

    def tokens(self, start, stop):
        return self.all[start:stop]


class Vocabulary:
    size, special_ids = BASE, np.array(SPECIAL)

    def fingerprint(self):
        return f"{self.size} ids"


def is_special(size=BASE):
    return np.isin(np.arange(size), SPECIAL)


def brute(documents, n):
    """{n-gram: count}, within documents and without special tokens."""
    grams = [tuple(d[i : i + n]) for d in documents for i in range(len(d) - n + 1)]
    return Counter(g for g in grams if not set(g) & set(SPECIAL))


def both(n, base, keys, counts):
    return [tuple(gram) for gram in ngrams.parts_of(keys, n, base).tolist()], counts.tolist()


def counted(counts, n, base=BASE):
    """The same by merging; checks that n-grams come rising and once each."""
    pairs = [
        pair
        for grams, numbers in counts.merged(n, functools.partial(both, n, base))
        for pair in zip(grams, numbers, strict=True)
    ]
    assert [g for g, _ in pairs] == sorted({g for g, _ in pairs})
    return dict(pairs)


DOCUMENTS = st.lists(st.lists(st.integers(0, BASE - 1), max_size=9), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(1, 20), st.integers(1, 10))
def test_counts_are_those_of_brute_force_for_any_chunk(tmp_path_factory, documents, chunk, entries):
    counts = ngrams.count(
        Texts(documents), is_special(), tmp_path_factory.mktemp("runs"),
        workers=1, chunk_tokens=chunk, range_entries=entries,
    )  # fmt: skip
    text = Counter(t for d in documents for t in d if t not in SPECIAL)
    assert counts.unigrams.tolist() == [text[t] for t in range(BASE)]
    for n in (2, 3):
        expected = brute(documents, n)
        assert counted(counts, n) == expected
        assert counts.totals[n] == expected.total()


def test_processes_change_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 9 + "x\n" * 20)
    vocabulary = ByteVocabulary()
    source = TextSource(str(tmp_path / "a.txt"), "line")
    corpus = build_corpus(source, vocabulary, tmp_path / "store", workers=1, progress=False)
    excluded = np.zeros(vocabulary.size, bool)
    found = []
    for workers, chunk in ((1, 1 << 20), (2, 100)):
        folder = tmp_path / str(workers)
        folder.mkdir()
        counts = ngrams.count(
            corpus, excluded, folder, workers=workers, chunk_tokens=chunk, range_entries=40
        )
        # np.append, of keys and counts, is a function that other processes can import.
        ranges = [both.reshape(2, -1) for both in counts.merged(3, np.append)]
        found.append(np.concatenate(ranges, axis=1).tolist())
        assert (len(ranges) > 3) == (workers == 2)
    assert found[0] == found[1] and len(found[0][0]) > 30


def test_keys_are_exact_up_to_the_largest_vocabulary():
    base = ngrams.MAX_VOCABULARY
    tokens = np.array([base - 1, 0, base - 1, base - 2, base - 1])
    for n in (2, 3):
        grams = ngrams.parts_of(ngrams.keys_of(tokens, n, base), n, base)
        assert grams.tolist() == [tokens[i : i + n].tolist() for i in range(6 - n)]
    with pytest.raises(UserError, match="smaller vocabulary"):
        ngrams.count(Texts([[3]]), np.zeros(base + 1, bool), None)


# --- t-scores --------------------------------------------------------------------------------


def test_score_by_hand():
    # 4 of 100 pairs, expected 1: (.04 - .01) / sqrt(.04 * .96 / 100).
    (score,) = lexicon.t_scores(np.array([4]), 100, np.array([0.01]))
    assert score == pytest.approx(0.03 / np.sqrt(0.04 * 0.96 / 100))


def test_independent_tokens_score_nothing_and_collocations_much():
    rng = np.random.default_rng(0)
    text = rng.integers(2, 10, 40_000)
    text[rng.choice(20_000, 300, replace=False) * 2] = 10
    text[1:][text[:-1] == 10] = 11  # 11 follows 10 always, and only there
    total = len(text) - 1
    frequency = np.bincount(text, minlength=12) / len(text)
    pairs = Counter(itertools.pairwise(text.tolist()))
    scores = {
        pair: lexicon.t_scores(np.array([n]), total, np.prod(frequency[list(pair)]))[0]
        for pair, n in pairs.items()
    }
    collocation = scores.pop((10, 11))
    assert collocation > 16
    assert max(abs(s) for pair, s in scores.items() if not set(pair) & {10, 11}) < 4


def test_of_two_pairs_of_equal_count_the_rarer_tokens_win():
    # "of the": 2 3, both frequent elsewhere too; "New York": 4 5, only together.
    documents = [[2, 3]] * 5 + [[4, 5]] * 5 + [[2], [3]] * 200
    lex = lexicon.build(Texts(documents), Vocabulary(), bigrams=1, trigrams=0, min_count=1)
    assert lex.tokens(BASE).tolist() == [4, 5] and len(lex) == 1
    more = lexicon.build(Texts(documents), Vocabulary(), bigrams=9, trigrams=9, min_count=1)
    assert [more.tokens(BASE + i).tolist() for i in range(len(more))] == [[2, 3], [4, 5]]


def test_pairs_that_are_rarer_than_chance_or_than_asked_are_left_out():
    documents = [[2, 2, 2, 2, 2, 3], [3, 3, 3, 3, 3, 2], [4, 5]]
    build = functools.partial(lexicon.build, Texts(documents), Vocabulary(), bigrams=9, trigrams=0)
    found = build(min_count=1)
    assert [found.tokens(BASE + i).tolist() for i in range(len(found))] == [[2, 2], [3, 3], [4, 5]]
    assert [build(min_count=2).tokens(BASE + i).tolist() for i in range(2)] == [[2, 2], [3, 3]]


@pytest.mark.parametrize("chunk", [7, 50, 1 << 20])
def test_a_lexicon_does_not_depend_on_chunks(chunk):
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, BASE, rng.integers(0, 30)).tolist() for _ in range(40)]
    build = functools.partial(
        lexicon.build, Texts(documents), Vocabulary(), bigrams=20, trigrams=30, min_count=1
    )
    one, other = build(workers=1), build(workers=1, chunk_tokens=chunk)
    assert one.bigrams.tolist() == other.bigrams.tolist() and len(one.bigrams) == 20
    assert one.trigrams.tolist() == other.trigrams.tolist() and len(one.trigrams) == 30


def test_a_lexicon_is_built_once(tmp_path, monkeypatch):
    documents = [[4, 5, 6]] * 5 + [[7], [8, 9]]
    build = functools.partial(lexicon.build, Texts(documents), Vocabulary(), cache_dir=tmp_path)
    first = build(min_count=1)
    (file,) = tmp_path.iterdir()  # and no runs are left
    monkeypatch.setattr(ngrams, "count", None)
    again = build(min_count=1)
    assert again.bigrams.tolist() == first.bigrams.tolist()
    assert again.trigrams.tolist() == first.trigrams.tolist() and len(again) == 4
    with pytest.raises(TypeError):
        build(min_count=2)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("damage", ["cut short", "emptied", "another file"])
def test_a_damaged_lexicon_is_built_again(tmp_path, damage):
    documents = [[4, 5, 6]] * 5 + [[7], [8, 9]]
    build = functools.partial(
        lexicon.build, Texts(documents), Vocabulary(), min_count=1, cache_dir=tmp_path
    )
    first = build()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    bad = {"cut short": whole[: len(whole) // 2], "emptied": b"", "another file": b"text"}[damage]
    file.write_bytes(bad)
    again = build()
    assert again.bigrams.tolist() == first.bigrams.tolist() and len(again) == len(first)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() != bad
    with np.load(file) as arrays:
        assert arrays["trigrams"].tolist() == first.trigrams.tolist()


# --- cutting ---------------------------------------------------------------------------------


def lexicon_of(*grams):
    keys = {
        n: [ngrams.keys_of(np.array(g), n, BASE)[0] for g in grams if len(g) == n] for n in (2, 3)
    }
    return Lexicon(BASE, *(np.array(sorted(keys[n]), np.int64) for n in (2, 3)))


def pieces(lex, tokens, documents=None):
    units = lex.cut(np.array(tokens, np.int32), documents)
    cut = [tokens[s : s + n] for s, n in zip(units.starts, units.sizes, strict=True)]
    assert [lex.tokens(int(i)).tolist() for i in units.ids] == cut
    return cut


def test_the_fewest_units_are_not_always_the_longest_first():
    lex = lexicon_of((2, 3), (2, 3, 4), (4, 5, 6))
    assert pieces(lex, [2, 3, 4, 5, 6]) == [[2, 3], [4, 5, 6]]
    assert pieces(lex, [2, 3, 4, 7]) == [[2, 3, 4], [7]]


def test_units_end_with_their_document():
    lex = lexicon_of((2, 3), (3, 4, 5))
    documents = np.array([0, 1, 1, 2])
    assert pieces(lex, [2, 3, 4, 5], documents) == [[2], [3], [4], [5]]
    assert pieces(lex, [2, 3, 4, 5]) == [[2], [3, 4, 5]]


GRAMS = st.lists(st.integers(2, 5), min_size=2, max_size=3).map(tuple)


@settings(max_examples=200, deadline=None)
@given(st.sets(GRAMS, max_size=12), st.lists(st.integers(2, 5), max_size=9))
def test_units_cover_the_text_and_are_the_fewest(grams, tokens):
    cut = pieces(lexicon_of(*grams), tokens)
    assert list(itertools.chain.from_iterable(cut)) == tokens

    def fewest(rest):
        return min(
            (1 + fewest(rest[n:]) for n in (1, 2, 3) if n == 1 or tuple(rest[:n]) in grams),
            default=0,
        ) if rest else 0  # fmt: skip

    assert len(cut) == fewest(tokens)
