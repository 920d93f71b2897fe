"""SizedVocabulary: a size and special ids, and no text."""

import pytest

from t5like.data.vocabularies import SizedVocabulary
from t5like.errors import UserError


def test_ids():
    vocabulary = SizedVocabulary(tokens=1000, extra_ids=4, named=("[MASK]", "[NLU]"))
    assert vocabulary.size == 1004
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id) == (0, 1, 0)
    assert (vocabulary.mask_id, vocabulary.named_id("[NLU]"), vocabulary.named_id("[X]")) == (
        3, 4, None,
    )  # fmt: skip
    assert vocabulary.sentinels.tolist() == [1003, 1002, 1001, 1000]
    assert vocabulary.special_ids.tolist() == [0, 1, 2, 3, 4, 1000, 1001, 1002, 1003]


def test_it_reads_no_text():
    with pytest.raises(UserError, match="train.vocabulary"):
        SizedVocabulary().encode("text")
