"""Tiny models, parameters and batches for the models' tests."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from t5like.models.axes import parameter_shapes
from t5like.models.config import ModelConfig
from t5like.models.transformer import Transformer

LENGTH, TARGETS = 10, 8

# Compiling is most of what these tests do: LLVM's optimisation is left out, XLA's own is not.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

TINY = ModelConfig(
    vocab_size=32,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=4,
    head_dim=4,
    max_length=16,
    relative_buckets=8,
    relative_max_distance=6,
)
T5 = {"scale_attention": False}
LLAMA = {"position": "rope", "num_kv_heads": 2, "activation": "silu"}
BERT = {
    "position": "learned",
    "norm": "layernorm",
    "norm_position": "post",
    "use_bias": True,
    "gated_mlp": False,
    "activation": "gelu_exact",
    "embedding_size": 8,
    "embedding_norm": True,
    "token_types": 2,
    "tie_embeddings": True,
    "head_transform": True,
    "logits_bias": True,
}
PER_LAYER = {"relative_per_layer": True, "relative_bidirectional": True, "num_kv_heads": 1}
SINUSOIDAL = {"position": "sinusoidal", "gated_mlp": False, "activation": "relu"}
FAMILIES = {
    "t5": T5,
    "llama": LLAMA,
    "bert": BERT,
    "per layer": PER_LAYER,
    "sinusoidal": SINUSOIDAL,
}


@functools.cache
def parameters_of(config: ModelConfig) -> dict:
    """Random parameters with no zeros and no ones, drawn in NumPy (no compilation)."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        normal, leaf = rng.normal(size=shape.shape), path[-1].key
        if leaf == "kernel":
            normal /= np.sqrt(shape.shape[-2])
        elif leaf != "embedding":
            normal = 0.1 * normal + (leaf == "scale")
        return normal.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(config))


def batch_of(architecture: str, rows: int = 2) -> dict[str, np.ndarray]:
    """Random tokens; one example a row, no padding."""
    rng = np.random.default_rng(1)
    batch = {}
    for stack in ("encoder", "decoder"):
        if stack in architecture:
            length = TARGETS if stack != architecture and stack == "decoder" else LENGTH
            tokens = rng.integers(0, 32, (rows, length)).astype(np.int32)
            batch[f"{stack}_input_tokens"] = tokens
            batch[f"{stack}_segment_ids"] = np.ones_like(tokens)
            batch[f"{stack}_positions"] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return batch


@functools.cache
def _jitted(config: ModelConfig):
    return quick_jit(lambda params, batch: Transformer(config).apply({"params": params}, batch))


class Tiny:
    """What the tests share: configs by family, parameters, batches, a jitted forward pass."""

    length, targets, families = LENGTH, TARGETS, FAMILIES

    @staticmethod
    def config(architecture: str, family: str = "t5", **changes) -> ModelConfig:
        return dataclasses.replace(TINY, architecture=architecture, **FAMILIES[family], **changes)

    @staticmethod
    def logits(config: ModelConfig, batch: dict, params: dict | None = None) -> np.ndarray:
        params = parameters_of(config) if params is None else params
        return np.asarray(_jitted(config)(params, batch))

    parameters = staticmethod(parameters_of)
    batch = staticmethod(batch_of)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()
