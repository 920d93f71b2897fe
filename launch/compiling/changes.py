"""Settings that would change what a program needs, and estimates of how much."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from launch.compiling import memory, program as program_lib
from launch.compiling.program import Plan
from launch.run_config import RunConfig
from t5like.errors import UserError
from t5like.training.sharding import Sharding

Moves = Iterator[tuple[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What a generate program decodes: so many prompts at once, as the command line asks for or,
    not `asked`, one for each part of a batch; and the tokens that it adds."""

    rows: int
    asked: bool
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Change:
    """A changed run.

    Attributes:
      settings: what to pass on the command line.
      config: the run with it.
      decoded: of a generate program; None for a train step.
      needed: bytes of a device, estimated.
    """

    settings: str
    config: RunConfig
    decoded: Decoded | None
    needed: float


def of(plan: Plan, needed: float, hbm: float, decoded: Decoded | None) -> Iterator[Change]:
    """Changes worth a thought, those that cost the least speed first; then, if none of them is
    enough, several together.

    Args:
      needed, hbm: bytes of a device that the program takes, and that there are.
      decoded: of a generate program; None for a train step.
    """
    if decoded is None:
        moves, together = list(_moves(plan)), list(_together(plan))
    else:
        moves = together = list(_decoding_moves(plan, decoded))
    tried = (_estimated(plan, [move], needed, decoded) for move in moves)
    single = [change for change in tried if change]
    yield from single
    if any(change.needed <= hbm for change in single):
        return
    taken: list = []
    for move in together:
        taken.append(move)
        change = _estimated(plan, taken, needed, decoded)
        if change is None:
            taken.pop()
        elif len(taken) > 1:
            yield change
            if change.needed <= hbm:
                return


def _moves(plan: Plan) -> Moves:
    """(setting, its fields) of single changes of a train step."""
    yield from _remat(plan)
    for more in (2, 4):
        yield f"--gin.train.accumulate={plan.config.accumulate * more}", {"accumulate": more}
    for tensor in (1, 2, 4):
        yield from _layout(plan, tensor)


def _together(plan: Plan) -> Moves:
    """Changes to add up: the state divided first, then what the step keeps."""
    yield from _layout(plan, 1)
    yield from _remat(plan)
    for more in (2, 4, 8, 16):
        yield f"--gin.train.accumulate={plan.config.accumulate * more}", {"accumulate": more}


def _decoding_moves(plan: Plan, decoded: Decoded) -> Moves:
    """Of a generate program: where parameters and caches lie, and fewer prompts at once."""
    for tensor in (1, 2, 4):
        yield from _layout(plan, tensor)
    parts = plan.config.sharding.parts(plan.mesh, "batch")
    for less in (2, 4, 8):
        rows = decoded.rows // less
        if rows * less == decoded.rows and rows and rows % parts == 0:
            yield f"--generate_batch={rows}", {"rows": rows}


def _remat(plan: Plan) -> Moves:
    now = plan.config.model.remat
    for remat in ("dots", "full"):
        if now == "none" or (remat == "full" and now != "full"):
            yield f"--gin.ModelConfig.remat=\"'{remat}'\"", {"remat": remat}


def _layout(plan: Plan, tensor: int) -> Moves:
    """All devices of a slice fsdp, but for some that are tensor."""
    mesh = plan.mesh.shape
    within = plan.mesh.size // (mesh["replica"] * mesh["sequence"])
    fsdp = within // tensor
    if within % tensor or (fsdp, tensor) == (mesh["fsdp"], mesh["tensor"]):
        return
    sharding = Sharding(
        mesh["replica"], 1, fsdp, mesh["sequence"], tensor, plan.config.sharding.rules
    )
    text = "--gin.train.sharding=@Sharding() --gin.Sharding.data=1 "
    text += f"--gin.Sharding.fsdp={fsdp} --gin.Sharding.tensor={tensor}"
    yield text, {"sharding": sharding}


def _estimated(
    plan: Plan, moves: Sequence[tuple[str, dict[str, Any]]], needed: float, decoded: Decoded | None
) -> Change | None:
    """Several changes at once, with what they would need; None where they are not possible.

    The state and its gradients are counted exactly. Of the rest, half the rows at a time, or twice
    the tensor axis, are taken to need half, and recomputation what it keeps of each layer and one
    layer's share.
    """
    fields = {name: value for _, change in moves for name, value in change.items()}
    config, model = plan.config, plan.config.model
    if "remat" in fields:
        model = dataclasses.replace(model, remat=fields["remat"], remat_names=())
    try:
        changed = dataclasses.replace(
            config,
            model=model,
            accumulate=config.accumulate * fields.get("accumulate", 1),
            sharding=fields.get("sharding", config.sharding),
        )
        other = program_lib.plan(changed, list(plan.mesh.devices.flat))
    except UserError:
        return None
    parts, before = (x.config.sharding.parts(x.mesh, "batch") for x in (other, plan))
    share = before / parts * plan.mesh.shape["tensor"] / other.mesh.shape["tensor"]
    share *= config.accumulate / changed.accumulate
    if decoded is not None:
        rows = fields.get("rows") or (decoded.rows if decoded.asked else parts)
        share *= rows / decoded.rows
        decoded = dataclasses.replace(decoded, rows=rows)
    rest = max(0.0, needed - _fixed(plan, decoded)) * share
    if "remat" in fields:
        depth = max(model.stacks.values())
        rest = min(rest, rest / depth + _kept(other))
    settings = dict(text.split("=", 1) for move, _ in moves for text in re.split(r" (?=--)", move))
    joined = " ".join(f"{name}={value}" for name, value in settings.items())
    return Change(joined, changed, decoded, _fixed(other, decoded) + rest)


def held(plan: Plan, decoded: Decoded | None) -> float:
    """Bytes that a device holds before the program starts: the state, or what decodes."""
    if decoded is None:
        return sum(memory.parts_of(plan.state).values())
    return sum(map(memory.on_device, jax.tree.leaves(plan.state.params["model"])))


def _fixed(plan: Plan, decoded: Decoded | None) -> float:
    """Of a train step, the gradients in float32 too."""
    gradients = 0.0
    if decoded is None:
        leaves = jax.tree.leaves(plan.state.params)
        gradients = sum(memory.on_device(leaf) / leaf.dtype.itemsize * 4 for leaf in leaves)
    return held(plan, decoded) + gradients


def _kept(plan: Plan) -> float:
    """Bytes that remat keeps of all layers: what enters each, and under "dots" what its products
    and its attention give, of the tokens that a device computes at a time."""
    model, config, most = plan.data.model, plan.config, 0.0
    devices = math.prod(config.sharding.parts(plan.mesh, name) for name in ("batch", "length"))
    tensor, width = plan.mesh.shape["tensor"], jax.numpy.dtype(model.dtype).itemsize
    for batches in plan.data.pipelines.values():
        total = 0.0
        for stack, depth in model.stacks.items():
            tokens = math.prod(batches.spec()[f"{stack}_input_tokens"][0])
            numbers = float(model.d_model)
            if model.remat == "dots":
                attentions = 2 if stack == "decoder" and len(model.stacks) == 2 else 1
                heads = 2 * (model.num_heads + model.kv_heads) * model.head_dim
                split = attentions * heads + (1 + model.gated_mlp) * model.d_ff
                numbers += (attentions + 1) * model.d_model + split / tensor
            total += depth * tokens / devices / config.accumulate * numbers * width
        most = max(most, total)
    return most
