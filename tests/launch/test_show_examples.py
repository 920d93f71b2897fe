"""launch/show_examples.py from the command line, on a small file."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (
    "The quick brown fox jumps over the lazy dog. It was a bright cold day in April, and the "
    "clocks were striking thirteen.\nNobody in the town had ever seen such a thing before.\n"
)
BASE = [
    "--gin_file=gin_configs/runs/quickstart.gin",
    "--gin.train.vocabulary=@ByteVocabulary()",
    "--gin.train.length=64",
]


def show(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "launch" / "show_examples.py", *arguments],
        capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "99"},
    )  # fmt: skip


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


def examples(tmp_path, page, path, n=2, *more):
    done = show(
        tmp_path, *BASE, f"--gin_file=gin_configs/objectives/{page}.gin", f"--input={path}",
        f"--n={n}", "--format=jsonl", f"--workdir={tmp_path / 'w'}", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def text_of(ids):
    """Byte vocabulary: id = byte + 3."""
    return bytes(i - 3 for i in ids).decode()


def test_span_corruption_as_jsonl(tmp_path, text_file):
    lines = examples(tmp_path, "span_corruption", text_file)
    assert [line["index"] for line in lines] == [0, 1]
    assert all(set(x) == {"index", "objective", "window", "features", "text"} for x in lines)
    first = lines[0]
    assert first["objective"] == "SpanCorruption"
    assert text_of(first["window"]) == first["text"]["window"] == TEXT[: len(first["window"])]
    assert text_of(first["window"] + lines[1]["window"]) in TEXT
    features = {name: np.array(ids) for name, ids in first["features"].items()}
    assert len(features["encoder_input_tokens"]) == 64
    kept = features["encoder_input_tokens"]
    noise = features["decoder_target_tokens"][features["decoder_loss_weights"] > 0]
    words = [i for i in [*kept, *noise] if 3 <= i < 259]
    assert sorted(words) == sorted(first["window"])
    assert "<extra_id_0>" in first["text"]["encoder_input_tokens"]


def test_masked_lm_as_jsonl_and_by_seed(tmp_path, text_file):
    first, again, other = (
        examples(tmp_path, "mlm", text_file, 1, f"--seed={seed}")[0] for seed in (1, 1, 2)
    )
    features = {name: np.array(ids) for name, ids in first["features"].items()}
    assert features["encoder_target_tokens"].tolist() == first["window"]
    assert features["encoder_loss_weights"].sum() == round(0.15 * 64)
    assert first == again and first != other


def test_text_shows_prefix_and_target(tmp_path, text_file):
    done = show(
        tmp_path, *BASE, "--gin_file=gin_configs/objectives/prefix_lm.gin",
        f"--input={text_file}", "--n=1", f"--workdir={tmp_path / 'w'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "prefix (seen both ways)" in done.stdout and "decoder says" in done.stdout
    assert "The quick" in done.stdout and "predicted" in done.stdout


def test_json_lines_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": TEXT}) + "\n")
    (example,) = examples(tmp_path, "causal_lm", path, 1)
    assert example["text"]["decoder_target_tokens"] == TEXT[:64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=absent.txt"], "absent.txt"),
        (["--gin_file=gin_configs/objectives/mlm.gin", "--gin.ModelConfig.architecture='decoderr'"],
         "decoder"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tmp_path, arguments, message):
    done = show(tmp_path, *BASE, *arguments, f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and message in done.stderr
