"""Logical axis names of every parameter, from which a mesh's sharding rules are made."""

from __future__ import annotations

from typing import Any

import jax
from flax import traverse_util

from t5like.models.config import ModelConfig
from t5like.models.transformer import init_parameters

# Name of the module that holds a parameter -> axes of its kernel or table, T5X's names.
# A bias carries its kernel's last axis. Where both sides of a map have a model width, the one
# that a mesh should not shard has a name of its own.
_AXES = {
    "token_embedder": ("vocab", "embed"),
    "position_embedder": ("positions", "embed"),
    "token_type_embedder": ("token_types", "embed"),
    "relative_bias": ("relpos_buckets", "heads"),
    "projection": ("embedding", "embed"),
    "query": ("embed", "joined_kv"),
    "key": ("embed", "joined_kv"),
    "value": ("embed", "joined_kv"),
    "out": ("joined_kv", "embed"),
    "wi": ("embed", "mlp"),
    "wi_0": ("embed", "mlp"),
    "wi_1": ("embed", "mlp"),
    "wo": ("mlp", "embed"),
    "transform": ("embed", "transform"),
    "head": ("embed", "vocab"),
}


def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree as jax.ShapeDtypeStruct leaves, without allocating anything."""
    return jax.eval_shape(lambda rng: init_parameters(config, rng), jax.random.key(0))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree with a tuple of axis names, one an axis, for each parameter.

    Scanned layers have "layers" as their first axis.
    """
    flat = traverse_util.flatten_dict(parameter_shapes(config))
    return traverse_util.unflatten_dict({path: _axes(path) for path in flat})


def _axes(path: tuple[str, ...]) -> tuple[str, ...]:
    module, leaf = path[-2:]
    axes = ("embed",) if module.endswith("norm") else _AXES[module]
    if leaf == "bias":
        axes = axes[-1:]
    return ("layers", *axes) if "layers" in path else axes
