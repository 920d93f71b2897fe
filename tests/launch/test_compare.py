"""Comparisons: statistics by hand, and the command as a user meets it, cut short and wrong too."""

from __future__ import annotations

import json
import math

import pytest
from etils import epath

from launch import config
from launch.comparison import report, runs
from launch.comparison.statistics import summarise
from t5like.errors import UserError

from .runs import ROOT, fail, run, succeed, write_text

PAGE = """
compare.base = ['gin_configs/runs/small.gin', 'train.source = @TextSource()',
    'train.vocabulary = @ByteVocabulary()', 'ModelConfig.num_layers = 1',
    'ModelConfig.d_model = 32', 'ModelConfig.d_ff = 32', 'ModelConfig.num_heads = 2',
    'ModelConfig.head_dim = 16',
    'train.batch_size = 4', "TextSource.paths = '{text}'"]
compare.runs = {{
    'mlm': [],
    'clm, after': ['gin_configs/objectives/causal_lm.gin'],
}}
compare.factors = {{'mlm': 2}}
compare.tokens = 2048
compare.seeds = [0, 1]
compare.points = 2
compare.curve = ['continuation']
compare.measures = {{'continuation': @Continuation()}}
Continuation.source = @TextSource()
Continuation.pieces = 4
Continuation.characters = 20
TextSource.paths = '{text}'
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    text = write_text(folder / "text.txt")
    page = folder / "page.gin"
    page.write_text(PAGE.format(text=text))
    return page


def load(page, *bindings):
    return config.load([str(page)], bindings, root="compare").run


# --- statistics ------------------------------------------------------------------------------


def test_a_summary_is_the_mean_the_spread_and_the_paired_difference():
    found = summarise({0: 1.0, 1: 2.0, 2: 6.0}, {0: 0.0, 1: 2.0, 2: 4.0})
    assert found.mean == 3.0 and found.seeds == 3
    assert found.spread == pytest.approx(math.sqrt(7.0))
    assert found.difference == pytest.approx(1.0)
    # Differences 1, 0, 2: standard deviation 1; t(0.975, 2) = 4.3027.
    assert found.smallest_effect == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert not found.shows


def test_one_seed_shows_nothing_and_pairs_are_of_equal_seeds():
    one = summarise({0: 1.0}, {0: 0.0})
    assert one.difference == 1.0 and math.isnan(one.smallest_effect) and not one.shows
    assert math.isnan(summarise({0: 1.0}, {1: 0.0}).difference)
    steady = summarise({0: 2.0, 1: 2.1, 2: 2.2}, {0: 1.0, 1: 1.1, 2: 1.2})
    assert steady.shows


# --- what is run -----------------------------------------------------------------------------


def test_trials_have_their_budget_seed_and_the_workdirs_of_others(page, tmp_path):
    bindings = ["compare.runs = {'mlm': [], 'more': ['train.init_from = \"{mlm}\"']}"]
    planned = list(runs.trials(load(page, *bindings), epath.Path(tmp_path)))
    assert [(t.name, t.seed) for t in planned] == [
        ("mlm", 0), ("more", 0), ("mlm", 1), ("more", 1)
    ]  # fmt: skip
    assert "train.tokens = 4096.0" in planned[0].bindings
    assert "train.tokens = 2048.0" in planned[1].bindings
    assert f'train.init_from = "{planned[2].workdir}"' in planned[3].bindings
    assert len({t.key for t in planned}) == 4


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("compare.flops = 1e9", "compare.tokens or compare.flops"),
        ("compare.baseline = 'xlm'", "compare.baseline names 'xlm'"),
        ("compare.curve = ['probe']", "compare.curve names 'probe'"),
        ("compare.runs = {'a b': [], 'a-b': []}", "'a-b' both"),
        ("compare.runz = {}", "did you mean 'runs'"),
    ],
)
def test_a_wrong_comparison_is_one_clear_line(page, binding, words):
    with pytest.raises(UserError, match=".*") as caught:
        load(page, binding)
    assert words in str(caught.value)


def test_the_table_marks_what_its_seeds_can_show(page):
    compare = load(page, "compare.hidden = []")

    def result(value):
        measures = {"continuation/bits_per_byte": value}
        points = [{"step": 1, "flops": 10.0, "measures": measures}]
        return {"steps": 1, "tokens": 5, "flops": 10.0, "compiled_flops": 12.0, "seconds": 1.0,
                "points": points}  # fmt: skip

    results = {
        "mlm": {0: result(3.0), 1: result(3.1)},
        "clm, after": {0: result(2.0), 1: result(2.1)},
    }
    table = report.markdown(compare, results, report.summaries_of(compare, results))
    rows = table.splitlines()
    assert "3.050 ± 0.071 |" in rows[2] and "**2.050 ± 0.071** |" in rows[3]
    assert "1.00e+01 (1.20)" in rows[2]
    assert report.plot(compare, results).startswith(b"\x89PNG")


# --- the command -----------------------------------------------------------------------------


def test_a_comparison_goes_on_where_it_was_cut_short(page, tmp_path):
    workdir = tmp_path / "out"
    arguments = [f"--gin_file={page}", f"--workdir={workdir}"]
    first = succeed("compare", *arguments, "--gin.compare.seeds=[0]")
    assert "[2/2]" in first.stdout and "| mlm | 16 |" in first.stdout
    kept = workdir / "runs" / "mlm" / "seed-0" / "result.json"
    before = kept.stat().st_mtime_ns
    # As if it had been killed between the end of a training and its measures.
    lost = workdir / "runs" / "clm-after" / "seed-0" / "result.json"
    was = json.loads(lost.read_text())["result"]["points"]
    lost.unlink()
    succeed("compare", *arguments)
    assert kept.stat().st_mtime_ns == before
    assert json.loads(lost.read_text())["result"]["points"] == was

    found = json.loads((workdir / "comparison.json").read_text())
    assert set(found["runs"]["mlm"]) == {"0", "1"}
    points = found["runs"]["clm, after"]["0"]["points"]
    assert [p["step"] for p in points] == [4, 8] and all(p["measures"] for p in points)
    summary = found["summary"]["clm, after"]["continuation/bits_per_byte"]
    assert 0 < summary["mean"] < 20 and summary["seeds"] == 2
    assert (workdir / "comparison.md").read_text().startswith("| run |")
    assert (workdir / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_of_a_run_names_it(page, tmp_path):
    message = fail(
        "compare", f"--gin_file={page}", f"--workdir={tmp_path}",
        "--gin.compare.runs={'odd': ['train.lenght = 3']}", "--gin.compare.factors={}",
    )  # fmt: skip
    assert "run 'odd'" in message and "'lenght'" in message and "'length'" in message


def test_help_is_quick_and_a_workdir_is_needed():
    assert "compare" in run("compare", "--help").stdout
    assert "--workdir" in fail("compare", f"--gin_file={ROOT}/gin_configs/evals/python.gin")
