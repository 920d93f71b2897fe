"""The device half of a run: each track's network, and the parameters of all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn, traverse_util

from launch.assemble import Data
from objectives.base import Objective
from t5like.data.pipeline import Pipeline
from t5like.errors import UserError
from t5like.models.config import ModelConfig
from t5like.training.state import Frozen


@dataclasses.dataclass(frozen=True)
class Network:
    """The device half of a track.

    Attributes:
      module: the flax module that holds the backbone and the objective's heads.
      init: key -> this module's parameters, in boxes that name their axes.
      loss: (params, frozen, batch, rng, train) -> {name: Term}.
      flops_per_step: model FLOPs of one training step, forward and backward.
    """

    module: Any
    init: Callable
    loss: Callable
    flops_per_step: float


def assemble_network(objective: Objective, model: ModelConfig, pipeline: Pipeline) -> Network:
    """Initialiser, loss and FLOPs of the objective's network for the pipeline's batches."""
    module = objective.network(model)
    spec = pipeline.spec()
    one_row = {name: np.zeros((1, *shape[1:]), dtype) for name, (shape, dtype) in spec.items()}

    def init(key):
        return module.init({"params": key}, one_row)["params"]

    return Network(
        module=module,
        init=jax.jit(init),
        loss=functools.partial(objective.losses, module.apply),
        flops_per_step=objective.train_flops(model, spec),
    )


def assemble_networks(data: Data) -> dict[str, Network]:
    """The network of each track."""
    return {
        name: assemble_network(objective, data.model, data.pipelines[name])
        for name, objective in data.tracks.items()
    }


def assemble_frozen(data: Data) -> Frozen | None:
    """What the objective's losses read besides parameters; by track, where there are several."""
    found = {name: objective.frozen(data.model) for name, objective in data.tracks.items()}
    if len(found) == 1:
        return next(iter(found.values()))
    found = {name: frozen for name, frozen in found.items() if frozen is not None}
    return Frozen.joined(found) if found else None


def union_of(networks: Mapping[str, Network]) -> Callable:
    """key -> the parameters of all networks in one tree, heads beside each other.

    Parameters of one name are one and have the value that each of its networks would give it, as
    initial values depend on the key and the name.

    Raises:
      UserError: networks give one name different shapes.
    """
    inits = {name: network.init for name, network in networks.items()}
    if len(inits) == 1:
        return next(iter(inits.values()))
    owners: dict[tuple, tuple[str, Any]] = {}
    for name, init in inits.items():
        shapes = nn.unbox(traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0))))
        for path, leaf in shapes.items():
            owner, other = owners.setdefault(path, (name, leaf))
            if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
                raise UserError(
                    f"{owner!r} and {name!r} both have a parameter {'/'.join(path)}, of shape "
                    f"{list(other.shape)} and {list(leaf.shape)}: they cannot be trained in one "
                    "run unless their networks' settings agree"
                )

    def init(key):
        flat = {}
        for part in inits.values():
            flat = traverse_util.flatten_dict(part(key)) | flat
        return traverse_util.unflatten_dict(flat)

    return jax.jit(init)
