"""Static schedules of the TPU kernels beside those of jax's own splash attention, without a TPU.

    make .venv-tpu/ready
    .venv-tpu/bin/python -m benchmarks.attention_static     # writes benchmarks/attention_static.md

libtpu compiles for a v5e and dumps the final schedule of every kernel (tpu_schedules.py). That is a
bound on speed, not a time: waits for memory are not in it. Grid steps are counted from the lists
of blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator
from importlib import metadata

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
    splash_attention_mask as splash_masks,
)

from benchmarks.tpu_schedules import Schedule, take_schedules
from kernels import RelativeBias, attention, masks
from kernels.block_sparse_attention import flash
from kernels.block_sparse_attention.problem import ACTIVE
from tests.hardware import topologies

PAGE = pathlib.Path(__file__).with_suffix(".md")
LENGTH, BLOCK, HEAD_DIM = 4096, 256, 128
WINDOW = 256


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask as both libraries write it; `bias` is T5's, which splash has no place for."""

    name: str
    ours: masks.Mask
    theirs: Callable[[int], splash_masks.Mask] | None
    bias: bool = False


class WindowAndGlobal(splash_masks._ComputableMask):
    """Splash computes masks of this class in the kernel, as ours are."""

    def __init__(self, length: int, window: int):
        def visible(q, k):
            return (abs(q - k) <= window) | (q < 1) | (k < 1)

        super().__init__((length, length), visible)

    def __hash__(self):
        return hash(self.shape)

    def __eq__(self, other):
        return isinstance(other, WindowAndGlobal) and self.shape == other.shape


def cases(window: int) -> list[Case]:
    local = masks.SlidingWindow(window, window)
    return [
        Case("full", masks.Full(), lambda n: splash_masks.FullMask((n, n))),
        Case("causal", masks.Causal(), lambda n: splash_masks.CausalMask((n, n))),
        Case(
            f"window of {window} each side",
            local,
            lambda n: splash_masks.LocalMask((n, n), (window, window), 0),
        ),
        Case(
            f"window of {window}, one global row and column",
            local | masks.GlobalTokens(1),
            lambda n: WindowAndGlobal(n, window),
        ),
    ]


def splash_kernel(mask: splash_masks.Mask, block: int) -> splash.SplashAttentionKernel:
    sizes = splash.BlockSizes(
        **{
            name: block
            for name in (
                "block_q",
                "block_kv",
                "block_kv_compute",
                "block_q_dkv",
                "block_kv_dkv",
                "block_kv_dkv_compute",
                "block_q_dq",
                "block_kv_dq",
            )
        }
    )
    return splash.make_splash_mha(
        splash_masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )


def compile_splash(case: Case) -> dict[str, Schedule]:
    """Kernels of splash, the forward as it is where there is a gradient."""
    kernel = splash_kernel(case.theirs(LENGTH), BLOCK)
    x = jax.ShapeDtypeStruct((1, LENGTH, HEAD_DIM), jnp.bfloat16)

    def gradient(q, k, v, d_out):
        return jax.vjp(kernel, q, k, v)[1](d_out)

    mesh = topologies.tpu("v5e")
    topologies.lower(mesh, gradient, x, x, x, x).compile()
    return take_schedules()


