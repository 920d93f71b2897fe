"""Both GPU paths compiled for an H100 that is not here, down to machine code by ptxas.

A kernel that wants more shared memory than a block may have does not compile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

from kernels import attention
from kernels.block_sparse_attention import flash, mosaic, triton
from tests.hardware import calls, topologies

PLATFORM = "cuda"
# Custom calls as XLA is given them.
TARGETS = {"triton": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu_v2"}


def attend(path, q, k, v, mask, *, bias=None):
    """kernels.attention through one of the two paths; skips what it says it cannot serve."""
    prepared = flash.prepare(
        path,
        q,
        k,
        v,
        mask,
        bias=bias,
        scale=q.shape[-1] ** -0.5,
        logits_soft_cap=None,
        block_sizes=None,
    )
    call = prepared.problem, prepared.bias, prepared.q, prepared.k, prepared.v
    reason = path.refusal(*call)
    if reason:
        pytest.skip(reason)
    return flash.run(path, prepared, q.shape[1], interpret=False)[0]


def lowered(attend, mask: str, bias: str = "none", length: int = 4096, **shape):
    """Output and gradients, lowered for an H100."""
    function = calls.gradients(attend, mask, bias)
    arguments = calls.shapes(length, shape.pop("head_dim", 128), **shape)
    return topologies.lower(topologies.h100(), function, *arguments)


def counts(program: jax.stages.Lowered) -> dict[str, int]:
    """Kernels of each path."""
    text = program.as_text()
    return {name: text.count(target) for name, target in TARGETS.items()}


def compile_through(path, *arguments, **shape) -> jax.stages.Compiled:
    """Compiles output and gradients, after a look at who serves them."""
    program = lowered(functools.partial(attend, path), *arguments, **shape)
    found = counts(program)
    name = path.__name__.rpartition(".")[2]
    assert found.pop(name) >= 2 and not any(found.values())
    return program.compile()


paths = pytest.mark.parametrize("path", [triton, mosaic], ids=["triton", "mosaic"])


@paths
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims(path, head_dim):
    compile_through(path, "causal", head_dim=head_dim)


@paths
@pytest.mark.parametrize("mask", [name for name in calls.MASKS if name != "causal"])
def test_masks(path, mask):
    compile_through(path, mask)


@paths
@pytest.mark.parametrize("bias", [name for name in calls.BIASES if name != "none"])
def test_biases_with_the_gradient_of_their_table(path, bias):
    compile_through(path, "window and globals", bias)


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
    program.compile()


@paths
@pytest.mark.parametrize(("length", "head_dim"), [(1000, 64), (100, 80)])
def test_odd_shapes(path, length, head_dim):
    compile_through(path, "causal", length=length, head_dim=head_dim)


def test_too_much_shared_memory_does_not_compile():
    def square(x, out):
        out[...] = jnp.dot(x[...], x[...], preferred_element_type=jnp.float32)

    def kernel(x):
        shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return pl.pallas_call(square, shape, compiler_params=pallas_triton.CompilerParams())(x)

    program = topologies.lower(
        topologies.h100(), kernel, jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        program.compile()
