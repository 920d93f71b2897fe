"""Log lines: never doubled, never lost; the screen on a terminal and elsewhere."""

import contextlib
import io
import json

import pytest
from rich.console import Console

from t5like.errors import UserError
from t5like.training import writers

LINE = {"step": 7, "split": "train", "loss": 1.5, "tokens_per_second": 1000.0, "mfu": None}


def steps(path):
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def test_resuming_drops_lines_past_the_step_and_half_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = writers.JsonLines(path, 0)
    for step in (2, 4, 6, 8):
        first.write({**LINE, "step": step})
    first.close()
    path.write_text(path.read_text() + '{"step": 3, "spl')
    second = writers.JsonLines(path, 5)
    second.write({**LINE, "step": 6})
    second.close()
    assert steps(path) == [2, 4, 6]


def test_a_line_is_on_disk_at_once(tmp_path):
    writer = writers.JsonLines(tmp_path / "metrics.jsonl", 0)
    writer.write(LINE)
    assert steps(tmp_path / "metrics.jsonl") == [7]
    writer.close()


def test_a_full_disk_names_the_file(tmp_path):
    writer = writers.JsonLines(tmp_path / "metrics.jsonl", 0)
    writer._file.close()
    writer._file = open("/dev/full", "w")  # noqa: SIM115  closed by the writer
    with pytest.raises(UserError, match="metrics.jsonl"):
        writer.write(LINE)
    writer.close()  # What could not be written cannot be flushed either, and was told.


def test_a_full_disk_keeps_its_message_through_closing(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl"), contextlib.ExitStack() as stack:
        writer = writers.JsonLines(tmp_path / "metrics.jsonl", 0)
        stack.callback(writer.close)
        writer._file.close()
        writer._file = open("/dev/full", "w")  # noqa: SIM115  closed by the writer
        writer.write(LINE)


def test_tensorboard_on_a_full_disk_warns_once_and_does_not_block(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writers, "_FLUSH_SECONDS", 0.0)
    writer = writers.TensorBoard(tmp_path, 0)
    writer._events._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
    for step in range(20):
        writer.write({**LINE, "step": step})
    writer.close()
    assert caplog.text.count(f"cannot write {tmp_path}") == 1


def test_a_tensorboard_that_cannot_be_opened_names_the_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/tensorboard"):
        writers.TensorBoard(tmp_path / "file" / "tensorboard", 0)


def test_lines_of_splits_evaluated_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = writers.JsonLines(path, 0)
    for split in ("train", "a", "b"):
        first.write({**LINE, "split": split})
    first.close()
    writers.JsonLines(path, 7, ["b"]).close()
    assert [json.loads(text)["split"] for text in path.read_text().splitlines()] == ["train", "a"]


def test_tensorboard_gets_the_numbers(tmp_path):
    writer = writers.TensorBoard(tmp_path, 0)
    writer.write(LINE)
    writer.close()
    [file] = tmp_path.iterdir()
    assert b"train/loss" in file.read_bytes() and b"train/mfu" not in file.read_bytes()


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    screen = writers.Screen(0, 10, Console(file=out, width=120))
    screen.advance(7)
    screen.write(LINE)
    screen.write({"step": 7, "split": "held_out", "loss": 2.0})
    screen.close()
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 7/10  loss 1.5000  1,000 tokens/s  0:00 left")
    assert second == "step 7: held_out loss 2.0000"


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    screen = writers.Screen(0, 10, Console(file=out, width=120, force_terminal=True))
    screen.advance(7)
    screen.write(LINE)
    screen.close()
    assert "7/10" in out.getvalue() and "loss 1.5000" in out.getvalue()