def compile_ours(case: Case) -> dict[str, Schedule]:
    x = jax.ShapeDtypeStruct((1, LENGTH, 1, HEAD_DIM), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((32, 1), jnp.float32)

    def forward(q, k, v, table):
        return attention(
            q,
            k,
            v,
            case.ours,
            bias=RelativeBias(table) if case.bias else None,
            backend="tpu",
            block_sizes=(BLOCK, BLOCK),
        )

    def gradient(q, k, v, table, d_out):
        return jax.vjp(forward, q, k, v, table)[1](d_out)

    topologies.lower(topologies.tpu("v5e"), gradient, x, x, x, table, x).compile()
    return take_schedules()


_KINDS = {"forward": "fwd|forward", "dq": "dq", "dkv": "dkv"}


def by_kind(schedules: dict[str, Schedule]) -> dict[str, Schedule]:
    """The schedules under "forward", "dq" and "dkv"."""
    return {
        next(kind for kind, pattern in _KINDS.items() if re.search(pattern, name)): schedule
        for name, schedule in schedules.items()
    }


# Matrix products of a block, and what a v5e's four 128 x 128 units do in the time of a bundle.
_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
_FLOPS_A_BUNDLE = 4 * 128 * 128 * 2


def schedule_rows() -> Iterator[str]:
    yield (
        "| mask | kernel | whose | all | path | block | MXU | XLU | spills | MXU fill | of peak |"
    )
    yield "| --- | --- | --- " + "| --: " * 8 + "|"
    biased = [Case(f"{case.name}, T5 bias", case.ours, None, bias=True) for case in cases(WINDOW)]
    for case in [*cases(WINDOW), *biased]:
        theirs = by_kind(compile_splash(case)) if case.theirs else {}
        ours = by_kind(compile_ours(case))
        for kind in _PRODUCTS:
            rival = theirs.get(kind)
            for whose, schedule in (("splash", rival), ("ours", ours[kind])):
                if schedule is not None:
                    yield from _rows(case.name, kind, whose, schedule, rival)


def _rows(
    mask: str, kind: str, whose: str, schedule: Schedule, rival: Schedule | None
) -> Iterator[str]:
    work = _PRODUCTS[kind] * 2 * BLOCK * BLOCK * HEAD_DIM / _FLOPS_A_BUNDLE
    names = ["full block", "partial block"] if len(schedule.paths) == 2 else [""]
    for name, path in zip(names, schedule.paths, strict=True):
        label = f"{whose}, {name}" if name else whose
        bundles = f"{path.bundles}"
        if whose == "ours" and rival is not None:
            bundles += f" ({path.bundles / rival.paths[0].bundles:.2f}x)"
        yield (
            f"| {mask} | {kind} | {label} | {schedule.bundles} | {bundles} | {path.block} | "
            f"{path.mxu} | {path.xlu} | {path.spills} | {path.fill:.3f} | "
            f"{work / path.block:.2f} |"
        )


def step_rows() -> Iterator[str]:
    yield (
        "| mask | length / block | active blocks | ours: forward, dq | ours: dkv | ours / active | "
        "splash: forward, dq | splash: dkv | splash / active |"
    )
    yield "| --- | --- | --: | --: | --: | --: | --: | --: | --: |"
    for length, block in ((4096, 256), (65536, 512)):
        for case in cases(block):
            problem = flash.make_problem(
                case.ours, length, length, (block, block), scale=1.0, soft_cap=None
            )
            active = int((problem.by_row.flags & ACTIVE != 0).sum())
            ours = problem.by_row.num_steps, problem.by_col.num_steps
            theirs = splash_steps(case.theirs(length), length // block, block)
            yield (
                f"| {case.name} | {length} / {block} | {active} | {ours[0]} | {ours[1]} | "
                f"{max(ours) / active:.2f} | {theirs[0]} | {theirs[1]} | "
                f"{max(theirs) / active:.2f} |"
            )


def splash_steps(mask: splash_masks.Mask, lines: int, block: int) -> tuple[int, int]:
    """Grid steps of splash's forward (and dq) and of its dkv kernel, for one head."""
    kernel = splash_kernel(mask, block)
    forward, dkv = kernel.fwd_mask_info.data_next, kernel.dkv_mask_info.data_next
    return (
        lines * (lines if forward is None else forward.shape[-1]),
        lines * (lines if dkv is None else dkv.shape[-2]),
    )


_TEXT = """# Static schedules of the TPU kernels

Made by `{command}` with jax {jax} and libtpu {libtpu}: compiled
for a v5e, bfloat16, head dimension {head_dim}, {length} tokens in blocks of {block} by {block}.
No TPU took part and nothing was timed: waits for memory are not in these figures.

The goals are at most 1.1 times the bundles of splash, spills no more and MXU fill no less than its,
and at most 1.05 grid steps an active block. They are met but for these:

- *Spills.* On a partial block of a window with a global row and column, dq spills one register
  more than splash. Full blocks, and all other partial ones, spill no more.
- *MXU fill.* Counted in slots, as splash's figures are, dq fills less of the units than splash, and
  the forward of a full block a little less. Slots count ways into the units, not work (below): by
  the work done, *of peak*, dq is ahead, and the forward at most 0.02 behind.
- *Whole kernels.* A kernel for a mask with full and partial blocks has a body for either, and all
  its bundles are more than 1.1 times splash's. What is compared is the longest path of a step.
- *T5's bias* has no rival: splash has no place for it. Its kernels spill more than those without.

## Schedules beside jax's splash attention

Unit: bundles, the instructions that issue together. *all*: of the kernel. *path*: those that one
step can execute, the pipeline's prologue and epilogue included: ours has one body for full and one
for partial blocks where a mask has both, and a step executes one of them. *block*: that body alone,
between two branches, which is what an active block costs. *MXU*, *XLU*: slots of the matrix and the
cross-lane units in use on the path. *spills*: vector registers stored on the path for want of
registers. *MXU fill*: slots of the matrix units in use over all slots of the path. It is no measure
of work: an operand that is turned around on its way into the units takes more slots, and splash's
dq turns around one more than ours. *of peak*: bundles that the products of a block take at the
chip's peak, over the bundles of the block.

{schedules}

## Grid steps over active blocks

One head. Every step past the active blocks is a step in which nothing is computed.

{steps}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=pathlib.Path, default=PAGE, help="markdown file to write")
    page = parser.parse_args().page
    reason = topologies.missing("tpu")
    if reason:
        raise SystemExit(reason)
    page.write_text(
        _TEXT.format(
            command=".venv-tpu/bin/python -m benchmarks.attention_static",
            jax=jax.__version__,
            libtpu=metadata.version("libtpu"),
            head_dim=HEAD_DIM,
            length=LENGTH,
            block=BLOCK,
            schedules="\n".join(schedule_rows()),
            steps="\n".join(step_rows()),
        )
    )


if __name__ == "__main__":
    main()
