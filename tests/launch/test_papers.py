"""Every page of gin_configs/papers, cut down to two updates of a tiny model, from end to end."""

from __future__ import annotations

import dataclasses
import math

import pytest
from etils import epath

from launch import config
from launch.comparison import report, runs
from launch.comparison.trials import trials

from .runs import write_text

PAGES = sorted(p.stem for p in (config.PAGES / "papers").glob("*.gin"))
SHORT = [
    "train.optimizer = @AdamW()",
    "AdamW.learning_rate = @WarmupStableDecay()",
    "train.batch_size = 2",
    "train.log_every = 1",
    "ModelConfig.num_layers = 1",
    "ModelConfig.d_model = 16",
    "ModelConfig.d_ff = 16",
    "ModelConfig.num_heads = 1",
    "ModelConfig.head_dim = 16",
    "train.vocabulary = @ByteVocabulary()",
]
MEASURES = {
    "PythonStatements.train": 40,
    "PythonStatements.test": 20,
    "FineTune.steps": 2,
    "FineTunedRetrieval.steps": 2,
    "BeirRetrieval.max_documents": 20,
    "Infilling.pieces": 4,
    "Infilling.characters": 48,
    "Infilling.hidden": 8,
    "Continuation.pieces": 4,
    "Continuation.characters": 48,
}


@pytest.fixture
def data(shared_data, tmp_path, monkeypatch):
    """A working directory with the folders that a page asks for."""
    (tmp_path / "data").mkdir()
    retrieval = {
        "scifact": "retrieval/scifact", "cranfield": "restricted/retrieval/cranfield"
    }  # fmt: skip
    for name, place in retrieval.items():
        (tmp_path / "data" / name).symlink_to(shared_data.resolve() / place)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ready(request, page):
    """What the page needs: nothing, or the data of the one that names some."""
    if "data/" in (config.PAGES / "papers" / f"{page}.gin").read_text():
        request.getfixturevalue("data")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_end_to_end(page, ready, tmp_path):
    text = write_text(tmp_path / "text.txt", 40)
    compare = shortened(page)
    source = ["train.source = @TextSource()", f"TextSource.paths = '{text}'"]
    compare = dataclasses.replace(compare, base=[*compare.base, *SHORT, *source])
    workdir = epath.Path(tmp_path / "out")
    results: dict[str, dict[int, dict]] = {}
    for trial in trials(compare, workdir):
        results[trial.name] = {trial.seed: runs.run(compare, trial)}
    table = report.write(compare, results, workdir)
    shown = [name for name in compare.runs if name not in compare.hidden]
    assert [line.split(" | ")[0] for line in table.splitlines()[2 : 2 + len(shown)]] == [
        f"| {name}" for name in shown
    ]
    for name in shown:
        found = report.final(results[name][0])
        assert found and all(math.isfinite(value) for value in found.values())
    metrics = [metric for name in shown for metric in report.final(results[name][0])]
    measured = {metric.partition("/")[0] for metric in metrics}
    assert measured == set(compare.measures)


def shortened(page: str):
    """The page's comparison with few texts to measure on, one seed and next to no budget."""
    path = f"gin_configs/papers/{page}.gin"
    used = config.load([path], root="compare").bindings
    bindings = [
        f"{name} = {value}"
        for setting, value in MEASURES.items()
        for name in used
        if name == setting or name.endswith(f"/{setting}")
    ]
    compare = config.load([path], bindings, root="compare").run
    # A control that differs by its budget alone would be the same run again.
    again = {name for name in compare.factors if name not in compare.hidden}
    kept = {name: run for name, run in compare.runs.items() if name not in again}
    return dataclasses.replace(
        compare, runs=kept, factors={}, seeds=[0], flops=None, tokens=256.0, points=1
    )
