"""The store: what goes in comes out, in any order, with metadata; views; two or four bytes."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from t5like.data.corpus import Corpus, build_corpus
from t5like.data.sources import JsonlSource, PythonSource, TextSource
from t5like.data.vocabularies import ByteVocabulary
from t5like.errors import UserError

BYTES = ByteVocabulary()
ROWS = [
    {"text": "first", "year": 1789, "score": 0.5, "good": True, "who": "Washington"},
    {"text": "", "year": 1793, "score": 1, "good": False, "who": "nobody"},
    {"text": "second text", "year": 1797, "score": 2, "good": False, "who": "Adäms"},
    {"text": "third", "year": 1801, "good": True, "who": None, "tags": [1, {"b": 2}]},
]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return build_corpus(JsonlSource(str(tmp_path / "a.jsonl")), BYTES, tmp_path / "store")


def test_documents_and_offsets(corpus):
    assert corpus.num_documents == 3 and corpus.num_tokens == 21
    assert corpus.offsets.dtype == np.int64 and corpus.offsets.tolist() == [0, 5, 16, 21]
    assert [BYTES.decode(corpus.document(i)) for i in range(3)] == ["first", "second text", "third"]
    assert BYTES.decode(corpus.tokens(3, 7)) == "stse"
    assert corpus.tokens(21, 21).size == 0
    assert corpus.index["empty"] == 1
    assert BYTES.eos_id not in corpus.tokens(0, corpus.num_tokens)
    assert corpus.vocabulary_fingerprint == BYTES.fingerprint()


def test_metadata_columns(corpus):
    columns = corpus.metadata
    assert set(columns) == {"year", "score", "good", "who", "tags"}
    assert columns["year"].dtype == np.int64 and columns["year"].tolist() == [1789, 1797, 1801]
    assert columns["good"].dtype == bool and columns["good"].tolist() == [True, False, True]
    np.testing.assert_array_equal(columns["score"], [0.5, 2.0, np.nan])
    assert [columns["who"][i] for i in range(3)] == ["Washington", "Adäms", ""]
    assert [columns["tags"][i] for i in range(3)] == ["", "", '[1, {"b": 2}]']
    with pytest.raises(IndexError):
        columns["who"][3]


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(st.text(alphabet="abc", min_size=1, max_size=6), min_size=1, max_size=8),
    data=st.data(),
)
def test_views_are_the_documents_they_select(texts, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    (folder / "a.txt").write_text("\n".join(texts))
    whole = build_corpus(TextSource(str(folder / "a.txt"), "line"), BYTES, folder / "store")
    index = st.integers(0, len(texts) - 1)
    chosen = data.draw(st.lists(index, min_size=1, max_size=10))
    view = pickle.loads(pickle.dumps(whole.select(chosen)))
    stream = "".join(texts[i] for i in chosen)
    assert view.num_documents == len(chosen) and view.num_tokens == len(stream)
    assert [BYTES.decode(view.document(i)) for i in range(len(chosen))] == [
        texts[i] for i in chosen
    ]
    stop = data.draw(st.integers(0, len(stream)))
    start = data.draw(st.integers(0, stop))
    assert BYTES.decode(view.tokens(start, stop)) == stream[start:stop]
    again = data.draw(st.lists(st.integers(0, len(chosen) - 1), min_size=1, max_size=4))
    twice = view.select(again)
    direct = whole.select([chosen[i] for i in again])
    assert twice.fingerprint == direct.fingerprint
    assert (
        twice.tokens(0, twice.num_tokens).tolist() == direct.tokens(0, direct.num_tokens).tolist()
    )


def test_views_carry_metadata_and_their_own_fingerprint(corpus):
    view = corpus.select(np.flatnonzero(corpus.metadata["good"])[::-1])
    assert view.metadata["year"].tolist() == [1801, 1789]
    assert [view.metadata["who"][i] for i in range(2)] == ["", "Washington"]
    assert view.fingerprint not in (corpus.fingerprint, corpus.select([0, 2]).fingerprint)
    assert view.vocabulary_fingerprint == corpus.vocabulary_fingerprint
    with pytest.raises(UserError, match="no document"):
        corpus.select([])
    for bad in ([3], [-1]):
        with pytest.raises(IndexError):
            corpus.select(bad)


@pytest.mark.parametrize("start, stop", [(-1, 2), (3, 2), (0, 22)])
def test_tokens_out_of_range(corpus, start, stop):
    for each in (corpus, corpus.select([0, 1, 2])):
        with pytest.raises(IndexError):
            each.tokens(start, stop)


@pytest.mark.parametrize("extra_ids, dtype", [(65536 - 259, np.uint16), (65536 - 258, np.uint32)])
def test_two_bytes_a_token_where_the_vocabulary_allows(extra_ids, dtype, tmp_path):
    class Last(ByteVocabulary):
        """Writes every text as its highest id."""

        def _encode_batch(self, texts):
            return [np.array([self.size - 1], np.int32) for _ in texts]

    (tmp_path / "a.txt").write_text("x\n")
    vocabulary = Last(extra_ids=extra_ids)
    corpus = build_corpus(TextSource(str(tmp_path / "a.txt")), vocabulary, tmp_path / "store")
    assert corpus.document(0).dtype == dtype
    assert corpus.document(0).tolist() == [259 + extra_ids - 1]
    size = (tmp_path / "store" / "tokens.bin").stat().st_size
    assert size == np.dtype(dtype).itemsize


@pytest.mark.parametrize(
    "name", ["tokens.bin", "offsets.npy", "column_0000.npy", "column_0004.npy", "column_0003.utf8"]
)
def test_a_file_that_was_cut_short_or_lost_is_named(name, corpus):
    kinds = {column["file"]: column["kind"] for column in corpus.index["columns"].values()}
    assert kinds["column_0003.npy"] == "str"
    path = corpus.directory / name
    whole = path.read_bytes()
    for part in (whole[:-1], whole[:4], b"", None):
        path.unlink() if part is None else path.write_bytes(part)
        with pytest.raises(UserError, match=f"{name}.*build it again"):
            Corpus.open(corpus.directory)


def test_integers_that_a_float_would_round_stay_whole(tmp_path):
    wide = 2**53 + 1
    rows = [{"text": "a", "id": wide, "seen": 5}, {"text": "b", "id": -wide, "n": wide}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = build_corpus(JsonlSource(str(tmp_path / "a.jsonl")), BYTES, tmp_path / "store")
    assert corpus.metadata["id"].dtype == np.int64
    assert corpus.metadata["id"].tolist() == [wide, -wide]
    assert [corpus.metadata["n"][i] for i in range(2)] == ["", str(wide)]
    np.testing.assert_array_equal(corpus.metadata["seen"], [5.0, np.nan])


def test_pickled_corpus_is_its_path(corpus):
    corpus.document(0), corpus.metadata["who"][0]
    data = pickle.dumps(corpus)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again.document(1).tolist() == corpus.document(1).tolist()
    column = pickle.loads(pickle.dumps(corpus.metadata["who"]))
    assert column[1] == "Adäms"


def test_python_source_comes_back_exactly(tmp_path):
    source = PythonSource("validation")
    corpus = build_corpus(source, BYTES, tmp_path, progress=False)
    documents = [d for d in source.documents() if d.text]
    assert corpus.num_documents == len(documents)
    for i, document in enumerate(documents):
        assert BYTES.decode(corpus.document(i)) == document.text
        assert corpus.metadata["path"][i] == document.metadata["path"]
