"""Several processes are one run: same batches, same losses, and one end for all of them."""

import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from etils import epath
from orbax import checkpoint as ocp

from tests.launch.runs import command, environment, metrics, tiny, write_text

# In one place: what they share takes minutes to make.
pytestmark = pytest.mark.xdist_group("processes")

STEPS, LONG = 4, 60
# Four processes have parts of all parameters each; the two that go on from there, of all rows too.
FSDP = ("--gin_file=gin_configs/sharding/fsdp.gin",)
PARTS = ("--gin.train.sharding=@Sharding()", "--gin.Sharding.data=1", "--gin.Sharding.fsdp=1",
         "--gin.Sharding.sequence=2", "--gin.Sharding.tensor=2")  # fmt: skip
# Compiling is most of such a run.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
HELD_OUT = ("--gin.train.evals={'held_out': @TextSource()}", "--gin.train.eval_every=2")


class Group:
    """Processes of launch/train.py that share a number of devices."""

    def __init__(self, count: int, arguments: list[str], last: list[str], devices: int):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        own = f"--xla_force_host_platform_device_count={devices // count}"
        env = environment(XLA_FLAGS=f"{own} {QUICK}")
        self.processes = []
        for process in range(count):
            flags = [f"--coordinator={coordinator}", f"--num_processes={count}"]
            flags = [*flags, f"--process_id={process}"] if count > 1 else []
            flags += last if process == count - 1 else []
            self.processes.append(
                subprocess.Popen(
                    command("train", *arguments, *flags),
                    env=env,
                    cwd="/",
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )  # fmt: skip
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def end(self, timeout: float = 240) -> list[tuple[int, list[str]]]:
        """Each process's exit status and its error lines."""
        found = []
        for process in self.processes:
            _, words = process.communicate(timeout=timeout)
            lines = [line for line in words.splitlines() if line.startswith("error: ")]
            assert "Traceback" not in words, words
            found.append((process.returncode, lines))
        return found

    def signal(self, process: int, number: int) -> None:
        self.processes[process].send_signal(number)

    def wait_for(self, made, timeout: float = 120) -> None:
        """Until `made()`, which must come before any process ends."""
        deadline = time.monotonic() + timeout
        while not made():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.processes), self.end()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(number of processes, workdir, flags, flags of the last one, devices) -> the group."""
    home = tmp_path_factory.mktemp("processes")
    text = tiny(write_text(home / "text.txt"))

    def start(count, workdir, *flags, last=(), devices=4) -> Group:
        arguments = [
            *text, "--gin.train.batch_size=8", "--gin.train.batch_hashes=True",
            f"--gin.train.cache_dir='{home / 'cache'}'", f"--workdir={workdir}", *flags,
        ]  # fmt: skip
        return Group(count, arguments, list(last), devices)

    start.home = home
    return start


def train(start, count: int, workdir: pathlib.Path, *flags: str) -> pathlib.Path:
    # Targets of 34 tokens, which divide among two devices.
    short = [f"--gin.train.steps={STEPS}", "--gin.train.checkpoint_every_steps=2", *HELD_OUT]
    short += ["--gin.train.length=68"]
    with start(count, workdir, *short, *flags) as group:
        assert group.end() == [(0, [])] * count
    return workdir


@pytest.fixture(scope="module")
def by_one(start):
    return train(start, 1, start.home / "one" / "run")


@pytest.fixture(scope="module")
def by_four(start):
    """On a cache of their own, which they build together."""
    workdir = start.home / "four" / "run"
    return train(start, 4, workdir, f"--gin.train.cache_dir='{workdir.parent / 'cache'}'", *FSDP)


def resumed(start, by_four, count: int, *flags: str) -> pathlib.Path:
    """What `count` processes make of four processes' first checkpoint."""
    workdir = start.home / f"from_four_to_{count}" / "run"
    shutil.copytree(by_four / "checkpoints" / "2", workdir / "checkpoints" / "2")
    return train(start, count, workdir, *flags)


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path, first: int = 1) -> None:
    for split in ("train", "held_out"):
        lines, others = (
            [m for m in metrics(w, split) if m["step"] >= first] for w in (workdir, other)
        )
        assert [m["step"] for m in lines] == [m["step"] for m in others] != []
        assert [m.get("batch_hash") for m in lines] == [m.get("batch_hash") for m in others]
        for name in ("loss", "gradient_norm", "parameter_norm"):
            pairs = [[m[name] for m in each if name in m] for each in (lines, others)]
            np.testing.assert_allclose(*pairs, rtol=1e-6)
    assert all(m["batch_hash"] for m in metrics(workdir))


