"""Parameter names are public API: the golden tree, logical axes, and T5X's names and shapes."""

from __future__ import annotations

import gzip
import json

import jax
import numpy as np
import pytest
from flax import serialization, traverse_util

from t5like.models.axes import logical_axes, parameter_shapes
from t5like.models.config import ModelConfig
from t5like.models.t5x_names import from_t5x, to_t5x

GOLDEN_ENCODER_DECODER = {
    "token_embedder/embedding": (32, 16),
    "encoder/relative_bias/embedding": (8, 4),
    "encoder/layers_0/self_attention_norm/scale": (16,),
    "encoder/layers_0/self_attention/query/kernel": (16, 16),
    "encoder/layers_0/self_attention/key/kernel": (16, 16),
    "encoder/layers_0/self_attention/value/kernel": (16, 16),
    "encoder/layers_0/self_attention/out/kernel": (16, 16),
    "encoder/layers_0/mlp_norm/scale": (16,),
    "encoder/layers_0/mlp/wi_0/kernel": (16, 24),
    "encoder/layers_0/mlp/wi_1/kernel": (16, 24),
    "encoder/layers_0/mlp/wo/kernel": (24, 16),
    "encoder/final_norm/scale": (16,),
    "decoder/relative_bias/embedding": (8, 4),
    "decoder/layers_0/self_attention_norm/scale": (16,),
    "decoder/layers_0/self_attention/query/kernel": (16, 16),
    "decoder/layers_0/self_attention/key/kernel": (16, 16),
    "decoder/layers_0/self_attention/value/kernel": (16, 16),
    "decoder/layers_0/self_attention/out/kernel": (16, 16),
    "decoder/layers_0/cross_attention_norm/scale": (16,),
    "decoder/layers_0/cross_attention/query/kernel": (16, 16),
    "decoder/layers_0/cross_attention/key/kernel": (16, 16),
    "decoder/layers_0/cross_attention/value/kernel": (16, 16),
    "decoder/layers_0/cross_attention/out/kernel": (16, 16),
    "decoder/layers_0/mlp_norm/scale": (16,),
    "decoder/layers_0/mlp/wi_0/kernel": (16, 24),
    "decoder/layers_0/mlp/wi_1/kernel": (16, 24),
    "decoder/layers_0/mlp/wo/kernel": (24, 16),
    "decoder/final_norm/scale": (16,),
    "head/kernel": (16, 32),
}
GOLDEN_BERT_SCANNED = {
    "token_embedder/embedding": (32, 8),
    "encoder/position_embedder/embedding": (16, 8),
    "encoder/token_type_embedder/embedding": (2, 8),
    "encoder/embedding_norm/scale": (8,),
    "encoder/embedding_norm/bias": (8,),
    "encoder/projection/kernel": (8, 16),
    "encoder/projection/bias": (16,),
    **{
        f"encoder/layers/self_attention/{name}/{leaf}": (2, 16, 16)[: 3 if leaf == "kernel" else 2]
        for name in ("query", "key", "value", "out")
        for leaf in ("kernel", "bias")
    },
    "encoder/layers/self_attention_norm/scale": (2, 16),
    "encoder/layers/self_attention_norm/bias": (2, 16),
    "encoder/layers/mlp/wi/kernel": (2, 16, 24),
    "encoder/layers/mlp/wi/bias": (2, 24),
    "encoder/layers/mlp/wo/kernel": (2, 24, 16),
    "encoder/layers/mlp/wo/bias": (2, 16),
    "encoder/layers/mlp_norm/scale": (2, 16),
    "encoder/layers/mlp_norm/bias": (2, 16),
    "head/transform/kernel": (16, 8),
    "head/transform/bias": (8,),
    "head/norm/scale": (8,),
    "head/norm/bias": (8,),
    "head/bias": (32,),
}


def flat_shapes(tree) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {name: tuple(np.shape(leaf)) for name, leaf in flat.items()}


def test_golden_encoder_decoder(tiny):
    shapes = flat_shapes(parameter_shapes(tiny.config("encoder_decoder", num_layers=1)))
    assert shapes == GOLDEN_ENCODER_DECODER


