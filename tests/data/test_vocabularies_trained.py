"""The vocabulary that is trained on the corpus: lossless, deterministic, cached, loud."""

from __future__ import annotations

import dataclasses
import gzip
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from t5like.data.sources import PythonSource, TextSource
from t5like.data.vocabularies import SentencePieceVocabulary, TrainedVocabulary
from t5like.data.vocabularies.trained import sample
from t5like.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SentencePieceVocabulary:
    small = TrainedVocabulary(size=1024, sample_bytes=1 << 18)
    return small.resolve(PythonSource(), tmp_path_factory.mktemp("cache"))


def test_ids(trained):
    assert trained.size == 1024 and trained.lossless
    assert (trained.pad_id, trained.eos_id, trained.unk_id, trained.bos_id) == (0, 1, 2, 0)
    assert trained.sentinels.tolist() == list(range(1023, 923, -1))


def test_source_code_round_trips(trained):
    documents = list(PythonSource("validation").documents())
    texts = [document.text for document in documents]
    for text, ids in zip(texts, trained.encode_batch(texts), strict=True):
        assert trained.decode(ids) == text
        assert trained.unk_id not in ids


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_round_trips(trained, text):
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "\ta\r\n  b ", "\u2581 \u2581", "<extra_id_0></s>", "\x00", "\ufb01"]
)
def test_awkward_text_round_trips(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_newlines_and_indentation_are_pieces(trained):
    pieces = [trained.piece(i) for i in trained.encode("if x:\n        return\n")]
    assert pieces.count("\n") == 2 and "\u2581" * 8 in pieces
    starts = trained.word_starts()
    assert starts[trained.encode("\n")].all() and not starts[trained.encode(":")].any()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic_across_processes(model_type, tmp_path):
    make = TrainedVocabulary(size=600, model_type=model_type, sample_bytes=1 << 16)
    code = (
        "import sys; from t5like.data.sources import PythonSource;"
        "from t5like.data.vocabularies import TrainedVocabulary as T;"
        f"T(size=600, model_type={model_type!r}, sample_bytes=1 << 16)"
        ".resolve(PythonSource(), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True)
    here = make.resolve(PythonSource(), tmp_path / "here")
    other = make.resolve(PythonSource(), tmp_path / "other")
    assert here.path != other.path and here.fingerprint() == other.fingerprint()


def test_cached_under_settings_and_source(tmp_path, monkeypatch):
    make = TrainedVocabulary(size=500, extra_ids=10, sample_bytes=1 << 15)
    first = make.resolve(PythonSource(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [first.path.rsplit("/", 1)[1]]
    other = dataclasses.replace(make, size=501).resolve(PythonSource(), tmp_path)
    assert other.path != first.path and other.size == 501
    monkeypatch.setattr(TrainedVocabulary, "_train", lambda *_: pytest.fail("trained again"))
    assert make.resolve(PythonSource(), tmp_path).path == first.path


def test_failures_name_the_mend(tmp_path):
    (tmp_path / "tiny.txt").write_text("a b c\n")
    source = TextSource(str(tmp_path / "tiny.txt"))
    for model_type in ("bpe", "unigram"):
        with pytest.raises(UserError, match=r"vocabulary of 4096 ids .*lower TrainedVocab"):
            TrainedVocabulary(model_type=model_type).resolve(source, tmp_path / "cache")
    with pytest.raises(UserError, match="choose one of bpe, unigram"):
        TrainedVocabulary(model_type="wordpiece")


def test_size_holds_pieces_that_serve_the_text(trained):
    """A vocabulary that learned nothing but bytes would be no vocabulary."""
    text = next(PythonSource("validation").documents()).text
    assert len(text) / len(trained.encode(text)) > 2
    assert np.unique(trained.encode(text)).size > 150


def test_a_source_that_cannot_be_cut_gives_its_whole_sample(tmp_path):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"a line of some text\n" * 20_000))
    for unit in ("line", "file"):
        taken = sum(map(len, sample(TextSource(str(path), unit), 100_000)))
        assert 90_000 < taken < 110_000
