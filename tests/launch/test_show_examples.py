"""launch/show_examples.py from the command line, on a small file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from launch.show_examples import LOOKS
from objectives.show_reader import STYLES
from tests.launch.runs import fail, succeed

TEXT = (
    "The quick brown fox jumps over the lazy dog. It was a bright cold day in April, and the "
    "clocks were striking thirteen.\nNobody in the town had ever seen such a thing before.\n"
)
BASE = (
    "--gin_file=gin_configs/runs/quickstart.gin",
    "--gin.train.vocabulary=@ByteVocabulary()",
    "--gin.train.length=64",
)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


def show(tmp_path, page, path, *more):
    """What is printed of the file under an objective's page."""
    return succeed(
        "show_examples", *BASE, f"--gin_file=gin_configs/objectives/{page}.gin",
        f"--input={path}", f"--workdir={tmp_path / 'w'}", *more, COLUMNS="99",
    ).stdout  # fmt: skip


def examples(tmp_path, page, path, n=2, *more):
    text = show(tmp_path, page, path, f"--n={n}", "--format=jsonl", *more)
    return [json.loads(line) for line in text.splitlines()]


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


def test_text_shows_prefix_and_target_and_the_mask(tmp_path, text_file):
    printed = show(tmp_path, "prefix_lm", text_file, "--n=1", "--mask")
    assert "prefix (seen both ways)" in printed and "decoder says" in printed
    assert "The quick" in printed and "predicted" in printed
    assert "the decoder's 64 slots see each other (queries downwards, keys across)" in printed
    pictured = [line[13:].rstrip() for line in printed.splitlines() if "█" in line]
    assert len(pictured) == 32
    # Both ways within the prefix, then one key more for each query.
    widths = np.array([len(line) for line in pictured])
    assert widths[0] > 1 and (np.diff(widths) >= 0).all() and widths[-1] == 64


def test_mask_as_jsonl(tmp_path, text_file):
    (example,) = examples(tmp_path, "causal_lm", text_file, 1, "--mask")
    assert example["mask"]["decoder"] == ["1" * (i + 1) + "0" * (63 - i) for i in range(64)]


def test_every_style_has_a_look_and_colours_reach_a_terminal(tmp_path, text_file):
    assert list(LOOKS) == list(STYLES)
    arguments = (*BASE, f"--input={text_file}", "--n=1", f"--workdir={tmp_path / 'w'}")
    printed = succeed("show_examples", *arguments, FORCE_COLOR="1", TERM="xterm-256color").stdout
    # The first sentinel and its span share a hue, in black on it and in it.
    assert "\x1b[1;30;43m<extra_id_0>" in printed and printed.count("\x1b[33m") >= 3


def test_several_objectives_are_shown_by_turns(tmp_path, text_file):
    lines = examples(tmp_path, "biphasic", text_file, 4)
    names = [line["objective"] for line in lines]
    assert names[0] == names[2] != names[1] == names[3]
    assert [line["index"] for line in lines] == [0, 0, 1, 1]


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
    assert message in fail("show_examples", *BASE, *arguments, f"--workdir={tmp_path / 'w'}")
