"""launch/generate.py on a checkpoint of a tiny untrained model."""

from __future__ import annotations

import functools
import json
import time

import pytest

from launch import generate, show_examples
from launch.runs import load_run
from t5like.errors import UserError
from t5like.inference.generate import Decoding, Generator
from tests.launch.runs import fail, run, succeed

PAGE = """
include 'gin_configs/models/tiny.gin'
include 'gin_configs/objectives/{objective}.gin'
train.source = @PythonSource()
train.vocabulary = @ByteVocabulary()
train.model = @ModelConfig()
train.optimizer = @AdamW()
train.steps = 1
train.length = 128
ModelConfig.num_layers = 1
ModelConfig.d_model = 32
ModelConfig.d_ff = 32
ModelConfig.head_dim = 8
AdamW.learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def workdir_of(tmp_path_factory):
    """Name of an objective's page -> a workdir with one checkpoint, saved as a run saves it."""
    import jax

    from launch import assemble, config
    from t5like.models.transformer import init_parameters
    from t5like.training.checkpoints import Checkpoints

    def make(objective):
        directory = tmp_path_factory.mktemp(objective)
        (directory / "page.gin").write_text(PAGE.format(objective=objective))
        resolved = config.load([str(directory / "page.gin")])
        vocabulary = assemble.resolve_vocabulary(resolved.run, directory / "cache")
        model = assemble.sized(resolved.run.model, vocabulary)
        params = jax.jit(init_parameters, static_argnums=0)(model, jax.random.key(0))
        checkpoints = Checkpoints(directory / "checkpoints")
        info = {"step": 7, "vocabulary": vocabulary.fingerprint()}
        checkpoints.save({"params": {"model": params}}, info, resolved.text())
        checkpoints.close()
        return directory

    return functools.cache(make)


@pytest.fixture(scope="module")
def workdir(workdir_of):
    """A run of span corruption."""
    return workdir_of("span_corruption")


def test_infills_as_json_lines(workdir, tmp_path):
    output = tmp_path / "out.jsonl"
    succeed(
        "generate", f"--workdir={workdir}", "--infill", "--format=jsonl", f"--output={output}",
        "--num_samples=2", "--max_new_tokens=5", "--seed=3", "for ____ in range(____):",
    )  # fmt: skip
    first, second = map(json.loads, output.read_text().splitlines())
    assert (first["index"], first["sample"], second["sample"]) == (0, 0, 1)
    assert first["log_prob"] != second["log_prob"]
    for record in (first, second):
        one, two = record["fills"]
        assert record["prompt"] == "for ____ in range(____):"
        assert record["text"] == f"for {one} in range({two}):"


def test_completions_of_standard_input_as_text(workdir):
    checkpoint = workdir / "checkpoints" / "7"
    done = succeed(
        "generate", f"--workdir={checkpoint}", "--beams=2", "--max_new_tokens=4", stdin="ab\ncd\n"
    )
    headings = [line for line in done.stdout.splitlines() if line.startswith("--- prompt")]
    assert len(headings) == 4
    assert "\nab" in done.stdout and "\ncd" in done.stdout


def test_codegen2_infills_several_blanks_by_the_command_line(workdir_of):
    done = succeed(
        "generate", f"--workdir={workdir_of('codegen2')}", "--infill", "--format=jsonl",
        "--beams=2", "--max_new_tokens=4", "____(____)",
    )  # fmt: skip
    best, second = map(json.loads, done.stdout.splitlines())
    assert best["score"] >= second["score"]
    for record in (best, second):
        assert record["text"] == "{}({})".format(*record["fills"])


def test_fim_infills_one_blank_and_says_that_it_has_no_more(workdir_of):
    loaded = load_run(str(workdir_of("fim")))
    generator = Generator(loaded.model, loaded.params, loaded.vocabulary)
    infill_format = loaded.infilling()
    prompts, decoding = ["x = ____", "____"], Decoding(max_new_tokens=4)
    first, second = generate.generate(generator, prompts, decoding, 0, infill_format)
    assert first["text"] == "x = " + first["fills"][0] and len(second["fills"]) == 1
    with pytest.raises(UserError, match="'____ and ____' has 2 blanks.* at most 1"):
        list(generate.generate(generator, ["____ and ____"], decoding, 0, infill_format))


@pytest.mark.parametrize("page", ["ul2", "causal_lm"])
def test_the_way_to_infill_is_the_objectives(workdir_of, page):
    loaded = load_run(str(workdir_of(page)))
    assert not loaded.bidirectional_inputs  # nothing but an encoder reads both ways
    if page == "causal_lm":
        with pytest.raises(UserError, match="CausalLM, does not teach a model to fill blanks"):
            loaded.infilling()
        return
    infill_format = loaded.infilling()
    [mode] = infill_format.mode_ids
    assert loaded.bound[0].named_tokens[mode] == "[R]"
    assert mode not in infill_format.sentinels


def test_command_lines_can_be_imported_together():
    assert generate.main is not show_examples.main


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
    assert message in fail("generate", *(a.format(workdir=workdir) for a in arguments))


def test_help_is_quick_and_lists_the_flags():
    start = time.monotonic()
    done = run("generate", "--help")
    seconds = time.monotonic() - start
    for flag in ("infill", "temperature", "top_k", "beams", "gin_file", "workdir"):
        assert f"--{flag}" in done.stdout or f"--[no]{flag}" in done.stdout
    assert seconds < 2
