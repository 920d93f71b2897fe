"""The fewest bytes that a layout must send: what a train step's collectives are held against."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from flax import traverse_util

from launch.compiling.program import Plan

_GRADIENT_BYTES = 4  # Gradients are summed in float32, see t5like/models/layers.py.


@dataclasses.dataclass(frozen=True)
class Floor:
    """Bytes that a device sends in a step by ring algorithms, at least.

    With P_t the elements of a parameter that a device of the tensor axis computes with, n the
    devices that its axes split it over besides (fsdp, sequence), m those that only copy it and see
    other tokens (replica, data; all of them where it is whole), c bytes of the compute dtype, N the
    micro-batches, B, L, D and t the device's rows, their tokens, the model's width and the tensor
    axis's size:

        gathers    = N * g * (n - 1) / n * P_t * c       g = 2 for layers (forward and backward; a
                     recomputation shares the backward's), 1 for embeddings and the output layer
        scatters   = N * (n - 1) / n * P_t * 4           of gradients, to the devices that keep them
        reductions = 2 (m - 1) / m * P_t / n * 4         of gradients, over the copies
        tensor     = 2 (t - 1) / t * B L D c * r         r: two a sublayer (its output forward, its
                     input's gradient backward), the forward ones of all but the last sublayer once
                     more under full remat, one for the embedding and one for the output layer,
                     where the vocabulary is split
        sequence   = (s - 1) / s * B (s L) * 2 N_kv Dh * 3 c   keys and values of self-attention,
                     gathered forward and backward and their gradients scattered

    With N > 1 the compiled step also reduces gradients over the copies in every micro-batch, where
    once at the end would do, so that the ratio to this floor grows with N.

    Left out: the optimiser's own (a norm, Adafactor's means), metrics, and batches.
    """

    gathers: float = 0.0
    scatters: float = 0.0
    reductions: float = 0.0
    tensor: float = 0.0
    sequence: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.asdict(self).values())


def of(plan: Plan, track: str) -> Floor:
    """The floor of a track's train step."""
    rules, mesh = plan.config.sharding.logical_rules, plan.mesh.shape
    over = {axis for name in ("batch", "length") for axis in rules.get(name, ())}
    width = jax.numpy.dtype(plan.data.model.dtype).itemsize
    declared, times = plan.tracks[track].paths, plan.config.accumulate
    gathers = scatters = reductions = 0.0
    for path, leaf in traverse_util.flatten_dict(plan.state.params).items():
        if declared is not None and path not in declared:
            continue
        axes = _axes(leaf)
        split = math.prod(mesh[axis] for axis in axes & over)
        copies = math.prod(mesh[axis] for axis in over - axes)
        size = leaf.size / math.prod(mesh[axis] for axis in axes - over)
        passes = 2 if any(part.startswith("layers") for part in path) else 1
        share = (split - 1) / split
        gathers += times * passes * share * size * width
        scatters += times * share * size * _GRADIENT_BYTES
        reductions += 2 * (copies - 1) / copies * size / split * _GRADIENT_BYTES
    tensor, sequence = _activations(plan, track, width)
    return Floor(gathers, scatters, reductions, tensor, sequence)


def _axes(leaf: Any) -> set[str]:
    """Mesh axes that an array is split over."""
    entries = (e if isinstance(e, tuple) else (e,) for e in leaf.sharding.spec if e is not None)
    return {axis for entry in entries for axis in entry}


def _activations(plan: Plan, track: str, width: int) -> tuple[float, float]:
    """(tensor, sequence) of all the model's stacks; of ELECTRA's generator, nothing."""
    model, config, mesh = plan.data.model, plan.config, plan.mesh.shape
    features = plan.data.pipelines[track].spec()
    rules = config.sharding.logical_rules
    tensor_axes = [a for a in rules.get("mlp", ()) if mesh.get(a, 1) > 1]
    t = math.prod(mesh[a] for a in tensor_axes)
    s = math.prod(mesh.get(a, 1) for a in rules.get("length", ()))
    rows_in = config.sharding.parts(plan.mesh, "batch")
    tensor = sequence = 0.0
    for stack, depth in model.stacks.items():
        shape = features[f"{stack}_input_tokens"][0]
        rows = math.prod(shape[:-1]) / rows_in
        states = rows * shape[-1] / s * model.d_model * width
        sublayers = 3 if stack == "decoder" and len(model.stacks) == 2 else 2
        passes = 2 * sublayers + (sublayers - 1 if model.remat == "full" else 0)
        tensor += 2 * (t - 1) / t * states * depth * passes
        if any(mesh.get(a, 1) > 1 for a in rules.get("vocab", ())):
            predicts = stack == "decoder" or len(model.stacks) == 1
            tensor += 2 * (t - 1) / t * states * (2 if predicts else 1)
        keys = rows * shape[-1] * 2 * model.kv_heads * model.head_dim / t
        sequence += (s - 1) / s * keys * 3 * width * depth
    return tensor, sequence
