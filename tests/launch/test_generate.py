"""launch/generate.py on a checkpoint of a tiny untrained model."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = """
include 'gin_configs/models/tiny.gin'
include 'gin_configs/objectives/span_corruption.gin'
train.source = @PythonSource()
train.vocabulary = @ByteVocabulary()
train.model = @ModelConfig()
train.optimizer = @AdamW()
train.steps = 1
ModelConfig.num_layers = 1
ModelConfig.d_model = 32
ModelConfig.d_ff = 32
ModelConfig.head_dim = 8
AdamW.learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with one checkpoint, saved as a run saves it."""
    import jax

    from launch import assemble, config
    from t5like.models.transformer import init_parameters
    from t5like.training.checkpoints import Checkpoints

    directory = tmp_path_factory.mktemp("run")
    (directory / "page.gin").write_text(PAGE)
    resolved = config.load([str(directory / "page.gin")])
    vocabulary = assemble.resolve_vocabulary(resolved.run, directory / "cache")
    model = assemble.sized(resolved.run.model, vocabulary)
    params = jax.jit(init_parameters, static_argnums=0)(model, jax.random.key(0))
    checkpoints = Checkpoints(directory / "checkpoints")
    info = {"step": 7, "vocabulary": vocabulary.fingerprint()}
    checkpoints.save({"params": {"model": params}}, info, resolved.text())
    checkpoints.close()
    return directory


def run(*arguments, stdin=""):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "generate.py"), *map(str, arguments)],
        input=stdin, capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip


def test_infills_as_json_lines(workdir, tmp_path):
    output = tmp_path / "out.jsonl"
    done = run(
        f"--workdir={workdir}", "--infill", "--format=jsonl", f"--output={output}",
        "--num_samples=2", "--max_new_tokens=5", "--seed=3", "for ____ in range(____):",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, output.read_text().splitlines())
    assert (first["index"], first["sample"], second["sample"]) == (0, 0, 1)
    assert first["log_prob"] != second["log_prob"]
    for record in (first, second):
        one, two = record["fills"]
        assert record["prompt"] == "for ____ in range(____):"
        assert record["text"] == f"for {one} in range({two}):"


def test_completions_of_standard_input_as_text(workdir):
    checkpoint = workdir / "checkpoints" / "7"
    done = run(f"--workdir={checkpoint}", "--beams=2", "--max_new_tokens=4", stdin="ab\ncd\n")
    assert done.returncode == 0, done.stderr
    headings = [line for line in done.stdout.splitlines() if line.startswith("--- prompt")]
    assert len(headings) == 4
    assert "\nab" in done.stdout and "\ncd" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt"], "no workdir"),
        (["--workdir={workdir}", "--infill", "no gap"], "no blank to fill"),
        (["--workdir={workdir}/cache", "x"], "no finished checkpoint"),
        (["--workdir={workdir}", "--top_p=2", "x"], "top_p is 2"),
        (["--workdir={workdir}", "--gin.ModelConfig.d_model=16", "x"], "does not fit this model"),
        (["--workdir={workdir}", "--gin.ByteVocabulary.extra_ids=9", "x"], "another vocabulary"),
    ],
)
def test_errors_are_one_line(workdir, arguments, message):
    done = run(*(argument.format(workdir=workdir) for argument in arguments))
    assert done.returncode == 1
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_help_is_quick_and_lists_the_flags():
    start = time.monotonic()
    done = run("--help")
    seconds = time.monotonic() - start
    for flag in ("infill", "temperature", "top_k", "beams", "gin_file", "workdir"):
        assert f"--{flag}" in done.stdout or f"--[no]{flag}" in done.stdout
    assert seconds < 2
