"""How long a run takes to its first update, and what depth adds to that.

    python benchmarks/startup.py                      # 4 and 24 layers, 3 rounds
    python benchmarks/startup.py --depths 4,48 --rounds 5 --page gin_configs/objectives/mlm.gin

Starts `launch/train.py` as a user does, a fresh process each time and depths taking turns, and
takes the seconds until metrics.jsonl has its first line: `cold` with nothing compiled, `warm` with
the compiled programs of the run before in the cache folder. The corpus is built beforehand. Ratios
are those of the medians, deepest over shallowest, of seconds on the clock and of seconds of
processor time (Linux), which other work on the machine disturbs less; benchmarks/startup.md has
what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = (
    "--gin.ModelConfig.d_model=128", "--gin.ModelConfig.d_ff=256", "--gin.ModelConfig.num_heads=4",
    "--gin.ModelConfig.head_dim=32", "--gin.ModelConfig.num_decoder_layers=None",
    "--gin.ModelConfig.scan_layers=True",
    "--gin.train.batch_size=8", "--gin.train.length=128", "--gin.train.steps=1",
    "--gin.train.log_every=1", "--gin.train.evals=None", "--gin.train.quality=False",
    "--gin.train.optimizer=@AdamW()", "--gin.train.vocabulary=@ByteVocabulary()",
)  # fmt: skip


def start(depth: int, folder: pathlib.Path, page: str | None) -> tuple[float, float]:
    """(seconds, processor seconds) from the start of a run of `depth` layers to its first line."""
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    pages = ["gin_configs/runs/quickstart.gin", *([page] if page else [])]
    command = [
        sys.executable, str(ROOT / "launch" / "train.py"), *(f"--gin_file={p}" for p in pages),
        *SMALL, f"--gin.ModelConfig.num_layers={depth}", f"--gin.train.cache_dir='{folder}'",
        f"--workdir={workdir}",
    ]  # fmt: skip
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = workdir / "metrics.jsonl"
    while not log.exists() or not log.stat().st_size:
        if process.poll() is not None:
            sys.exit(process.communicate()[0].decode())
        time.sleep(0.005)
    found = time.monotonic() - begun, processor_seconds(process.pid)
    process.communicate()
    return found


def processor_seconds(pid: int) -> float:
    """What a process has used so far, all its threads together; nan where that is not known."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(depths: list[int], rounds: int, page: str | None) -> dict[str, dict[int, list]]:
    """{"cold" or "warm": {depth: (seconds, processor seconds) of each round}}."""
    found = {kind: {depth: [] for depth in depths} for kind in ("cold", "warm")}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        start(depths[0], folder, page)  # Builds the corpus.
        for _ in range(rounds):
            for depth in depths:
                shutil.rmtree(folder / "compiled", ignore_errors=True)
                for kind in found:
                    found[kind][depth].append(start(depth, folder, page))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depths", default="4,24", help="numbers of layers, rising")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", help="a page over the quickstart's, such as an objective")
    parser.add_argument("--output", help="a JSON file for all seconds")
    asked = parser.parse_args()
    depths = [int(depth) for depth in asked.depths.split(",")]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    found = measure(depths, asked.rounds, asked.page)
    for kind, by_depth in found.items():
        for number, what in enumerate(("s", "s of processor time")):
            times = {depth: [pair[number] for pair in pairs] for depth, pairs in by_depth.items()}
            medians = {depth: statistics.median(times[depth]) for depth in depths}
            for depth in depths:
                spread = f"{min(times[depth]):.1f} to {max(times[depth]):.1f}"
                print(f"{kind}: {depth:3} layers {medians[depth]:6.2f} {what} ({spread})")
            print(f"{kind}: ratio {medians[depths[-1]] / medians[depths[0]]:.2f}", flush=True)
    if asked.output:
        pathlib.Path(asked.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
