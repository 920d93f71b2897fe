"""`launch/compile.py` as a user runs it, on eight CPU devices."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from launch import config
from launch.compiling import changes, chips, program, topology
from t5like.errors import UserError
from tests.launch.runs import fail, run, succeed

PAGES = (
    "--gin_file=gin_configs/runs/small.gin",
    "--gin_file=gin_configs/objectives/causal_lm.gin",
    "--gin_file=gin_configs/sharding/fsdp.gin",
)
BATCH, LENGTH, LAYERS, D, F, HEADS, VOCABULARY = 16, 64, 3, 32, 64, 32, 256
SIZES = (
    f"--gin.ModelConfig.num_layers={LAYERS}",
    f"--gin.ModelConfig.d_model={D}",
    f"--gin.ModelConfig.d_ff={F}",
    "--gin.ModelConfig.num_heads=2",
    "--gin.ModelConfig.head_dim=16",
    "--gin.ModelConfig.scan_layers=True",
    "--gin.ModelConfig.tie_embeddings=False",
    "--gin.train.vocabulary=@SizedVocabulary()",
    f"--gin.SizedVocabulary.tokens={VOCABULARY - 100}",
    "--gin.train.optimizer=@AdamW()",
    f"--gin.train.batch_size={BATCH}",
    f"--gin.train.length={LENGTH}",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(what was printed, compile.json) of a decoder, fully sharded over eight devices."""
    workdir = tmp_path_factory.mktemp("compile")
    done = succeed(
        "compile", *PAGES, *SIZES, "--topology=local:8", "--max_new_tokens=5",
        f"--workdir={workdir}",
    )  # fmt: skip
    return done.stdout, json.loads((workdir / "compile.json").read_text())


def test_what_is_compiled(compiled):
    printed, record = compiled
    train, generate = record["programs"]
    assert record["mesh"]["fsdp"] == record["devices"] == 8
    assert record["parameters"] == 2 * VOCABULARY * D + LAYERS * (4 * D * D + 3 * D * F + 2 * D) + D
    # AdamW keeps two moments of each parameter, and everything but norms is divided.
    whole = LAYERS * 2 * D + D
    each = ((record["parameters"] - whole) / 8 + whole) * 4
    assert record["state"]["parameters"] == each
    assert record["state"]["optimizer"] == pytest.approx(2 * each, abs=64)
    assert train["fits"] and generate["fits"] and record["advice"] is None
    assert train["memory"]["arguments"] >= 3 * each
    assert train["memory"]["aliased"] >= 3 * each  # The state is donated.
    assert {"trips": LAYERS, "known": True} in train["loops"].values()
    assert {"trips": 5, "known": False} in generate["loops"].values()
    assert "1 loop of unknown length, counted 5 times" in printed
    assert not train["unknown_loops"]["count"] and train["flops"]["ratio"]
    assert all(len(line) <= 100 for line in printed.splitlines())


def test_products_are_the_models(compiled):
    flops = compiled[1]["programs"][0]["flops"]
    # The XLA path computes whole squares on a row so short, where the model's count halves them.
    squares = 3 * BATCH / 8 * LAYERS * 4 * HEADS * LENGTH**2 / 2
    assert flops["compiled"] == pytest.approx(flops["model"] + squares, rel=1e-6)


def test_collectives_are_near_their_floor(compiled):
    train = compiled[1]["programs"][0]
    share, layers, tables = 7 / 8, LAYERS * (4 * D * D + 3 * D * F), 2 * VOCABULARY * D
    assert train["floor"]["gathers"] == share * 4 * (2 * layers + tables)
    assert train["floor"]["scatters"] == share * 4 * (layers + tables)
    gathered = [c for c in train["collectives"] if c["kind"] == "all-gather"]
    assert all(c["axes"] == ["fsdp"] and c["group"] == 8 for c in gathered)
    # Every layer's matrices are gathered in each direction; the tables once or twice.
    bytes_gathered = sum(c["bytes"] for c in gathered)
    assert train["floor"]["gathers"] <= bytes_gathered <= 1.5 * train["floor"]["gathers"]


@pytest.fixture(scope="module")
def planned():
    """Of the same run on one device, at most of whose memory is its activations."""
    pages = [page.partition("gin_configs/")[2] for page in PAGES[:2]]
    bindings = [size.removeprefix("--gin.").replace("=", " = ", 1) for size in SIZES]
    return program.plan(config.load(pages, bindings).run, jax.devices()[:1])


def test_recomputing_less_is_advised_before_recomputing_all(planned):
    advised = list(changes.of(planned, needed=1e9, hbm=2e8, decoded=None))
    assert [change.config.model.remat for change in advised[:2]] == ["dots", "full"]
    assert 2e8 < advised[1].needed < advised[0].needed < 1e9
    assert advised[-1].needed <= 2e8 and "accumulate" in advised[-1].settings


def test_decoding_is_advised_of_what_it_obeys(planned):
    prompts = changes.Decoded(rows=4, asked=True, new_tokens=5)
    advised = list(changes.of(planned, needed=1e9, hbm=6e8, decoded=prompts))
    assert [change.settings for change in advised] == ["--generate_batch=2", "--generate_batch=1"]
    assert [change.decoded.rows for change in advised] == [2, 1]
    assert advised[0].needed == pytest.approx(5e8, rel=0.01)


def test_compiler_options_reach_the_compiler(planned):
    options = {"xla_cpu_enable_fast_math": "neither"}
    changed = dataclasses.replace(
        planned, config=dataclasses.replace(planned.config, compiler_options=options)
    )
    with pytest.raises(UserError, match=r"train.compiler_options\['xla_cpu_enable_fast_math'\]"):
        program.train_programs(changed)


def test_errors_are_one_line():
    assert "v5e, v5p" in fail("compile", *PAGES, "--topology=v9:2x2")
    needed = fail("compile", "--gin_file=gin_configs/runs/t5_1_1_base_c4.gin",
                  "--gin.SentencePieceVocabulary.path='nowhere.model'")  # fmt: skip
    assert "nowhere.model" in needed and "ModelConfig.vocab_size" in needed
    if topology.missing("tpu"):
        line = fail("compile", *PAGES, "--topology=v5e:2x2")
        assert "libtpu" in line and "pip install 't5like[tpu]'" in line


def test_help_says_what_topologies_there_are():
    assert "v5p-128" in run("compile", "--help").stdout


@pytest.mark.parametrize(
    ("name", "normal", "count"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5e-256", "v5e:16x16", 256),
        ("v6e-1", "v6e:1x1", 1),
        ("v5p-128", "v5p:4x4x4", 64),  # TensorCores
        ("v4-8", "v4:2x2x1", 4),
        ("v5p:4x4", "v5p:4x4x1", 16),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4),
        ("h100:64", "h100:64", 64),
        ("h100-8", "h100:8", 8),
    ],
)
def test_names(name, normal, count):
    found = topology.parse(name)
    assert (found.name, found.chips) == (normal, count)


@pytest.mark.parametrize("name", ["v5e", "v5e-100", "v5e:4x4x4", "v5p-7", "h100:12", "v5e:0x4", ""])
def test_names_of_nothing(name):
    with pytest.raises(UserError, match="--topology"):
        topology.parse(name)


def test_chips_are_found_by_their_kind():
    assert chips.of_kind("TPU v5 lite").name == "v5e"
    assert chips.of_kind("NVIDIA H100 80GB HBM3").name == "h100"
    assert chips.of_kind("cpu") is None
