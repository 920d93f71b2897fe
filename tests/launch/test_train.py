"""launch/train.py from the outside: it trains, resumes to the same bits, and fails in one line."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from etils import epath
from orbax import checkpoint as ocp

from launch import training
from t5like.training import distributed
from tests.launch.runs import command, environment, fail, metrics, run, succeed, tiny, write_text

QUICKSTART = "--gin_file=gin_configs/runs/quickstart.gin"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by name, read with orbax alone."""
    path = epath.Path(workdir) / "checkpoints" / str(step)
    tree = ocp.PyTreeCheckpointer().restore(path)
    return {name: np.asarray(leaf) for name, leaf in ocp.tree.to_flat_dict(tree).items()}


def same_run(one: pathlib.Path, other: pathlib.Path, step: int) -> None:
    """Two runs ended with the same bits and read the same batches."""
    first, second = arrays(one, step), arrays(other, step)
    assert first.keys() == second.keys() and len(first) > 20
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], str(name))
    hashes = [{m["step"]: m["batch_hash"] for m in metrics(w)} for w in (one, other)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == step
    losses = [[m["loss"] for m in metrics(w)] for w in (one, other)]
    assert losses[0] == losses[1]


def wait_for(path: pathlib.Path, process: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def end_at_a_random_moment(workdir, arguments, signal_number) -> tuple[int, str]:
    """Starts a run and signals it after its second checkpoint; its status and its words.

    On a machine so fast that the run was over by then, it is tried again with less delay.
    """
    for attempt in range(6):
        shutil.rmtree(workdir, ignore_errors=True)
        started = subprocess.Popen(
            command("train", *arguments, f"--workdir={workdir}"), env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wait_for(workdir / "checkpoints" / "20", started)
        time.sleep(random.random() / 2**attempt)
        started.send_signal(signal_number)
        output, _ = started.communicate(timeout=120)
        if started.returncode != 0:
            break
    return started.returncode, output


def kill_and_rerun(tmp_path, arguments, signal_number, status) -> pathlib.Path:
    """Ends a run at a random moment after its second checkpoint and runs it again."""
    workdir = tmp_path / "killed"
    found, output = end_at_a_random_moment(workdir, arguments, signal_number)
    assert found == status, output
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert 20 <= saved <= 40
    before = [line for line in metrics(workdir) if line["step"] <= saved]
    succeed("train", *arguments, f"--workdir={workdir}")
    # It went on from the checkpoint: the lines up to there, speeds included, are the first run's.
    assert metrics(workdir)[: len(before)] == before and len(before) == saved
    return workdir


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The arguments of a short quickstart and the workdir where it ran undisturbed."""
    base = tmp_path_factory.mktemp("quickstart")
    arguments = [
        QUICKSTART, "--gin.train.steps=40", "--gin.train.checkpoint_every_steps=10",
        "--gin.train.log_every=1", "--gin.train.batch_hashes=True", "--gin.train.eval_batches=2",
        "--gin.train.quality=False", f"--gin.train.cache_dir='{base / 'cache'}'",
        "--gin.train.keep=10",
    ]  # fmt: skip
    succeed("train", *arguments, f"--workdir={base / 'straight'}")
    return arguments, base / "straight"


def test_killed_at_a_random_moment_it_resumes_to_the_same_bits(quickstart, tmp_path):
    arguments, straight = quickstart
    workdir = kill_and_rerun(tmp_path, arguments, signal.SIGKILL, -signal.SIGKILL)
    same_run(workdir, straight, 40)


def test_sigterm_saves_and_exits_with_143(quickstart, tmp_path):
    arguments, straight = quickstart
    workdir = kill_and_rerun(tmp_path, arguments, signal.SIGTERM, 143)
    same_run(workdir, straight, 40)


def test_a_finished_run_is_left_alone_and_a_raised_budget_extends_it(text, tmp_path):
    arguments = [*tiny(text), f"--workdir={tmp_path}", "--gin.train.batch_hashes=True"]
    succeed("train", *arguments, "--gin.train.steps=3")
    before = (tmp_path / "metrics.jsonl").read_text()
    assert "finished before" in succeed("train", *arguments, "--gin.train.steps=3").stdout
    assert (tmp_path / "metrics.jsonl").read_text() == before
    succeed("train", *arguments, "--gin.train.steps=5")
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_workdir_may_be_relative(text, tmp_path):
    succeed("train", *tiny(text), "--workdir=runs/one", "--gin.train.steps=1", cwd=tmp_path)
    succeed("train", *tiny(text), "--workdir=runs/one", "--gin.train.steps=2", cwd=tmp_path)
    assert [m["step"] for m in metrics(tmp_path / "runs" / "one")] == [1, 2]
    start = "--gin.train.init_from='runs/one'"
    succeed("train", *tiny(text), start, "--workdir=two", "--gin.train.steps=1", cwd=tmp_path)
    filled = succeed("generate", "--workdir=runs/one", "--infill", "line ____ is", cwd=tmp_path)
    assert filled.stdout.startswith("line ")


def test_budgets_in_tokens_and_flops(text, tmp_path):
    succeed("train", *tiny(text), f"--workdir={tmp_path / 'a'}", "--gin.train.steps=2")
    line = metrics(tmp_path / "a")[-1]
    for name in ("tokens", "flops"):
        limit = line[name] / 2 * 3
        succeed(
            "train", *tiny(text), f"--workdir={tmp_path / name}", "--gin.train.steps=None",
            f"--gin.train.{name}={limit}",
        )  # fmt: skip
        assert metrics(tmp_path / name)[-1]["step"] == 3


def test_the_quickstart_ends_with_three_losses_and_three_infills(quickstart, tmp_path):
    arguments, straight = quickstart
    for name in ("checkpoints", "metrics.jsonl"):
        copy = shutil.copytree if (straight / name).is_dir() else shutil.copy
        copy(straight / name, tmp_path / name)
    more = ["--gin.train.steps=41", "--gin.train.quality=True"]
    shown = succeed("train", *arguments, *more, f"--workdir={tmp_path}").stdout
    quality = json.loads((tmp_path / "quality.json").read_text())
    for name in ("loss", "wrong_input_loss", "unigram_entropy"):
        assert 1 < quality[name] < 10 and f"{quality[name]:.3f}" in shown
    assert quality["tokens"] > 100 and shown.count("Infill ") == 3


def test_a_lost_device_exits_with_75(monkeypatch, text, tmp_path):
    def lost(**_):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: socket closed")

    monkeypatch.setattr(training, "fit", lost)
    pages = [a.partition("=")[2] for a in tiny(text) if a.startswith("--gin_file")]
    flags = [a[len("--gin.") :].replace("=", " = ", 1) for a in tiny(text) if "--gin." in a]
    with pytest.raises(distributed.Restart, match="socket closed") as raised:
        training.train(pages, flags, str(tmp_path))
    assert raised.value.exit_status == 75


def test_a_workdir_that_cannot_be_made(text, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in fail("train", *tiny(text), f"--workdir={tmp_path / 'file' / 'run'}")


def test_a_line_of_metrics_has_what_the_contract_names(text, tmp_path):
    succeed("train", *tiny(text), f"--workdir={tmp_path}", "--gin.train.steps=2")
    for line in metrics(tmp_path):
        assert {
            "step", "split", "loss", "tokens", "tokens_per_second", "flops", "learning_rate",
            "gradient_norm", "update_norm", "parameter_norm",
        } <= line.keys()  # fmt: skip
    assert (tmp_path / "config.gin").is_file() and list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "checkpoints" / "2" / "config.gin").is_file()


def test_init_from_takes_another_runs_parameters_and_starts_at_step_0(text, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    succeed("train", *tiny(text), f"--workdir={first}", "--gin.train.steps=2")
    succeed(
        "train", *tiny(text), f"--workdir={second}", "--gin.train.steps=1",
        f"--gin.train.init_from='{first}'", "--gin.WarmupStableDecay.peak=0.0",
        "--gin.Muon.weight_decay=0.0",
    )  # fmt: skip
    taken, given = arrays(second, 1), arrays(first, 2)
    parameters = [name for name in given if name[0] == "params"]
    assert parameters
    for name in parameters:
        np.testing.assert_array_equal(taken[name], given[name])


def test_another_setting_of_identity_is_refused_and_a_free_one_is_not(text, tmp_path):
    arguments = [*tiny(text), f"--workdir={tmp_path}"]
    succeed("train", *arguments, "--gin.train.steps=1")
    before = sorted(os.listdir(tmp_path / "checkpoints"))
    message = fail("train", *arguments, "--gin.train.steps=2", "--gin.ModelConfig.d_ff=64")
    assert "ModelConfig.d_ff was 32 and is now 64" in message
    message = fail("train", *arguments, "--gin.train.steps=2", "--seed=5")
    assert "train.seed was 0 and is now 5" in message
    assert sorted(os.listdir(tmp_path / "checkpoints")) == before
    succeed("train", *arguments, "--gin.train.steps=2", "--gin.train.log_every=2")


def test_training_needs_neither_tensorflow_nor_seqio_nor_tfds(text, tmp_path):
    blocked = tmp_path / "blocked"
    for name in ("tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('blocked by a test')\n")
    for page in ("span_corruption", "mlm", "causal_lm", "prefix_lm"):
        succeed(
            "train", *tiny(text), f"--gin_file=gin_configs/objectives/{page}.gin",
            f"--workdir={tmp_path / page}", "--gin.train.steps=1", PYTHONPATH=str(blocked),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["train", "show_examples", "generate"])
def test_help_comes_at_once(name):
    start = time.monotonic()
    shown = run(name, "--help")
    assert "--gin_file" in shown.stdout
    # The contract is two seconds on an idle machine; tests may share theirs.
    assert time.monotonic() - start < 4
    imported = subprocess.run(
        command(name, "--help")[:1] + ["-X", "importtime"] + command(name, "--help")[1:],
        capture_output=True, text=True, env=environment(),
    ).stderr  # fmt: skip
    assert "jax" not in imported and "tensorflow" not in imported


# --- bad input -------------------------------------------------------------------------------


def test_an_objective_that_cannot_train_the_architecture(text, tmp_path):
    message = fail(
        "train", *tiny(text), "--gin_file=gin_configs/objectives/mlm.gin",
        "--gin.ModelConfig.architecture='encoder_decoder'", f"--workdir={tmp_path}",
    )  # fmt: skip
    assert "MaskedLM" in message and "'encoder_decoder'" in message
    assert not (tmp_path / "checkpoints").exists()


def test_no_workdir_and_a_stray_argument():
    assert "--workdir" in fail("train", QUICKSTART)
    assert "'stray'" in fail("train", QUICKSTART, "--workdir=/tmp/unused", "stray")


def test_an_empty_corpus(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    message = fail("train", *tiny(empty), f"--workdir={tmp_path / 'run'}")
    assert "empty.txt" in message


def test_a_missing_file_names_the_path(tmp_path):
    missing = tmp_path / "nowhere.txt"
    assert str(missing) in fail("train", *tiny(missing), f"--workdir={tmp_path / 'run'}")


def test_too_few_sentinels(text, tmp_path):
    message = fail(
        "train", *tiny(text), f"--workdir={tmp_path}", "--gin.ByteVocabulary.extra_ids=1",
    )  # fmt: skip
    assert "sentinels" in message and "extra_ids" in message


def test_another_vocabulary_than_the_checkpoints(text, tmp_path):
    arguments = [*tiny(text), f"--workdir={tmp_path}"]
    succeed("train", *arguments, "--gin.train.steps=1")
    message = fail("train", *arguments, "--gin.train.steps=2", "--gin.ByteVocabulary.extra_ids=77")
    assert "ByteVocabulary.extra_ids" in message
