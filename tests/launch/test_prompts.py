"""Prompts from arguments, lines and JSON lines; results as text and JSON lines."""

from __future__ import annotations

import gzip
import io
import json

import pytest

from launch import prompts
from t5like.errors import UserError


@pytest.fixture
def stdin(monkeypatch):
    def give(text, terminal=False):
        stream = io.StringIO(text)
        stream.isatty = lambda: terminal
        monkeypatch.setattr("sys.stdin", stream)

    return give


def test_arguments_are_prompts_as_they_are(stdin):
    stdin("ignored\n")
    assert prompts.read_prompts(["a\nb", ""], None) == ["a\nb", ""]


@pytest.mark.parametrize(
    "text",
    [
        "one\n\n  two \r\n",
        '{"prompt": "one"}\n{"text": "  two "}\n',
    ],
)
def test_standard_input_is_lines_or_json_lines(stdin, text):
    stdin(text)
    assert prompts.read_prompts([], None) == ["one", "  two "]
    stdin(text)
    assert prompts.read_prompts([], "-") == ["one", "  two "]


def test_a_line_that_is_json_but_no_prompt_is_text(stdin):
    stdin('{"a": 1}\n{\n')
    assert prompts.read_prompts([], None) == ['{"a": 1}', "{"]


def test_files_may_be_packed(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress('{"prompt": "é\\n____"}\n'.encode()))
    assert prompts.read_prompts([], str(path)) == ["é\n____"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": 3}\n', 'p.jsonl:2: no string field "prompt"'),
        ("p.jsonl", b'{"prompt": "x"}\n{"pro\n', "p.jsonl:2: not a JSON line"),
        ("p.txt", b" \n\n", "p.txt is empty"),
        ("p.txt", b"\xff\xfe", "p.txt cannot be read"),
        ("p.gz", b"no gzip", "p.gz cannot be read"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        prompts.read_prompts([], str(tmp_path / name))


def test_no_prompt_or_two_sources(stdin, tmp_path):
    stdin("", terminal=True)
    with pytest.raises(UserError, match="no prompt"):
        prompts.read_prompts([], None)
    with pytest.raises(UserError, match="one of the two"):
        prompts.read_prompts(["x"], "file")
    with pytest.raises(UserError, match="absent cannot be read"):
        prompts.read_prompts([], str(tmp_path / "absent"))


def test_one_result_is_bare_and_several_have_headings():
    record = {"index": 0, "sample": 0, "text": "a b", "log_prob": -1.0}
    assert prompts.as_text([record]) == "a b\n"
    second = record | {"index": 1, "sample": 2}
    assert prompts.as_text([record, second]).count("a b") == 2
    assert "prompt 2, sequence 3, log-probability -1.00" in prompts.as_text([record, second])
    assert [json.loads(line) for line in prompts.as_jsonl([record, second]).splitlines()] == [
        record, second,
    ]  # fmt: skip


def test_results_go_to_a_file_or_say_why_not(tmp_path, capsys):
    prompts.write("x\n", None)
    assert capsys.readouterr().out == "x\n"
    prompts.write("ü\n", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "ü\n"
    with pytest.raises(UserError, match="cannot be written"):
        prompts.write("x", str(tmp_path / "no" / "out"))
