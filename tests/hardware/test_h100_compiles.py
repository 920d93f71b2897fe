"""Both GPU paths compiled for GPUs that are not here, down to machine code by ptxas.

A kernel that wants more shared memory than a block may have does not compile. Modules of Pallas
for GPUs are imported where they are called: not every platform has them.
"""

from __future__ import annotations

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from kernels import attention
from kernels.block_sparse_attention import flash
from kernels.block_sparse_attention.cost import FLOPS_SCOPE
from tests.hardware import calls, topologies

PLATFORM = "cuda"
# Custom calls as XLA is given them.
TARGETS = {"triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu_v2"}
paths = pytest.mark.parametrize("path", TARGETS)


def attend(path, q, k, v, mask, *, bias=None, soft_cap=None, block_sizes=None):
    """kernels.attention through one of the two paths; skips what it says it cannot serve."""
    backend = importlib.import_module(f"kernels.block_sparse_attention.{path}")
    prepared = flash.prepare(
        backend,
        q,
        k,
        v,
        mask,
        bias=bias,
        scale=q.shape[-1] ** -0.5,
        logits_soft_cap=soft_cap,
        block_sizes=block_sizes,
    )
    call = prepared.problem, prepared.bias, prepared.q, prepared.k, prepared.v
    reason = backend.refusal(*call)
    if reason:
        pytest.skip(reason)
    return flash.run(backend, prepared, q.shape[1], interpret=False)[0]


def lowered(
    attend, mask: str, bias: str = "none", *, length: int = 4096, gpu: str = "h100", **shape
):
    """Output and gradients, lowered for a GPU."""
    function = calls.gradients(attend, mask, bias)
    arguments = calls.shapes(length, shape.pop("head_dim", 128), **shape)
    return topologies.lower(topologies.gpu(gpu), function, *arguments)


def counts(program: jax.stages.Lowered) -> dict[str, int]:
    """Kernels of each path."""
    text = program.as_text()
    return {name: text.count(target) for name, target in TARGETS.items()}


def compile_through(
    path, *arguments, soft_cap=None, block_sizes=None, **shape
) -> jax.stages.Compiled:
    """Compiles output and gradients, after a look at who serves them."""
    served = functools.partial(attend, path, soft_cap=soft_cap, block_sizes=block_sizes)
    program = lowered(served, *arguments, **shape)
    found = counts(program)
    assert found.pop(path) >= 2 and not any(found.values())
    return program.compile()


@paths
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_head_dims(path, head_dim):
    compile_through(path, "causal", head_dim=head_dim)


@paths
@pytest.mark.parametrize("mask", [name for name in calls.MASKS if name != "causal"])
def test_masks(path, mask):
    compile_through(path, mask)


@pytest.mark.parametrize("mask", calls.MORE_MASKS)
@paths
def test_more_masks(path, mask):
    compile_through(path, mask, length=1024, head_dim=64)


@paths
def test_soft_cap_and_keys_that_no_heads_share(path):
    compile_through(path, "packed causal", soft_cap=30.0, head_dim=64, kv_heads=2)


@pytest.mark.parametrize("block", [64, 192])
def test_lines_of_one_warpgroup(block):
    compile_through("mosaic", "packed causal", block_sizes=(block, block), head_dim=64)


@paths
@pytest.mark.parametrize("bias", [name for name in calls.BIASES if name != "none"])
def test_biases_with_the_gradient_of_their_table(path, bias):
    compile_through(path, "window and globals", bias)


@pytest.mark.parametrize("bias", calls.MORE_BIASES)
def test_arrays_with_their_gradient(bias):
    compile_through("triton", "causal", bias, length=1024, head_dim=64)


@paths
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_dtypes(path, dtype):
    compile_through(path, "packed causal", dtype=dtype)


@paths
def test_memory_is_linear_in_length(path):
    def temporary(length):
        program = compile_through(path, "causal", length=length, heads=16, kv_heads=8)
        return program.memory_analysis().temp_size_in_bytes

    short, long = temporary(16384), temporary(131072)
    assert long <= 8.4 * short


@pytest.mark.parametrize(("bias", "chosen"), [("none", "mosaic"), ("T5", "triton")])
def test_the_public_call_chooses_a_path(bias, chosen):
    program = lowered(functools.partial(attention, backend="gpu"), "packed causal", bias)
    assert {name for name, count in counts(program).items() if count} == {chosen}
    # What a kernel computes is to be read from its name.
    assert re.search(rf'op_name="[^"]*{FLOPS_SCOPE}\d+', program.compile().as_text())


def test_ampere_takes_triton():
    program = lowered(functools.partial(attention, backend="gpu"), "causal", "T5", gpu="a100")
    assert counts(program)["triton"] and not counts(program)["mosaic"]
    program.compile()


def test_older_gpus_are_left_to_xla():
    assert not any(counts(lowered(attention, "causal", gpu="t4")).values())


@paths
@pytest.mark.parametrize(("length", "head_dim"), [(1000, 64), (100, 80)])
def test_odd_shapes(path, length, head_dim):
    compile_through(path, "causal", length=length, head_dim=head_dim)


def test_too_much_shared_memory_does_not_compile():
    from jax.experimental.pallas import triton as pallas_triton

    def square(x, out):
        out[...] = jnp.dot(x[...], x[...], preferred_element_type=jnp.float32)

    def kernel(x):
        shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return pl.pallas_call(square, shape, compiler_params=pallas_triton.CompilerParams())(x)

    program = topologies.lower(
        topologies.gpu(), kernel, jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        program.compile()
