"""Regenerates docs/compile_reports: what each large page compiles to, on hardware that is not here.

    python docs/compile_reports.py [PAGE ...]

`make compile-reports` calls it. Each page's compile is its own process, in the environment of its
compiler (.venv-tpu, .venv-cuda) and may take LIMIT seconds. Writes PAGE.md and PAGE.json for each,
the same of its small form (FORMS) in shallow.json, and the table in README.md from the reports that
are there. `python docs/compile_reports.py --table` writes the table only.
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
# What a page's command has beside that. Settings are not tried by compiling here: a try takes as
# long as the report of a page that fits.
MORE = {"t5_1_1_xxl_v5e256_data": ("--tries=0",)}
LIMIT = 600
# The small forms that tests compile again, each in under a minute: two layers, and for a TPU, whose
# compiler is slow, narrow ones and short rows.
NARROW = (
    "--gin.ModelConfig.d_ff=512", "--gin.ModelConfig.num_heads=4", "--gin.train.length=128",
    "--gin.train.targets_length=128",
)  # fmt: skip
FORMS = {
    "t5_1_1_base_v5e256": ("--gin.ModelConfig.d_model=256", *NARROW),
    "t5_1_1_xxl_v5e256": ("--gin.ModelConfig.d_model=512", *NARROW),
    "yi_6b_h100x8": (),
    "yi_6b_h100x64": (),
}
SHALLOW = ("--gin.ModelConfig.num_layers=2", "--tries=0")
SHALLOW_FILE = FOLDER / "shallow.json"
README = ROOT / "README.md"
MARKS = ("<!-- compile reports: make compile-reports -->\n", "<!-- end of compile reports -->\n")
HEAD = (
    "page", "chips", "preset", "parameters", "peak / memory a device", "FLOPs / model's",
    "collectives / floor", "compile time", "MFU, about",
)  # fmt: skip


def command(page: str, workdir: str, *more: str) -> list[str]:
    """The compile of a page as a user types it; `more` goes to launch/compile.py."""
    return [
        "launch/compile.py", f"--gin_file=gin_configs/runs/{page}.gin",
        f"--topology={PAGES[page]}", "--nogenerate", f"--workdir={workdir}",
        *MORE.get(page, ()), *more,
    ]  # fmt: skip


def python(page: str) -> str:
    """The interpreter that has a page's compiler."""
    platform = "cuda" if PAGES[page].startswith("h100") else "tpu"
    return str(ROOT / f".venv-{platform}" / "bin" / "python")


def compiled(page: str, *more: str) -> tuple[str, dict]:
    """(what the compile of a page printed, its record).

    Raises:
      SystemExit: it ended without a record, or not in LIMIT seconds.
    """
    with tempfile.TemporaryDirectory() as workdir:
        typed = [python(page), *command(page, workdir, *more)]
        try:
            done = subprocess.run(
                typed, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{page}: not compiled in {LIMIT} s") from None
        saved = pathlib.Path(workdir) / "compile.json"
        if not saved.exists():
            raise SystemExit(f"{page}: {done.stderr[-2000:]}")
        return done.stdout, json.loads(saved.read_text())


def regenerate(page: str) -> None:
    """Compiles a page, and its small form if it has one, and writes what came of it."""
    write(page, *compiled(page))
    if page in FORMS:
        record_form(page)


def small_form(page: str) -> dict:
    """The numbers of a page's small form, compiled now."""
    return small(compiled(page, *SHALLOW, *FORMS[page])[1])


def record_form(page: str) -> None:
    """Writes the numbers of a page's small form to SHALLOW_FILE."""
    known = json.loads(SHALLOW_FILE.read_text()) if SHALLOW_FILE.exists() else {}
    known[page] = small_form(page)
    known = {name: known[name] for name in FORMS if name in known}
    SHALLOW_FILE.write_text(json.dumps(known, indent=1) + "\n")


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
    missing = [page for page in PAGES if not (FOLDER / f"{page}.json").exists()]
    if missing:
        names = ", ".join(f"`{page}`" for page in missing)
        lines += ["", f"Not reported yet, so nothing is claimed of them: {names}."]
    return "\n".join(lines) + "\n"


def put_table(readme: str) -> str:
    """The README's text with the table of now between MARKS."""
    before, rest = readme.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}{table()}{MARKS[1]}{after}"


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
    if sys.argv[1:] != ["--table"]:
        for name in sys.argv[1:] or PAGES:
            regenerate(name)
            print(name, "done", flush=True)
    README.write_text(put_table(README.read_text()))
