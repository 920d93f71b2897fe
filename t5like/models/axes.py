"""Shapes and logical axes of every parameter, from the config alone; nothing is allocated."""

from __future__ import annotations

from typing import Any

import jax

from t5like.models import partitioning
from t5like.models.config import ModelConfig
from t5like.models.transformer import init_named, init_parameters


def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree as jax.ShapeDtypeStruct leaves."""
    return jax.eval_shape(lambda rng: init_parameters(config, rng), jax.random.key(0))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree with a tuple of names, one an axis, for each parameter.

    Scanned layers have "layers" as their first axis; None stands for one that is never split.
    """
    boxed = jax.eval_shape(lambda rng: init_named(config, rng), jax.random.key(0))
    return partitioning.names_of(boxed)
