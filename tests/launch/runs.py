"""Running the command lines as a user does: another process, its exit status and its words."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A model and a corpus so small that starting Python and compiling is most of a run.
TINY = (
    "--gin_file=gin_configs/runs/quickstart.gin",
    "--gin.ModelConfig.num_layers=1",
    "--gin.ModelConfig.d_model=32",
    "--gin.ModelConfig.d_ff=32",
    "--gin.ModelConfig.num_heads=2",
    "--gin.ModelConfig.head_dim=16",
    "--gin.train.source=@TextSource()",
    "--gin.train.vocabulary=@ByteVocabulary()",
    "--gin.train.evals=None",
    "--gin.train.quality=False",
    "--gin.train.batch_size=4",
    "--gin.train.length=64",
    "--gin.train.log_every=1",
)


def tiny(path: pathlib.Path) -> list[str]:
    """TINY over the text file at `path`."""
    return [*TINY, f"--gin.TextSource.paths='{path}'"]


def write_text(path: pathlib.Path, lines: int = 400) -> pathlib.Path:
    """A text file with something to learn in it."""
    path.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(lines)))
    return path


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", **changes}


def run(
    name: str, *arguments: str, timeout: int = 240, cwd: str = ROOT.anchor, stdin: str = "",
    **changes: str,
) -> subprocess.CompletedProcess:
    """Runs launch/NAME.py to its end from an unrelated directory.

    Args:
      stdin: what it reads from standard input.
      changes: of the environment.
    """
    return subprocess.run(
        command(name, *arguments), env=environment(**changes), cwd=cwd,
        capture_output=True, text=True, timeout=timeout, input=stdin,
    )  # fmt: skip


def succeed(name: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """As `run`, for commands that must end with status 0."""
    done = run(name, *arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def fail(name: str, *arguments: str, **options) -> str:
    """Runs a command that must end with status 1 and one line, which is returned."""
    done = run(name, *arguments, **options)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


def metrics(workdir: pathlib.Path, split: str = "train") -> list[dict]:
    """Lines of metrics.jsonl of one split."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == split]
