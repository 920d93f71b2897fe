"""A run whose workdir, page and text lie in a bucket: killed, resumed, and read."""

import json
import pathlib
import signal
import subprocess
import time

import pytest

from launch import config, training
from tests.launch.bucket import Bucket
from tests.launch.runs import TINY, command, environment, metrics, succeed, tiny, write_text

MORE = (
    "--gin.train.steps=12", "--gin.train.checkpoint_every_steps=4", "--gin.train.keep=2",
    "--gin.train.batch_hashes=True", "--gin.train.profile=(9,10)",
)  # fmt: skip


@pytest.fixture
def bucket():
    made = Bucket()
    yield made
    made.close()


def steps_of(bucket: Bucket) -> set[int]:
    """Steps of the checkpoints that are finished."""
    names = [name.split("/") for name in list(bucket.objects)]
    return {int(n[2]) for n in names if n[1:2] == ["checkpoints"] and n[-1] == "commit_success.txt"}


def kill_after_a_checkpoint(bucket: Bucket, arguments, variables) -> None:
    """Starts a run and kills it once it has saved a checkpoint."""
    started = subprocess.Popen(
        command("train", *arguments), env=environment(**variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not steps_of(bucket) & {4, 8}:
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.communicate()


def train_here(arguments, workdir: pathlib.Path) -> None:
    """Trains in this process."""
    pages = [a.partition("=")[2] for a in arguments if a.startswith("--gin_file")]
    flags = [a[len("--gin.") :].replace("=", " = ", 1) for a in arguments if "--gin." in a]
    training.train_resolved(config.load(pages, flags), str(workdir), progress=False)


def test_a_run_in_a_bucket_is_killed_and_goes_on_to_the_same_losses(bucket, tmp_path):
    text = write_text(tmp_path / "text.txt")
    bucket.put("text.txt", text.read_bytes())
    bucket.put("page.gin", b"TextSource.paths = 'gs://bucket/text.txt'\n")
    (tmp_path / "hook").mkdir()
    variables = bucket.environment(tmp_path / "hook")
    arguments = [*TINY, *MORE, "--gin_file=gs://bucket/page.gin", "--workdir=gs://bucket/run"]

    kill_after_a_checkpoint(bucket, arguments, variables)
    # As if the kill had come in the middle of a save.
    bucket.put("run/checkpoints/10/checkpoint.json", b"{}")
    done = succeed("train", *arguments, **variables)
    assert "gs://bucket/run" in done.stdout and "t5like/bucket-run" in done.stderr
    assert steps_of(bucket) == {8, 12}
    assert not any(name.startswith("run/checkpoints/10/") for name in bucket.objects)

    train_here([*tiny(text), *MORE], tmp_path / "local")
    lines = [json.loads(line) for line in bucket.objects["run/metrics.jsonl"].splitlines()]
    wanted = [(m["step"], m["loss"], m["batch_hash"]) for m in metrics(tmp_path / "local")]
    assert [(m["step"], m["loss"], m["batch_hash"]) for m in lines] == wanted
    for start in (
        "run/config.gin", "run/tensorboard/events", "run/cache/compiled/jit_train_step",
        "run/tensorboard/plugins/profile/updates_9_10/",
    ):  # fmt: skip
        assert any(name.startswith(start) for name in bucket.objects), start

    asked = ["--workdir=gs://bucket/run", "--infill", "line ____ is"]
    filled = succeed("generate", *asked, **variables)
    assert filled.stdout.startswith("line ")
