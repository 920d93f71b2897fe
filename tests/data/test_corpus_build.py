"""Building: the same bytes whoever builds and however often killed; bad input; full disks."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from t5like.data import atomic, parts
from t5like.data.corpus import Corpus, build_corpus, corpus_fingerprint
from t5like.data.sources import JsonlSource, TextSource, files
from t5like.data.store import INDEX
from t5like.data.vocabularies import ByteVocabulary
from t5like.errors import UserError

BYTES = ByteVocabulary()


def stored(directory: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.name != ".lock"}


SHARD_BYTES = 8000
SHARDS = 5


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture
def source(tmp_path) -> JsonlSource:
    path = tmp_path / "a.jsonl"
    rows = ({"text": f"document {i} " * (i % 14), "n": i, "who": f"w{i}"} for i in range(300))
    path.write_text("\n".join(map(json.dumps, rows)))
    source = JsonlSource(str(path))
    assert source.num_shards() == SHARDS
    return source


@pytest.fixture
def expected(source, tmp_path) -> dict[str, bytes]:
    build_corpus(source, BYTES, tmp_path / "expected", workers=1)
    return stored(tmp_path / "expected")


def test_any_number_of_shards_gives_the_same_store(source, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 1 << 20)
    assert source.num_shards() == 1
    build_corpus(source, BYTES, tmp_path / "one", workers=1)
    one = stored(tmp_path / "one")
    assert one == expected
    assert "column_0001.utf8" in one and "parts" not in " ".join(one)


# Builds a.jsonl, and dies in the middle of shard number `die_in` unless that is -1.
SCRIPT = f"""
    import os, signal, sys
    from t5like.data import parts
    from t5like.data.corpus import build_corpus
    from t5like.data.sources import JsonlSource, files
    from t5like.data.vocabularies import ByteVocabulary

    def deadly(documents, batches=parts._batches, calls=[]):
        calls.append(0)
        for batch in batches(documents):
            yield batch
            if len(calls) == int(sys.argv[4]) + 1:
                os.kill(os.getpid(), signal.SIGKILL)

    files.SHARD_BYTES = {SHARD_BYTES}
    parts._batches = deadly

    if __name__ == "__main__":
        source = JsonlSource(sys.argv[1])
        build_corpus(source, ByteVocabulary(), sys.argv[2], workers=int(sys.argv[3]))
