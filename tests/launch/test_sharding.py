"""One device equals eight, for every objective and preset; nothing is ever whole on one device."""

from __future__ import annotations

from tests import many_devices
from tests.launch.runs import ROOT
from tests.launch.sharded_runs import PRESETS, THOROUGH
from tests.launch.test_every_objective import PAGES


def test_every_objective_is_the_same_on_every_mesh(tmp_path):
    done = many_devices.run(8, "-m", "tests.launch.sharded_runs", str(tmp_path))
    assert done.returncode == 0, done.stderr[-5000:]
    said = done.stdout.splitlines()
    assert {"refuses", "initialises in pieces", "goes on"} <= set(said)
    same = {line.split()[1]: line.split()[2:] for line in said if line.startswith("same ")}
    assert same.keys() == {*PAGES, "distillation"}
    pages = {path.stem for path in (ROOT / "gin_configs" / "sharding").glob("*.gin")}
    assert {page for page, _ in PRESETS.values()} == pages
    assert set(same["span_corruption"]) == {"mixed", *PRESETS}
    assert all(set(presets) <= set(same[page]) for page, presets in THOROUGH.items())
