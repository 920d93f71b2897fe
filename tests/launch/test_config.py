"""gin pages as users meet them: by short name, left to right, with errors that say how to mend."""

import dataclasses
import pathlib

import pytest
from etils import epath

from launch import cli, config, registry, training
from launch.comparison.trials import trials
from t5like.errors import UserError

QUICKSTART = "gin_configs/runs/quickstart.gin"
PAGES = sorted(str(p.relative_to(config.PAGES.parent)) for p in config.PAGES.rglob("*.gin"))


def error(*bindings, files=(QUICKSTART,)):
    with pytest.raises(UserError) as caught:
        config.load(files, bindings)
    message = str(caught.value)
    assert "\n" not in message
    return message


COMPARISONS = [p for p in PAGES if "/papers/" in p]


@pytest.mark.parametrize("page", [p for p in PAGES if "/papers/" not in p and "/evals/" not in p])
def test_every_page_builds_on_the_quickstart(page):
    files = [QUICKSTART] if page == QUICKSTART else [QUICKSTART, page]
    run = config.load(files, ["train.steps = 1"]).run
    assert dataclasses.is_dataclass(run.model) and dataclasses.is_dataclass(run.objective)


def head_of(page):
    return (config.PAGES.parent / page).read_text().split("\n\n")[0]


@pytest.mark.parametrize("page", [p for p in PAGES if "/runs/" in p])
def test_every_run_page_stands_alone_and_states_its_command(page):
    assert config.load([page]).run.steps is not None
    assert page in head_of(page) and head_of(page).startswith("#"), "it starts with its command"


@pytest.mark.parametrize("page", COMPARISONS)
def test_every_comparison_builds_with_all_its_runs_and_says_what_it_expects(page, tmp_path):
    compare = config.load([page], root="compare").run
    assert compare.expected and len(compare.seeds) >= 2
    assert page in head_of(page) and head_of(page).startswith("#"), "it starts with its command"
    one = dataclasses.replace(compare, seeds=[0])
    assert len(trials(one, epath.Path(tmp_path))) == len(compare.runs)


@pytest.mark.parametrize("page", [p for p in PAGES if "/evals/" in p])
def test_every_page_of_measures_completes_a_comparison(page):
    bindings = ["compare.base = []", "compare.runs = {'a': []}", "compare.tokens = 1"]
    assert config.load([page], bindings, root="compare").run.measures


@pytest.mark.parametrize("page", [p for p in PAGES if "/models/" in p])
def test_a_model_page_leaves_nothing_of_another_model_behind(page):
    alone = "train.model = @ModelConfig()\n"
    models = [
        config.load([*before, page], [alone]).run.model
        for before in ([QUICKSTART], [QUICKSTART, "models/bert_base.gin"], [QUICKSTART, page])
    ]
    kept = {"architecture"} if page.endswith(("tiny.gin", "defaults.gin")) else set()
    if page.endswith("defaults.gin"):  # It sets choices, not sizes.
        kept |= {"num_layers", "d_model", "d_ff", "num_heads", "head_dim"}
    shapes = [{k: v for k, v in dataclasses.asdict(m).items() if k not in kept} for m in models]
    assert shapes[0] == shapes[1] == shapes[2]


def test_pages_are_found_by_short_name_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (QUICKSTART, "runs/quickstart.gin"):
        assert config.load([name]).run == config.load([QUICKSTART]).run


def test_a_page_in_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.gin").write_text(f"include '{QUICKSTART}'\ntrain.steps = 7\n")
    assert config.load(["mine.gin"]).run.steps == 7


def test_an_include_is_found_beside_its_page(tmp_path):
    (tmp_path / "inner.gin").write_text("train.steps = 3\n")
    (tmp_path / "outer.gin").write_text(f"include '{QUICKSTART}'\ninclude 'inner.gin'\n")
    assert config.load([str(tmp_path / "outer.gin")]).run.steps == 3


def test_later_pages_and_the_command_line_override_earlier_ones(tmp_path):
    page = tmp_path / "page.gin"
    page.write_text("train.steps = 5\ntrain.batch_size = 6\n")
    run = config.load([QUICKSTART, str(page)], ["train.steps = 8"]).run
    assert (run.steps, run.batch_size) == (8, 6)


