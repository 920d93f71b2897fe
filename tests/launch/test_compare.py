"""Comparisons: statistics by hand, and the command as a user meets it, cut short and wrong too."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time

import pytest
from etils import epath

from launch import config
from launch.comparison import report
from launch.comparison.statistics import summarise
from launch.comparison.trials import trials
from t5like.errors import UserError

from .runs import ROOT, command, environment, fail, run, succeed, write_text

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
    # Differences 1, 0, 2: standard deviation 1; t(0.975, 2) = 4.3027, t(0.8, 2) = 1.0607.
    assert found.interval == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert found.smallest_effect == pytest.approx((4.3027 + 1.0607) / math.sqrt(3), rel=1e-4)
    assert not found.shows


def test_one_seed_or_two_show_nothing_and_pairs_are_of_equal_seeds():
    one = summarise({0: 1.0}, {0: 0.0})
    assert one.difference == 1.0 and math.isnan(one.smallest_effect) and not one.shows
    assert not summarise({0: 0.50, 1: 0.52}, {0: 0.49, 1: 0.51}).shows
    assert math.isnan(summarise({0: 1.0}, {1: 0.0}).difference)
    steady = summarise({0: 2.0, 1: 2.1, 2: 2.2}, {0: 1.0, 1: 1.1, 2: 1.2})
    assert steady.shows


# --- what is run -----------------------------------------------------------------------------


def plan(page, folder, *bindings):
    more = "['train.init_from = \"{mlm}\"', 'train.seed = 100{seed}']"
    binding = f"compare.runs = {{'mlm': [], 'more': {more}}}"
    return trials(load(page, binding, *bindings), epath.Path(folder))


def test_trials_have_their_budget_seed_and_the_workdirs_of_others(page, tmp_path):
    planned = plan(page, tmp_path)
    assert [(t.name, t.seed) for t in planned] == [
        ("mlm", 0), ("more", 0), ("mlm", 1), ("more", 1)
    ]  # fmt: skip
    configs = [t.resolved.run for t in planned]
    assert [c.tokens for c in configs] == [4096.0, 2048.0, 4096.0, 2048.0]
    assert [c.seed for c in configs] == [0, 1000, 1, 1001]
    assert configs[3].init_from == str(planned[2].workdir) and configs[2].init_from is None


def test_a_key_changes_with_all_that_a_trained_model_depends_on(page, tmp_path):
    keys = [[t.key for t in plan(page, tmp_path, *b)] for b in (
        [], [], ["compare.tokens = 4096"], ["compare.points = 1"], ["compare.factors = {'mlm': 4}"],
    )]  # fmt: skip
    assert len(set(keys[0])) == 4 and keys[0] == keys[1]
    for changed in keys[2:]:  # of "more" too, which starts from what has changed
        assert not set(changed) & set(keys[0])
    own = tmp_path / "own.gin"
    own.write_text("WarmupStableDecay.peak = 1e-2")
    run = f"compare.runs = {{'a': ['{own}']}}"
    before = trials(load(page, run, "compare.factors = {}"), epath.Path(tmp_path))[0].key
    own.write_text("WarmupStableDecay.peak = 1e-5")
    assert trials(load(page, run, "compare.factors = {}"), epath.Path(tmp_path))[0].key != before


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("compare.flops = 1e9", "compare.tokens or compare.flops"),
        ("compare.baseline = 'xlm'", "compare.baseline names 'xlm'"),
        ("compare.curve = ['probe']", "compare.curve names 'probe'"),
        ("compare.runs = {'a b': [], 'a-b': []}", "'a-b' both"),
        ("compare.runz = {}", "did you mean 'runs'"),
        ("compare.runs = {'a': 'objectives/mlm.gin'}", "compare.runs['a'] is 'objectives/mlm.gin'"),
        ("compare.base = [1]", "compare.base is [1]"),
        ("compare.runs = {'..': []}", "'..'; use letters"),
        ("compare.runs = {'a': ['train.steps = 5']}", "set compare.tokens"),
        ("compare.hidden = ['mlm', 'clm, after']", "compare.baseline"),
        ("compare.seeds = 3", "compare.seeds is 3"),
        ("compare.measures = {'probe': @LinearProbe}", "compare.measures['probe'] is"),
        ("compare.measures = {'a/b': @Continuation()}", "'a/b'; use letters"),
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
        "mlm": {0: result(3.0), 1: result(3.1), 2: result(3.2)},
        "clm, after": {0: result(2.0), 1: result(2.1), 2: result(2.3)},
    }
    table = report.markdown(compare, results, report.summaries_of(compare, results))
    rows = table.splitlines()
    assert "| 3.100 ± 0.100 |" in rows[2] and "**2.133 ± 0.153** |" in rows[3]
    assert "continuation bits per byte ↓" in rows[0]
    assert "1.00e+01 (1.20)" in rows[2]
    assert report.plot(compare, results).startswith(b"\x89PNG")


# --- the command -----------------------------------------------------------------------------


def test_a_comparison_goes_on_where_it_was_cut_short(page, tmp_path):
    workdir = tmp_path / "out"
    arguments = [f"--gin_file={page}", f"--workdir={workdir}"]
    first = succeed("compare", *arguments, "--gin.compare.seeds=[0]")
    assert "[2/2]" in first.stdout and "| mlm | 16 |" in first.stdout
    kept = workdir / "runs" / "mlm" / "seed-0" / "measures.json"
    before = kept.stat().st_mtime_ns
    # As if it had been killed between the end of a training and its measures.
    lost = workdir / "runs" / "clm-after" / "seed-0" / "measures.json"
    was = json.loads(lost.read_text())
    lost.write_text(lost.read_text()[:20])
    succeed("compare", *arguments)
    assert kept.stat().st_mtime_ns == before
    assert json.loads(lost.read_text()) == was
    message = fail("compare", *arguments, "--gin.compare.tokens=4096")
    assert "another configuration or budget" in message and "--workdir" in message

    found = json.loads((workdir / "comparison.json").read_text())
    assert set(found["runs"]["mlm"]) == {"0", "1"}
    points = found["runs"]["clm, after"]["0"]["points"]
    assert [p["step"] for p in points] == [4, 8] and all(p["measures"] for p in points)
    assert found["runs"]["clm, after"]["0"]["compiled_flops"] > 0
    summary = found["summary"]["clm, after"]["continuation/bits_per_byte"]
    assert 0 < summary["mean"] < 20 and summary["seeds"] == 2
    assert (workdir / "comparison.md").read_text().startswith("| run |")
    assert (workdir / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_of_a_run_names_it(page, tmp_path):
    message = fail(
        "compare", f"--gin_file={page}", f"--workdir={tmp_path}",
        "--gin.compare.runs={'odd': ['train.lenght = 3']}", "--gin.compare.factors={}",
    )  # fmt: skip
    assert "compare.runs['odd']" in message and "'lenght'" in message and "'length'" in message


def test_help_is_quick_and_a_workdir_is_needed():
    assert "compare" in run("compare", "--help").stdout
    assert "--workdir" in fail("compare", f"--gin_file={ROOT}/gin_configs/evals/python.gin")


def test_sigterm_saves_and_the_rerun_goes_on(page, tmp_path):
    bindings = "--gin.compare.tokens=4e6", "--gin.compare.seeds=[0]"
    arguments = f"--gin_file={page}", f"--workdir={tmp_path}", *bindings
    process = subprocess.Popen(
        command("compare", *arguments), env=environment(), stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "runs" / "mlm" / "seed-0" / "metrics.jsonl"
    while not log.exists() and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in errors, errors
    assert list((log.parent / "checkpoints").iterdir())