def test_golden_bert_scanned(tiny):
    shapes = flat_shapes(parameter_shapes(tiny.config("encoder", "bert", scan_layers=True)))
    assert shapes == GOLDEN_BERT_SCANNED


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", ["t5", "llama", "bert", "per layer", "sinusoidal"])
def test_every_parameter_has_a_name_for_every_axis(tiny, family, scan):
    config = tiny.config("encoder_decoder", family, scan_layers=scan)
    shapes = traverse_util.flatten_dict(parameter_shapes(config), sep="/")
    axes = traverse_util.flatten_dict(logical_axes(config), sep="/")
    assert shapes.keys() == axes.keys()
    sizes = {"embed": (16, 8), "mlp": (24,), "vocab": (32,), "layers": (2,)}
    for name, shape in shapes.items():
        assert len(axes[name]) == shape.ndim, name
        split = [axis for axis in axes[name] if axis is not None]
        assert len(set(split)) == len(split), f"{name}: one mesh axis cannot serve twice"
        assert split or max(shape.shape) < 64 or shape.ndim == 1, f"{name} is never split"
        for axis, size in zip(axes[name], shape.shape, strict=True):
            assert size in sizes.get(axis, (size,)), name


def flaxformer_config(**changes) -> ModelConfig:
    """The sizes of Flaxformer's test models."""
    sizes = dict(d_model=13, d_ff=2048, num_heads=8, head_dim=64, gated_mlp=False)
    return ModelConfig(**{**sizes, **changes})


PER_LAYER = {"relative_per_layer": True}
FLAXFORMER = {
    "decoder_shapes_fixed_abs_posemb": dict(
        architecture="decoder", vocab_size=4, position="sinusoidal"
    ),
    "decoder_shapes_learned_abs_posemb": dict(
        architecture="decoder", vocab_size=4, position="learned", max_length=2048
    ),
    "decoder_shapes_shared_relpos_bias": dict(architecture="decoder", vocab_size=4),
    "decoder_shapes_per_layer_relpos_bias": dict(architecture="decoder", vocab_size=4, **PER_LAYER),
    "encoder_shapes_shared_relpos_bias": dict(
        architecture="encoder", vocab_size=2000, num_layers=3
    ),
    "encoder_shapes_per_layer_relpos_bias": dict(
        architecture="encoder", vocab_size=2000, num_layers=3, **PER_LAYER
    ),
    "encoder_scanned_per_layer_relpos_bias": dict(
        architecture="encoder", vocab_size=2000, num_layers=3, scan_layers=True, **PER_LAYER
    ),
    "encoder_decoder_shared_embedding_shapes": dict(
        vocab_size=71, num_layers=3, num_decoder_layers=2, tie_embeddings=True, **PER_LAYER
    ),
}


@pytest.mark.parametrize("page", FLAXFORMER)
def test_flaxformers_shapes(shared_data, page):
    """Equal trees; a lone encoder there has no logits, so ours are left out."""
    config = flaxformer_config(**FLAXFORMER[page])
    ours = parameter_shapes(config)
    if config.architecture == "encoder":
        del ours["head"]
    theirs = flat_shapes(jax.eval_shape(lambda p: to_t5x(p, config), ours))
    path = shared_data / "peer/flaxformer/architectures/t5" / f"{page}.json"
    expected = traverse_util.flatten_dict(json.loads(path.read_text()), sep="/")
    assert theirs == {name: _sizes(shape) for name, shape in expected.items()}


def _sizes(shape: list) -> tuple[int, ...]:
    """[13, 512], or ["float32", "embed=13", "joined_kv=512"]."""
    return tuple(int(str(axis).split("=")[-1]) for axis in shape if axis != "float32")


T5X_TINY = ModelConfig(
    vocab_size=32128, d_model=8, d_ff=16, num_heads=4, head_dim=3, scale_attention=False
)


@pytest.fixture(scope="module")
def t5x_target(shared_data) -> dict:
    compressed = (shared_data / "peer/t5x/test_t5_tiny.checkpoint_0.gz").read_bytes()
    return serialization.msgpack_restore(gzip.decompress(compressed))["optimizer"]["target"]


def test_a_t5x_checkpoint_has_our_shapes(t5x_target):
    ours = jax.eval_shape(lambda p: to_t5x(p, T5X_TINY), parameter_shapes(T5X_TINY))
    assert flat_shapes(ours) == flat_shapes(t5x_target)


def test_a_t5x_checkpoint_goes_there_and_back(t5x_target):
    params = from_t5x(t5x_target, parameter_shapes(T5X_TINY), T5X_TINY)
    assert flat_shapes(params) == flat_shapes(parameter_shapes(T5X_TINY))
    jax.tree.map(np.testing.assert_array_equal, to_t5x(params, T5X_TINY), t5x_target)
    theirs = t5x_target["encoder"]["relpos_bias"]["rel_embedding"]
    np.testing.assert_array_equal(params["encoder"]["relative_bias"]["embedding"], theirs.T)


@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder_decoder"])
def test_scanned_parameters_go_there_and_back(tiny, architecture):
    config = tiny.config(architecture, "per layer", scan_layers=True)
    params = tiny.parameters(config)
    back = from_t5x(to_t5x(params, config), parameter_shapes(config), config)
    jax.tree.map(np.testing.assert_array_equal, back, params)