def test_an_objective_page_brings_its_default_architecture():
    assert config.load([QUICKSTART]).run.model.architecture == "encoder_decoder"
    run = config.load([QUICKSTART, "gin_configs/objectives/mlm.gin"]).run
    assert (type(run.objective).__name__, run.model.architecture) == ("MaskedLM", "encoder")


def test_the_resolved_text_rebuilds_the_same_run_and_names_places(tmp_path):
    resolved = config.load([QUICKSTART], ["train.steps = 11"])
    page = tmp_path / "config.gin"
    page.write_text(resolved.text())
    assert config.load([str(page)]).run == resolved.run
    lines = resolved.text().splitlines()
    assert "train.steps = 11  # command line" in lines
    assert any(s.startswith("train.keep = ") and s.endswith("# default") for s in lines)
    assert any("# gin_configs/runs/quickstart.gin:" in s for s in lines)


def test_arguments_with_gin_names_become_bindings():
    argv = ["train", "--gin.train.steps=20", "--gin.A.b='x=y'", "--workdir=w"]
    assert cli.rewrite_gin_arguments(argv) == [
        "train", "--gin_bindings=train.steps = 20", "--gin_bindings=A.b = 'x=y'", "--workdir=w",
    ]  # fmt: skip
    with pytest.raises(UserError, match="no value"):
        cli.rewrite_gin_arguments(["--gin.train.steps"])


# --- errors ----------------------------------------------------------------------------------


def test_a_misspelt_parameter_names_the_nearest(tmp_path):
    page = tmp_path / "page.gin"
    page.write_text("# a comment\n\ntrain.stepz = 3\n")
    message = error(files=[QUICKSTART, str(page)])
    assert "page.gin:3" in message and "'stepz'" in message and "'steps'" in message


def test_a_misspelt_configurable_names_the_nearest(tmp_path):
    assert "'train'" in error("tarin.steps = 3")
    page = tmp_path / "page.gin"
    page.write_text("train.steps = 3\ntrain.objective = @MaskedLN()\n")
    message = error(files=[QUICKSTART, str(page)])
    assert "page.gin:2" in message and "'MaskedLM'" in message


def test_a_missing_page_names_the_nearest():
    assert f"{QUICKSTART!r}" in error(files=["runs/quikstart.gin"])


def test_a_syntax_error_names_file_and_line(tmp_path):
    page = tmp_path / "page.gin"
    page.write_text("train.steps = 3\ntrain.length = (1,\n")
    assert "page.gin:" in error(files=[QUICKSTART, str(page)])


def test_an_unquoted_string_on_the_command_line_is_explained():
    assert "quotes" in error("train.init_from = some/dir")


def test_missing_required_bindings_are_listed():
    message = error(files=["gin_configs/objectives/mlm.gin"])
    assert "'model'" in message and "'vocabulary'" in message


def test_no_configuration_at_all():
    assert "quickstart" in error(files=[])


def test_a_required_value_and_a_macro_without_value():
    assert "train.steps" in error("train.steps = %gin.REQUIRED")
    assert "%STEPS" in error("train.steps = %STEPS")


@pytest.mark.parametrize(
    "binding",
    [
        "train.batch_size = 'many'",
        "train.batch_size = 0",
        "train.shuffle = 'no'",
        "train.accumulate = 7",
        "train.keep_best = 'nowhere'",
        "train.optimizer = 'adam'",
        "train.rates = {'a': 1.0}",
        "ModelConfig.position = 'foo'",
        "SpanCorruption.noise_density = 1.5",
        "SpanCorruption.cut = 'page'",
        "ModelConfig.num_kv_heads = 0",
        "ModelConfig.num_decoder_layers = 0",
        "train.objective = @SpanCorruption",
        "train.model = @AdamW()",
        "train.evals = 'validation'",
        "train.source = {'a': 'text.txt'}",
        "train.vocabulary = 'bytes'",
        "train.init_prefixes = 'model/'",
        "train.eval_batches = 0",
        "train.workers = -1",
        "Muon.learning_rate = 'cosine'",
        "WarmupStableDecay.shape = 'sqr'",
    ],
)
def test_a_value_that_its_class_refuses_names_the_binding(binding):
    name = binding.split(" = ")[0]
    message = error(binding)
    assert name in message and "command line" in message


