"""Documents in order, whatever the shards; gzip; and every way that a file can be bad."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import sys
from collections import Counter

import pytest
from etils import epath
from hypothesis import given, settings, strategies as st

from t5like.data.sources import JsonlSource, PythonSource, TextSource, files
from t5like.errors import UserError


def texts(source, num_shards: int = 1) -> list[str]:
    return [d.text for i in range(num_shards) for d in source.documents(i, num_shards)]


def write(path, content: str) -> str:
    """Writes plain or gzip text, as the name says."""
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


# --- text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
@pytest.mark.parametrize(
    "unit, expected",
    [
        ("file", ["one\n two \r\n\n\nthree\u2028x", "four\n"]),
        ("line", ["one", " two ", "", "", "three\u2028x", "four"]),
        ("paragraph", ["one\n two ", "three\u2028x", "four"]),
    ],
)
def test_text_units(unit, expected, suffix, tmp_path):
    write(tmp_path / f"b.{suffix}", "one\n two \r\n\n\nthree\u2028x")
    write(tmp_path / f"c.{suffix}", "four\n")
    assert texts(TextSource(f"{tmp_path}/*.{suffix}", unit)) == expected


@settings(deadline=None, max_examples=60)
@given(
    contents=st.lists(st.text("ab \n\ré", max_size=30), min_size=1, max_size=4),
    num_shards=st.integers(1, 9),
    block=st.integers(1, 20),
)
def test_any_number_of_shards_gives_the_same_lines(contents, num_shards, block, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    paths = [write(folder / f"{i}.txt", content) for i, content in enumerate(contents)]
    expected = [
        line.removesuffix("\r")
        for content in contents
        if content
        for line in content.removesuffix("\n").split("\n")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK", block)
        assert texts(TextSource(paths, "line"), num_shards) == expected


def test_large_files_are_cut_into_shards(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "a line of text\n" * 100)
    monkeypatch.setattr(files, "SHARD_BYTES", 100)
    assert TextSource(path, "line").num_shards() == 15
    assert TextSource(path, "file").num_shards() == 1
    assert TextSource(write(tmp_path / "a.txt.gz", "x\n" * 999), "line").num_shards() == 1


def test_globs_are_sorted_and_lists_keep_their_order(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.txt", name)
    assert texts(TextSource(f"{tmp_path}/*.txt")) == ["a", "b", "c"]
    assert texts(TextSource([f"{tmp_path}/c.txt", f"{tmp_path}/[ab].txt"])) == ["c", "a", "b"]


def test_fingerprint_follows_content_names_and_settings(tmp_path):
    (tmp_path / "x").mkdir()
    one = TextSource(write(tmp_path / "a.txt", "one\ntwo\n"), "line")
    moved = TextSource(write(tmp_path / "x" / "a.txt", "one\ntwo\n"), "line")
    assert one.fingerprint() == moved.fingerprint()
    changed = TextSource(write(tmp_path / "x" / "a.txt", "one\ntwe\n"), "line")
    assert changed.fingerprint() != one.fingerprint()
    assert TextSource(str(tmp_path / "a.txt"), "file").fingerprint() != one.fingerprint()
    assert pickle.loads(pickle.dumps(one)).fingerprint() == one.fingerprint()


# --- JSON lines -----------------------------------------------------------------------------


ROWS = [
    {"text": "first", "year": 1789, "tags": ["a"]},
    {"text": "sécond", "year": 1793},
    {"text": "third", "year": None},
]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_jsonl_text_and_metadata(suffix, tmp_path):
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    path = write(tmp_path / f"a.{suffix}", lines)
    documents = list(JsonlSource(path).documents())
    assert [d.text for d in documents] == ["first", "sécond", "third"]
    assert documents[0].metadata == {"year": 1789, "tags": ["a"]}
    only = JsonlSource(path, metadata_fields=("tags",)).documents()
    assert [d.metadata for d in only] == [{"tags": ["a"]}, {"tags": None}, {"tags": None}]
    assert all(not d.metadata for d in JsonlSource(path, metadata_fields=()).documents())


BROKEN = {
    '{"text": "cut': "not JSON",
    "[1]": "not a JSON object",
    '{"text": 3}': "field 'text' is not a string but int",
    '{"txt": "x"}': "no field 'text': did you mean 'txt'?",
    '{"body": "x"}': "no field 'text': there are body",
    '{"text": "\\ud800"}': "not valid Unicode",
}


@pytest.mark.parametrize("line", BROKEN)
def test_broken_json_line_is_named_or_counted(line, tmp_path, monkeypatch, caplog):
    good = json.dumps({"text": "good"})
    path = write(tmp_path / "a.jsonl", f"{good}\n\n{line}\n{good}\n{line}\n")
    monkeypatch.setattr(files, "_BLOCK", 5)
    for shard_count in (1, 3):
        with pytest.raises(UserError) as error:
            texts(JsonlSource(path), shard_count)
        assert BROKEN[line] in str(error.value) and f"{path}, line 3" in str(error.value)
    skipped = Counter()
    documents = JsonlSource(path, on_error="skip").documents(skipped=skipped)
    assert [d.text for d in documents] == ["good", "good"]
    assert skipped == {path: 2}
    assert caplog.text.count("skipping broken lines") == 1


def test_misspelt_metadata_field_names_the_nearest(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    with pytest.raises(UserError, match="no metadata field 'yaer': did you mean 'year'"):
        texts(JsonlSource(path, metadata_fields=("yaer",)))


def test_settings_that_do_not_exist(tmp_path):
    with pytest.raises(UserError, match="raise or skip"):
        JsonlSource("x", on_error="ignore")
    with pytest.raises(UserError, match="file, line, paragraph"):
        TextSource("x", unit="word")
    with pytest.raises(UserError, match="train, validation"):
        PythonSource("test")


# --- bad files ------------------------------------------------------------------------------


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "corpus.txt", "x")
    with pytest.raises(UserError, match=r"corpsu.txt does not exist: did you mean .*corpus.txt"):
        texts(TextSource(str(tmp_path / "corpsu.txt")))
    with pytest.raises(UserError, match="does not exist: correct the path"):
        texts(TextSource(str(tmp_path / "no" / "such.txt")))


def test_empty_glob_directory_and_no_paths(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*\*\.txt"):
        texts(TextSource(f"{tmp_path}/*.txt"))
    with pytest.raises(UserError, match="is a directory"):
        texts(TextSource(str(tmp_path)))
    with pytest.raises(UserError, match="no paths"):
        texts(TextSource([]))


@pytest.mark.parametrize("unit", ["line", "file"])
def test_truncated_gzip(unit, tmp_path):
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(os.urandom(3000).hex().encode() + b"\n")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="a.txt.gz is truncated"):
        texts(TextSource(str(path), unit))


def test_file_that_is_no_gzip(tmp_path):
    (tmp_path / "a.txt.gz").write_text("plain")
    with pytest.raises(UserError, match="a.txt.gz is not a readable gzip file"):
        texts(TextSource(str(tmp_path / "a.txt.gz"), "line"))


def test_unreadable_file(tmp_path, monkeypatch):
    source = TextSource(write(tmp_path / "a.txt", "x"))

    def refuse(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "open", refuse)
    with pytest.raises(UserError, match=r"a.txt cannot be read \(Permission denied\)"):
        texts(source)


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_text_that_is_not_utf8_names_the_line(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 8)
    path = tmp_path / f"a.{suffix}"
    data = b"fine\n" * 9 + b"caf\xe9\nfine\n"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    for unit in ("line", "file", "paragraph"):
        with pytest.raises(UserError, match=r"a\.txt.*, line 10: not UTF-8"):
            texts(TextSource(str(path), unit))


# --- the embedded default -------------------------------------------------------------------


def test_python_source_splits_by_file():
    train = list(PythonSource().documents())
    held_out = list(PythonSource("validation").documents())
    paths = [{d.metadata["path"] for d in documents} for documents in (train, held_out)]
    assert not paths[0] & paths[1]
    assert "json/decoder.py" in paths[0] | paths[1]
    assert not any({"test", "site-packages"} & set(p.split("/")) for p in paths[0] | paths[1])
    size = sum(len(d.text) for d in train)
    assert size > 5e6
    assert 0.01 < sum(len(d.text) for d in held_out) / size < 0.15


def test_python_source_contents():
    kinds = {
        content: Counter(d.metadata["kind"] for d in PythonSource(content=content).documents())
        for content in ("all", "code")
    }
    assert set(kinds["code"]) == {"code"} and set(kinds["all"]) == {"code", "prose"}
    assert kinds["all"]["code"] == kinds["code"]["code"] > 300
    held_out = list(PythonSource("validation", "prose").documents())
    assert {d.metadata["kind"] for d in held_out} == {"prose"}
    assert any(d.metadata["path"].endswith(".py") for d in held_out)
    assert any(d.metadata["path"].startswith("topics/") for d in held_out)


def test_python_source_is_the_same_in_any_number_of_shards():
    source = PythonSource("validation")
    assert texts(source, 7) == texts(source)
    assert len(texts(source)) > 3


def test_python_source_does_not_import_what_it_reads():
    before = set(sys.modules)
    texts(PythonSource("validation"))
    assert not {"idlelib", "turtle", "antigravity"} & (set(sys.modules) - before)