def test_four_processes_train_as_one_does(by_one, by_four):
    assert_same_run(by_four, by_one)
    assert len(metrics(by_four)) == STEPS
    assert (by_four / "config.gin").exists() and (by_four / "tensorboard").is_dir()


@pytest.mark.parametrize("count, parts", [(2, PARTS), (1, ())])
def test_what_four_processes_saved_fewer_resume(start, by_four, by_one, count, parts):
    """However they lay out what they read."""
    assert_same_run(resumed(start, by_four, count, *parts), by_one, first=3)


def arrays(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    reader, path = ocp.PyTreeCheckpointer(), epath.Path(workdir) / "checkpoints" / str(step)
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(path).item_metadata.tree
    )
    tree = reader.restore(path, restore_args=as_numpy)
    return {str(n): np.asarray(leaf).tobytes() for n, leaf in ocp.tree.to_flat_dict(tree).items()}


def latest(workdir: pathlib.Path) -> int:
    folder = workdir / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


def test_processes_that_lose_one_end_and_a_rerun_goes_on(start):
    """Killed at two places and stopped at a third, the run has the bits of one left alone.

    That one is a single process: a sum over two devices has no order.
    """
    long = [f"--gin.train.steps={LONG}", "--gin.train.checkpoint_every_steps=10"]
    alone, broken = start.home / "alone" / "run", start.home / "broken" / "run"
    with start(1, alone, *long, devices=2) as group:
        assert group.end() == [(0, [])]

    for lost in (1, 0):
        before = latest(broken)
        with start(2, broken, *long, devices=2) as group:
            group.wait_for(lambda before=before: latest(broken) > before)
            group.signal(lost, signal.SIGKILL)
            ends = group.end(timeout=60)
        status, [line] = ends[1 - lost]
        assert ends[lost] == (-signal.SIGKILL, []) and status == 75
        assert f"process {lost} of 2 (on {socket.gethostname()}) was lost" in line

    before = latest(broken)
    with start(2, broken, *long, devices=2) as group:
        group.wait_for(lambda: latest(broken) > before)
        group.signal(1, signal.SIGTERM)
        (status, [line]), (other_status, [other_line]) = group.end(timeout=60)
    assert status == other_status == 143 and line == other_line
    stopped = int(re.search(r"stopped by SIGTERM at step (\d+)", line)[1])
    assert before < latest(broken) == stopped == metrics(broken)[-1]["step"] < LONG

    with start(2, broken, *long, devices=2) as group:
        assert group.end() == [(0, [])] * 2
    assert arrays(broken, LONG) == arrays(alone, LONG)
    lines = [[(m["step"], m["loss"], m["batch_hash"]) for m in metrics(w)] for w in (broken, alone)]
    assert lines[0] == lines[1] and len(lines[0]) == LONG


def test_an_error_in_one_process_ends_all(start):
    """Of the first process while the others wait for it, with its line."""
    missing = "--gin.TextSource.paths='/nowhere.txt'"
    with start(2, start.home / "error" / "run", missing) as group:
        ends = group.end(timeout=60)
    assert [status for status, _ in ends] == [1, 1]
    assert all("/nowhere.txt" in line for _, [line] in ends)
    assert "process 0 of 2" in ends[1][1][0]


def test_settings_that_differ_are_told(start):
    differing = start(2, start.home / "differ" / "run", last=("--gin.train.length=32",))
    with differing as group:
        ends = group.end(timeout=60)
    assert [status for status, _ in ends] == [1, 1]
    assert all("process 1 is not set up as process 0" in line for _, [line] in ends)
    assert all(re.search(r"train.length is 32 there, .*\b64\b", line) for _, [line] in ends)
