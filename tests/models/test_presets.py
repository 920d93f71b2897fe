"""The gin pages of models: published parameter counts, and FLOPs against XLA's count."""

from __future__ import annotations

import ast
import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import gin_configs
from t5like.errors import UserError
from t5like.models.axes import parameter_shapes
from t5like.models.config import ModelConfig
from t5like.models.flops import forward_flops, parameter_count, train_flops
from t5like.models.transformer import Transformer

PAGES = pathlib.Path(gin_configs.__file__).parent / "models"

# Page -> (vocabulary of the published model, its parameters). BERT and ELECTRA count the
# masked-language-model head and not the pooler.
PUBLISHED = {
    "tiny": (4096, 1_509_120),
    "llama_tiny": (4096, 1_417_856),
    "t5_small": (32128, 60_506_624),
    "t5_base": (32128, 222_903_552),
    "t5_1_1_small": (32128, 76_961_152),
    "t5_1_1_base": (32128, 247_577_856),
    "t5_1_1_large": (32128, 783_150_080),
    "t5_1_1_xl": (32128, 2_849_757_184),
    "t5_1_1_xxl": (32128, 11_135_332_352),
    "bert_small": (30522, 28_795_194),
    "bert_base": (30522, 109_514_298),
    "bert_large": (30522, 335_174_458),
    "electra_small": (30522, 13_546_682),
    "electra_base": (30522, 109_514_298),
    "electra_large": (30522, 335_174_458),
    "gpt2_small": (50257, 124_439_808),
    "yi_6b": (64000, 6_061_035_520),
    "ul2_20b": (32128, 19_591_209_984),
}


def bindings(page: pathlib.Path) -> dict:
    """ModelConfig's bindings, read without gin: defaults, then `ModelConfig.name = literal`."""
    text = page.read_text()
    assert "include 'gin_configs/models/defaults.gin'\n" in text
    both = (PAGES / "defaults.gin").read_text() + text
    lines = [line for line in both.splitlines() if line and line[0] != "#"]
    pairs = [line.split(" = ", 1) for line in lines if not line.startswith("include ")]
    assert all(name.startswith("ModelConfig.") for name, _ in pairs), page
    return {name.removeprefix("ModelConfig."): ast.literal_eval(value) for name, value in pairs}


def test_every_page_is_counted():
    assert {page.stem for page in PAGES.glob("*.gin")} == {*PUBLISHED, "defaults"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_page_binds_every_field_of_a_shape(name):
    """What one page binds and another does not would be left behind by the first."""
    elsewhere = {"vocab_size", "vocab_multiple", "dtype", "param_dtype", "scan_layers", "remat"}
    elsewhere |= {"attention_backend", "relative_bidirectional", "architecture", "remat_names"}
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields - elsewhere <= set(bindings(PAGES / f"{name}.gin"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    vocab_size, parameters = PUBLISHED[name]
    config = ModelConfig(**bindings(PAGES / f"{name}.gin"), vocab_size=vocab_size)
    assert parameter_count(config) == parameters


def test_header_states_the_count_in_words():
    for name, (_, parameters) in PUBLISHED.items():
        header = (PAGES / f"{name}.gin").read_text().split("\ninclude ")[0]
        words = header.replace("\n# ", " ").split()
        unit = {"M": 1e6, "B": 1e9}
        stated = [
            float(word[:-1]) * unit[word[-1]]
            for word, following in zip(words, words[1:], strict=False)
            if following == "parameters" and word[-1] in unit
        ]
        assert stated and abs(stated[0] / parameters - 1) < 0.005, name


def test_tiny_leaves_the_architecture_to_the_run():
    assert "architecture" not in bindings(PAGES / "tiny.gin")


def test_parameter_count_of_unrolled_equals_scanned(tiny):
    config = tiny.config("encoder_decoder", "per layer")
    leaves = jax.tree.leaves(parameter_shapes(config))
    assert parameter_count(config) == sum(int(np.prod(leaf.shape)) for leaf in leaves)


FLOPS_CASES = {
    "encoder": ("encoder", {}),
    "gated query groups": ("encoder", {"position": "rope", "num_kv_heads": 2}),
    "tied narrow embeddings": (
        "encoder",
        {"embedding_size": 64, "tie_embeddings": True, "head_transform": True, "gated_mlp": False},
    ),
    "decoder": ("decoder", {}),
    "encoder_decoder": ("encoder_decoder", {}),
}


@pytest.mark.parametrize("name", FLOPS_CASES)
def test_flops_match_xla(name):
    """Within 3% of XLA's count of the compiled forward pass, which is of unrolled layers.

    XLA computes a causal square whole where model FLOPs count half, so the other half is added;
    what remains is norms, activations and softmax, which model FLOPs leave out.
    """
    architecture, changes = FLOPS_CASES[name]
    config = ModelConfig(
        architecture=architecture, vocab_size=512, d_model=256, d_ff=1024, head_dim=64, **changes
    )
    lengths = {"encoder": 48, "decoder": 32}
    spec = {f"{stack}_input_tokens": ((2, lengths[stack]), "int32") for stack in config.stacks}
    batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in spec.items()}
    forward = jax.jit(lambda params, batch: Transformer(config).apply({"params": params}, batch))
    compiled = forward.lower(parameter_shapes(config), batch).compile()
    expected = forward_flops(config, spec)
    if "decoder" in config.stacks:
        expected += 2 * config.stacks["decoder"] * 2.0 * 4 * 64 * lengths["decoder"] ** 2
    assert 1.0 < compiled.cost_analysis()["flops"] / expected < 1.03


def test_flops_by_hand():
    """One layer, every product written out."""
    config = ModelConfig(
        architecture="decoder",
        vocab_size=10,
        num_layers=1,
        d_model=2,
        d_ff=3,
        head_dim=5,
        num_heads=4,
        num_kv_heads=2,
    )
    tokens = np.zeros((7, 6), np.int32)
    attention = 2 * 6 * 2 * (20 + 10 + 10 + 20) + 2 * (2 * 6 * 6 * 20) / 2
    expected = 7 * (attention + 3 * 2 * 6 * 2 * 3 + 2 * 6 * 2 * 10)
    assert forward_flops(config, {"decoder_input_tokens": tokens}) == expected
    assert train_flops(config, {"decoder_input_tokens": tokens}) == 3 * expected


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"activation": "gelu_tanh"}, "ModelConfig.activation"),
        ({"architecture": "both"}, "ModelConfig.architecture"),
        ({"num_kv_heads": 3}, "ModelConfig.num_kv_heads"),
        ({"position": "rope", "head_dim": 5}, "ModelConfig.head_dim"),
        ({"tie_embeddings": True, "embedding_size": 7}, "ModelConfig.tie_embeddings"),
        ({"num_layers": 0}, "ModelConfig.num_layers"),
    ],
)
def test_mistakes_are_named(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        ModelConfig(**changes)


def test_missing_vocabulary_size_is_named():
    with pytest.raises(UserError, match="ModelConfig.vocab_size"):
        parameter_shapes(ModelConfig())
