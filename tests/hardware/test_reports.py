"""The large pages still compile to what docs/compile_reports says: two layers of each."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest

from tests.hardware import topologies

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("compile_reports", ROOT / "docs/compile_reports.py")
reports = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reports)

PLATFORM = "tpu" if topologies.missing("tpu") is None else "cuda"
RECORDED = json.loads(reports.SHALLOW_FILE.read_text())
MINE = [page for page in RECORDED if (reports.PAGES[page][:4] == "h100") == (PLATFORM == "cuda")]


def test_every_page_has_a_report():
    assert set(RECORDED) == set(reports.PAGES)
    for page in reports.PAGES:
        whole = json.loads((reports.FOLDER / f"{page}.json").read_text())
        assert whole["fits"] != page.endswith("_data")
        assert f"gin_configs/runs/{page}.gin" in (reports.FOLDER / f"{page}.md").read_text()
    assert (reports.FOLDER / "README-table.md").read_text() == reports.table()


@pytest.mark.parametrize("page", MINE)
def test_a_shallow_form_has_not_drifted(page):
    now, then = reports.small(reports.compiled(page, *reports.SHALLOW)[1]), RECORDED[page]
    for name in ("topology", "mesh", "parameters", "fits"):
        assert now[name] == then[name], name
    assert now["peak"] == pytest.approx(then["peak"], rel=0.05)
    assert now["flops_ratio"] == pytest.approx(then["flops_ratio"], rel=0.01)
    if then["wire"]:
        assert now["wire"] == pytest.approx(then["wire"], rel=0.03)