@pytest.mark.parametrize(
    "fields, refused",
    [
        (["Dilated.left = 1", "Dilated.right = 1", "Dilated.dilation = 0"], "Dilated.dilation = 0"),
        (["BigBird.window_blocks = 2"], "BigBird.window_blocks = 2"),
    ],
)
def test_a_mask_that_refuses_a_value_names_the_binding(fields, refused):
    name = refused.split(".")[0]
    message = error(f"ModelConfig.attention_pattern = @{name}()", *fields)
    assert refused in message and "must be" in message and "command line" in message


def test_no_budget():
    assert "train.steps" in error("train.steps = None")


def test_a_whole_float_becomes_an_int():
    batch_size = config.load([QUICKSTART], ["train.batch_size = 16.0"]).run.batch_size
    assert (type(batch_size), batch_size) == (int, 16)


def test_a_number_serves_as_a_constant_learning_rate():
    run = config.load([QUICKSTART], ["Muon.learning_rate = 1e-3"]).run
    assert float(run.optimizer.schedule(10)(5)) == pytest.approx(1e-3)


def test_a_setting_without_its_owner_is_no_macro():
    message = error("steps = 20")
    assert "'steps'" in message and "'train.steps'" in message


def test_a_scope_that_nothing_uses_is_a_misspelling():
    message = error("validaton/PythonSource.split = 'train'")
    assert "'validaton'" in message and "'validation'" in message


def test_a_scope_whose_user_was_overridden_is_none():
    assert config.load([QUICKSTART], ["train.evals = None"]).run.evals is None


def test_a_binding_from_the_command_line_without_effect_is_an_error():
    assert "AdamW.b1 has no effect" in error("AdamW.b1 = 0.5")


def test_a_page_that_includes_itself_or_is_no_text(tmp_path):
    page = tmp_path / "page.gin"
    page.write_text(f"include '{page}'\n")
    assert "includes itself" in error(files=[str(page)])
    page.write_bytes(b"train.steps = 1  # caf\xe9\n")
    assert "page.gin" in error(files=[str(page)])


# --- what makes a run the run it is ----------------------------------------------------------


def identity(*bindings):
    return training.run_identity(config.load([QUICKSTART], bindings))


def test_budget_logging_and_evaluation_are_free_and_the_rest_is_not():
    assert identity("train.steps = 5", "train.log_every = 3", "train.evals = None") == identity()
    assert identity("train.seed = 5") != identity()
    assert identity("SpanCorruption.noise_density = 0.2") != identity()


def test_a_macro_in_a_free_binding_is_free():
    macros = [identity(f"STEPS = {n}", "train.steps = %STEPS") for n in (5, 6)]
    assert macros[0] == macros[1] == identity()


def test_scopes_are_free_where_only_evals_refer_to_them():
    held = "train.evals = {'validation': @held/PythonSource()}"
    assert identity(held, "held/PythonSource.split = 'validation'") == identity()
    both = [f"train.{name} = @validation/PythonSource()" for name in ("source",)]
    assert "validation/PythonSource.split" in identity(*both)


def test_defaults_that_gin_cannot_write_count_too():
    same = identity("train.optimizer = @AdamW()")
    assert "Cosine(" in same["AdamW.learning_rate"]
    text = config.load([QUICKSTART], ["train.optimizer = @AdamW()"]).text()
    assert "# AdamW.learning_rate = Cosine(" in text


def test_every_objective_source_and_optimizer_is_configurable():
    names = set(registry.configurable_classes())
    assert {
        "CausalLM", "PrefixLM", "MaskedLM", "SpanCorruption", "TextSource", "JsonlSource",
        "PythonSource", "TfdsSource", "SeqioSource", "SentencePieceVocabulary", "ByteVocabulary",
        "AdamW", "Adafactor", "Lion", "Muon", "ModelConfig",
    } <= names  # fmt: skip
