"""Regenerates docs/compile_reports: what each large page compiles to, on hardware that is not here.

    python docs/compile_reports.py [PAGE ...]

`make compile-reports` calls it. Each page's compile is its own process, in the environment of its
compiler (.venv-tpu, .venv-cuda). Writes PAGE.md and PAGE.json for each, the same of two layers in
shallow.json, and README-table.md from all that are there.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "compile_reports"
# Page -> topology.
PAGES = {
    "t5_1_1_base_v5e1": "v5e:1x1",
    "t5_1_1_base_v5e256": "v5e:16x16",
    "t5_1_1_xxl_v5e256": "v5e:16x16",
    "t5_1_1_xxl_v5e256_data": "v5e:16x16",
    "ul2_20b_v5p128": "v5p-128",
    "ul2_20b_v5e256": "v5e:16x16",
    "electra_large_v5e16": "v5e:4x4",
    "yi_6b_h100x8": "h100:8",
    "yi_6b_h100x64": "h100:64",
}
# The form that tests compile again, and what is recorded of it.
SHALLOW = ("--gin.ModelConfig.num_layers=2", "--tries=0")
SHALLOW_FILE = FOLDER / "shallow.json"
HEAD = (
    "page", "chips", "preset", "parameters", "peak / memory a device", "FLOPs / model's",
    "collectives / floor", "compile time", "MFU at most",
)  # fmt: skip


def command(page: str, workdir: str, *more: str) -> list[str]:
    """The compile of a page as a user types it; `more` goes to launch/compile.py."""
    return [
        "launch/compile.py", f"--gin_file=gin_configs/runs/{page}.gin",
        f"--topology={PAGES[page]}", "--nogenerate", f"--workdir={workdir}", *more,
    ]  # fmt: skip


def python(page: str) -> str:
    """The interpreter that has a page's compiler."""
    platform = "cuda" if PAGES[page].startswith("h100") else "tpu"
    return str(ROOT / f".venv-{platform}" / "bin" / "python")


def compiled(page: str, *more: str) -> tuple[str, dict]:
    """(what the compile of a page printed, its record).

    Raises:
      SystemExit: it ended without a record.
    """
    with tempfile.TemporaryDirectory() as workdir:
        done = subprocess.run(
            [python(page), *command(page, workdir, *more)], cwd=ROOT, capture_output=True, text=True
        )
        saved = pathlib.Path(workdir) / "compile.json"
        if not saved.exists():
            raise SystemExit(f"{page}: {done.stderr[-2000:]}")
        return done.stdout, json.loads(saved.read_text())


def regenerate(page: str) -> None:
    """Compiles a page whole and shallow, and writes what came of it."""
    write(page, *compiled(page))
    known = json.loads(SHALLOW_FILE.read_text()) if SHALLOW_FILE.exists() else {}
    known[page] = small(compiled(page, *SHALLOW)[1])
    SHALLOW_FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def write(page: str, printed: str, record: dict) -> None:
    """PAGE.md: the command and what it printed; PAGE.json: what tests compare."""
    typed = " ".join(command(page, "DIR"))
    verdict = "It fits." if record["advice"] is None else record["advice"]["summary"]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{page}.md").write_text(
        f"# {page}\n\n    python {typed}\n\n{verdict}\n\n```\n{printed.rstrip()}\n```\n"
    )
    (FOLDER / f"{page}.json").write_text(json.dumps(small(record), indent=1) + "\n")


def small(record: dict) -> dict:
    """The numbers of a record that are compared and tabled."""
    train = record["programs"][0]
    memory, flops = train.get("memory") or {}, train.get("flops") or {}
    return {
        "topology": record["topology"],
        "chips": record["chips"],
        "mesh": {axis: size for axis, size in record["mesh"].items() if size > 1},
        "parameters": record["parameters"],
        "remat": record["remat"],
        "hbm": record["hbm"],
        "fits": train["fits"],
        "peak": memory.get("peak", (record["advice"] or {}).get("needed")),
        "flops": flops.get("compiled"),
        "flops_ratio": flops.get("ratio"),
        "wire": train.get("wire"),
        "floor_ratio": (train.get("floor") or {}).get("ratio"),
        "compile_seconds": train["seconds"]["compile"],
        "mfu": (train.get("roofline") or {}).get("mfu"),
    }


def table() -> str:
    """What fits where, as markdown, of the reports that are there."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
    for page in PAGES:
        path = FOLDER / f"{page}.json"
        if path.exists():
            lines.append("| " + " | ".join(row(page, json.loads(path.read_text()))) + " |")
    return "\n".join(lines) + "\n"


def row(page: str, of: dict) -> list[str]:
    """A page's cells, see HEAD."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in of["mesh"].items()) or "one device"
    fits = "" if of["fits"] else " (does not fit)"
    ratio, floor, mfu = of["flops_ratio"], of["floor_ratio"], of["mfu"]
    return [
        f"[{page}](docs/compile_reports/{page}.md)",
        of["topology"],
        f"{mesh}; remat {of['remat']}",
        f"{of['parameters'] / 1e9:.2f} B",
        f"{of['peak'] / 1e9:.1f} / {of['hbm'] / 1e9:.1f} GB{fits}",
        f"{ratio:.3f}" if ratio else "-",
        f"{floor:.3f}" if floor else "-",
        f"{of['compile_seconds']:.0f} s",
        f"{mfu[1]:.0%} to {mfu[0]:.0%}" if mfu else "-",
    ]


if __name__ == "__main__":
    for name in sys.argv[1:] or PAGES:
        regenerate(name)
        print(name, "done", flush=True)
    (FOLDER / "README-table.md").write_text(table())
