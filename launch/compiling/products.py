"""FLOPs of an instruction: a multiplication and an addition each count one.

Only products count (dot, convolution, the libraries' calls for them, our Pallas kernels), as in
a model's own FLOPs; elementwise work is what the bytes are for.
"""

from __future__ import annotations

import functools
import json
import math
import re

import numpy as np

from kernels.block_sparse_attention.cost import FLOPS_SCOPE
from launch.compiling.hlo import Computation, Instruction, ints

# Custom calls that multiply matrices, by the start of their target.
_KERNELS = ("tpu_custom_call", "mosaic_gpu_v2", "__gpu$xla.gpu.triton")
_GEMMS = ("__cublas$", "__onednn$matmul", "__triton_gemm", "__cudnn$")


def flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of one execution, without those of computations that it calls."""
    match instruction.opcode:
        case "dot":
            return _dot(instruction, computation)
        case "convolution":
            return _convolution(instruction, computation)
        case "custom-call":
            return _custom_call(instruction, computation)
    return 0.0


def target(instruction: Instruction) -> str:
    """A custom call's target."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.text)
    return found[1] if found else ""


def is_opaque(instruction: Instruction) -> bool:
    """Whether this is a kernel whose work the text does not tell."""
    return is_kernel(instruction) and _declared(instruction) is None


def is_kernel(instruction: Instruction) -> bool:
    """Whether this is a Pallas kernel."""
    return instruction.opcode == "custom-call" and target(instruction) in _KERNELS


def _dot(instruction: Instruction, computation: Computation) -> float:
    contracted = ints(instruction.attribute("lhs_contracting_dims"))
    lhs = computation.operands(instruction)[0].arrays[0]
    return 2.0 * instruction.arrays[0].size * math.prod(lhs.dims[d] for d in contracted)


def _convolution(instruction: Instruction, computation: Computation) -> float:
    """Padding and dilation multiply nothing, as in XLA's own count: TPUs write a batched product
    as a convolution over the batch that is nearly all padding."""
    lhs, rhs = (operand.arrays[0] for operand in computation.operands(instruction)[:2])
    out = instruction.arrays[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    left, right, result = labels.groups()
    window = instruction.attribute("window") or "{}"
    spatial = [c for c in left if c.isdigit()]
    fields = {
        name: re.search(rf"{name}=([\d_x\-]+)", window)
        for name in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
    }
    fields = {name: found[1].split("x") for name, found in fields.items() if found}
    pairs = 1
    for number, label in enumerate(spatial):
        of = {name: values[number] for name, values in fields.items()}
        low = int(re.match(r"-?\d+", of.get("pad", "0_0"))[0])
        pairs *= _valid_pairs(
            lhs.dims[left.index(label)], rhs.dims[right.index(label)],
            out.dims[result.index(label)], int(of.get("stride", 1)), low,
            int(of.get("lhs_dilate", 1)), int(of.get("rhs_dilate", 1)),
        )  # fmt: skip
    batches = int(instruction.attribute("batch_group_count") or 1)
    rows = lhs.dims[left.index("b")] / batches
    return 2.0 * rows * out.dims[result.index("f")] * rhs.dims[right.index("i")] * pairs


@functools.lru_cache(maxsize=4096)
def _valid_pairs(
    size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int
) -> int:
    """Pairs of output and kernel position that meet an element of the input."""
    if (stride, low, dilate, kernel_dilate, kernel) == (1, 0, 1, 1, 1):
        return out
    starts = np.arange(out)[:, None] * stride - low
    at = starts + np.arange(kernel)[None, :] * kernel_dilate
    return int(np.sum((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)))


def _custom_call(instruction: Instruction, computation: Computation) -> float:
    declared = _declared(instruction)
    if declared is not None:
        return declared
    if not target(instruction).startswith(_GEMMS):
        return 0.0
    operands = computation.operands(instruction)
    numbers = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.text)
    if not numbers or not operands:
        return 0.0
    lhs = operands[0].arrays[0]
    contracted = math.prod(lhs.dims[d] for d in ints(numbers[1]))
    return 2.0 * instruction.arrays[0].size * contracted


def _declared(instruction: Instruction) -> float | None:
    """What a Pallas call says that it costs: pl.CostEstimate, or on a GPU its name's ending."""
    named = re.search(rf"{FLOPS_SCOPE}(\d+)", instruction.source)
    if named and is_kernel(instruction):
        return float(named[1])
    found = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.text)
    if not found:
        return None
    try:
        return float(json.loads(found[1]).get("flops", 0))
    except ValueError:
        return None
