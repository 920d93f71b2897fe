import numpy as np
import pytest
from hypothesis import given, strategies as st

from t5like.data.examples import Document, Window
from t5like.data.units import cut
from tests.data.tiny import MemoryCorpus

DOCUMENTS = st.lists(st.integers(0, 12), min_size=1, max_size=20).filter(sum)
SEPARATOR = 1


def stream_of(corpus, separator):
    """The tokens of all documents one after another, and the document of each."""
    tokens, documents = [], []
    for i in range(corpus.num_documents):
        piece = corpus.tokens(corpus.offsets[i], corpus.offsets[i + 1]).tolist()
        tokens += piece + ([] if separator is None else [separator])
        documents += [i] * (len(tokens) - len(documents))
    return np.array(tokens), np.array(documents)


@given(DOCUMENTS, st.integers(1, 15), st.sampled_from([None, SEPARATOR]))
def test_windows_are_the_stream_cut_into_equal_parts(lengths, size, separator):
    corpus = MemoryCorpus(lengths)
    tokens, documents = stream_of(corpus, separator)
    units = cut(corpus, Window(size, separator))
    records = [units.record(i) for i in range(len(units))]
    np.testing.assert_array_equal(np.concatenate([r.tokens for r in records]), tokens)
    raw_lengths = units.raw_lengths(np.arange(len(units)))
    assert raw_lengths.tolist() == [len(r.tokens) for r in records]
    assert (raw_lengths[:-1] == size).all() and 1 <= raw_lengths[-1] <= size
    for i, record in enumerate(records):
        expected = documents[i * size : (i + 1) * size]
        _, ranks = np.unique(expected, return_inverse=True)
        np.testing.assert_array_equal(record.documents, ranks)
        assert record.metadata == {"year": 2000 + expected[0]}
        assert record.tokens.dtype == record.documents.dtype == np.int32


@given(DOCUMENTS, st.integers(1, 15))
def test_documents_are_cut_into_consecutive_pieces(lengths, size):
    corpus = MemoryCorpus(lengths)
    units = cut(corpus, Document(size))
    records = [units.record(i) for i in range(len(units))]
    tokens, documents = stream_of(corpus, None)
    np.testing.assert_array_equal(np.concatenate([r.tokens for r in records]), tokens)
    assert len(records) == sum(-(-n // size) for n in lengths)
    raw_lengths = units.raw_lengths(np.arange(len(units)))
    assert raw_lengths.tolist() == [len(r.tokens) for r in records]
    assert raw_lengths.min() >= 1 and raw_lengths.max() <= size
    ends = set(corpus.offsets[1:].tolist())
    position = 0
    for record in records:
        assert record.metadata["year"] == 2000 + documents[position]
        assert not record.documents.any()
        position += len(record.tokens)
        assert record.ends_document == (position in ends)


def test_a_unit_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="unknown unit"):
        cut(MemoryCorpus([3]), "paragraph")