"""


def start_build(tmp_path, directory, *, workers: int = 1, die_in: int = -1) -> subprocess.Popen:
    script = tmp_path / "build.py"
    script.write_text(textwrap.dedent(SCRIPT))
    arguments = [tmp_path / "a.jsonl", directory, str(workers), str(die_in)]
    return subprocess.Popen([sys.executable, script, *arguments], stderr=subprocess.PIPE)


def test_any_number_of_processes_gives_the_same_store(source, expected, tmp_path):
    build = start_build(tmp_path, tmp_path / "two", workers=2)
    _, errors = build.communicate()
    assert build.returncode == 0
    assert not errors  # No progress bar without a terminal.
    assert stored(tmp_path / "two") == expected


def test_killed_build_keeps_finished_shards(source, expected, tmp_path, monkeypatch):
    directory = tmp_path / "store"
    build = start_build(tmp_path, directory, die_in=3)
    build.communicate()
    assert build.returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="no complete store"):
        Corpus.open(directory)
    redone = []
    documents = JsonlSource.documents

    def watched(self, shard, num_shards, **settings):
        redone.append(shard)
        return documents(self, shard, num_shards, **settings)

    monkeypatch.setattr(JsonlSource, "documents", watched)
    build_corpus(source, BYTES, directory, workers=1)
    assert redone == [3, 4]
    assert stored(directory) == expected


def test_killed_worker_is_an_error_and_keeps_finished_shards(source, expected, tmp_path):
    build = start_build(tmp_path, tmp_path / "store", workers=2, die_in=1)
    _, errors = build.communicate()
    assert build.returncode == 1
    assert b"UserError: a tokenising process was killed" in errors
    assert list((tmp_path / "store").glob("parts-*/*.json"))
    build_corpus(source, BYTES, tmp_path / "store", workers=1)
    assert stored(tmp_path / "store") == expected


def test_killed_merge_starts_again(source, expected, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_columns", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_corpus(source, BYTES, tmp_path / "store", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(JsonlSource, "documents", lambda *_, **__: pytest.fail("read again"))
        build_corpus(source, BYTES, tmp_path / "store", workers=1)
    assert stored(tmp_path / "store") == expected


def test_a_second_process_waits_for_the_first(source, expected, tmp_path):
    builds = [start_build(tmp_path, tmp_path / "store") for _ in range(2)]
    for build in builds:
        build.communicate()
    assert [build.returncode for build in builds] == [0, 0]
    assert stored(tmp_path / "store") == expected


def test_complete_store_is_opened_not_built(source, tmp_path, monkeypatch):
    first = build_corpus(source, BYTES, tmp_path / "store", workers=1)
    monkeypatch.setattr(parts, "write_part", lambda *_: pytest.fail("built again"))
    again = build_corpus(source, BYTES, tmp_path / "store", workers=1)
    assert again.fingerprint == first.fingerprint == corpus_fingerprint(source, BYTES)


# --- errors ---------------------------------------------------------------------------------


def test_another_vocabulary_or_source_names_both(source, tmp_path):
    build_corpus(source, BYTES, tmp_path / "store", workers=1)
    other = ByteVocabulary(extra_ids=7)
    with pytest.raises(UserError) as error:
        build_corpus(source, other, tmp_path / "store", workers=1)
    for name in ("extra_ids=125", "extra_ids=7", BYTES.fingerprint(), other.fingerprint()):
        assert name in str(error.value)
    with pytest.raises(UserError, match="was built with"):
        Corpus.open(tmp_path / "store", other)
    skipping = dataclasses.replace(source, on_error="skip")
    with pytest.raises(UserError, match="on_error='raise'.*not from.*on_error='skip'"):
        build_corpus(skipping, BYTES, tmp_path / "store", workers=1)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n', "broken\n"])
def test_empty_corpus(content, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    source = JsonlSource(str(tmp_path / "a.jsonl"), on_error="skip")
    with pytest.raises(UserError, match=r"a.jsonl.*has no text: the corpus would be empty"):
        build_corpus(source, BYTES, tmp_path / "store", workers=1)


def test_skipped_lines_are_counted_in_the_index(source, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text() + "\nbroken\n[]\n")
    skipping = dataclasses.replace(source, on_error="skip")
    corpus = build_corpus(skipping, BYTES, tmp_path / "store", workers=1)
    assert corpus.index["skipped"] == {str(path): 2}
    assert corpus.index["empty"] == 22
    assert corpus.num_documents == 278


def test_error_in_a_worker_process_reaches_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 20 + "broken\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 21: not JSON"):
        build_corpus(JsonlSource(str(path)), BYTES, tmp_path / "store", workers=2)


def test_full_disk_names_the_path_and_loses_nothing(source, expected, tmp_path):
    directory = tmp_path / "store"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(len(data) for data in expected.values())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limit[1]))
        with pytest.raises(UserError, match=r"no space left to write .*tokens.bin"):
            build_corpus(source, BYTES, directory, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(directory.glob("**/*.tmp"))
    assert len(list(directory.glob("parts-*/*.json"))) == SHARDS
    build_corpus(source, BYTES, directory, workers=1)
    assert stored(directory) == expected


def test_unwritable_directory(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/store cannot be written"):
        build_corpus(source, BYTES, tmp_path / "file" / "store", workers=1)
    with pytest.raises(UserError, match="must be on a local disk: set train.cache_dir"):
        build_corpus(source, BYTES, "gs://bucket/store", workers=1)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as stream:
        stream.write(b"new")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and path.read_bytes() == b"old"


def test_store_cut_short(source, tmp_path):
    corpus = build_corpus(source, BYTES, tmp_path / "store", workers=1)
    os.truncate(tmp_path / "store" / "tokens.bin", 100)
    with pytest.raises(UserError, match="tokens.bin has 100 bytes instead of"):
        Corpus.open(tmp_path / "store")
    with pytest.raises(UserError, match="was cut short"):
        corpus.document(corpus.num_documents - 1)
    (tmp_path / "store" / INDEX).write_text("{")
    with pytest.raises(UserError, match="store.json cannot be read"):
        Corpus.open(tmp_path / "store")


def test_throughput_is_close_to_the_tokenizers_own(shared_data, tmp_path):
    """Reading, batching and writing must stay a small part of the cost of tokenising."""
    from t5like.data.vocabularies import SentencePieceVocabulary

    path = str(shared_data / "text" / "wikitext2_valid.txt.gz")
    source = TextSource([path] * 4, "line")
    vocabulary = SentencePieceVocabulary(str(shared_data / "tokenizers" / "t5_en_32k.spiece.model"))
    lines = [document.text for document in source.documents()]
    vocabulary.encode_batch(lines[:10])

    def seconds(function, *arguments) -> float:
        start = time.process_time()
        function(*arguments)
        return time.process_time() - start

    ratios = []
    for i in range(3):
        folder = tmp_path / str(i)
        folder.mkdir()
        alone = seconds(vocabulary.encode_batch, lines)
        ratios.append(seconds(parts.write_part, source, vocabulary, 0, 1, folder) / alone)
    assert min(ratios) < 1.6, ratios
