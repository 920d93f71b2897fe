"""The TPU kernels compiled by libtpu for chips that are not here."""

from __future__ import annotations

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from kernels import attention, masks
from t5like.models.sharding import sharded_attention
from t5like.training.sharding import Sharding
from tests.hardware import calls, topologies

PLATFORM = "tpu"
KERNEL = 'custom_call_target="tpu_custom_call"'
ours = functools.partial(attention, backend="tpu")
chips = pytest.mark.parametrize("chip", topologies.TPUS)


def compiled(
    chip: str,
    mask: str,
    bias: str = "none",
    length: int = 4096,
    head_dim: int = 128,
    heads: int = 2,
    dtype: jnp.dtype = jnp.bfloat16,
) -> jax.stages.Compiled:
    """Output and gradients, compiled for one chip."""
    function = calls.gradients(ours, mask, bias)
    arguments = calls.shapes(length, head_dim, heads=heads, kv_heads=heads // 2, dtype=dtype)
    return topologies.lower(topologies.tpu(chip), function, *arguments).compile()


def assert_kernels(program: jax.stages.Compiled) -> None:
    """The forward and the backward are kernels, not the interpreter's loops."""
    assert program.as_text().count(KERNEL) >= 2


@chips
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims(chip, head_dim):
    assert_kernels(compiled(chip, "causal", head_dim=head_dim))


@chips
@pytest.mark.parametrize("mask", [name for name in calls.MASKS if name != "causal"])
def test_masks(chip, mask):
    assert_kernels(compiled(chip, mask))


@chips
@pytest.mark.parametrize("bias", [name for name in calls.BIASES if name != "none"])
def test_biases_with_the_gradient_of_their_table(chip, bias):
    assert_kernels(compiled(chip, "window and globals", bias))


@pytest.mark.parametrize(("length", "head_dim"), [(1000, 32), (100, 80)])
def test_odd_shapes(length, head_dim):
    assert_kernels(compiled("v5e", "causal", length=length, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_float32(head_dim):
    assert_kernels(compiled("v5e", "causal", head_dim=head_dim, dtype=jnp.float32))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_everything_at_once(head_dim):
    assert_kernels(compiled("v5e", "packed causal", "T5", head_dim=head_dim))


@pytest.mark.parametrize(
    ("mask", "bias"),
    [("causal", "none"), ("window and globals", "T5"), ("packed causal", "none")],
)
def test_memory_is_linear_in_length(mask, bias):
    # So many heads that nothing fits in the chip's own memory, where it would not be counted.
    def memory(length):
        return compiled("v5e", mask, bias, length, heads=16).memory_analysis()

    stats = {length: memory(length) for length in (16384, 65536, 131072)}
    temporary = {length: stat.temp_size_in_bytes for length, stat in stats.items()}
    assert temporary[131072] <= 2.1 * temporary[65536]
    for length, stat in stats.items():
        given = stat.argument_size_in_bytes + stat.output_size_in_bytes
        assert temporary[length] <= given, length


@pytest.mark.parametrize("lead", [(1, 1), (1, 8), (4, 1)])
@pytest.mark.parametrize("is_differentiated", [False, True])
def test_a_written_out_bias_takes_a_few_times_its_own_memory(lead, is_differentiated):
    batch, heads, length = 4, 8, 2048

    def gradient(q, k, v, bias, d_out):
        def forward(q, k, v, bias):
            return ours(q, k, v, masks.Causal(), bias=bias)

        if is_differentiated and bias is not None:
            return jax.vjp(forward, q, k, v, bias)[1](d_out)
        return jax.vjp(lambda q, k, v: forward(q, k, v, bias), q, k, v)[1](d_out)

    q, k, v, d_out, *_ = calls.shapes(length, 128, batch=batch, heads=heads, kv_heads=heads)
    bias = jax.ShapeDtypeStruct((*lead, length, length), jnp.float32)

    def temporary(function, *arguments):
        program = topologies.lower(topologies.tpu("v5e"), function, *arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    without = temporary(lambda q, k, v, d: gradient(q, k, v, None, d), q, k, v, d_out)
    more = temporary(gradient, q, k, v, bias, d_out) - without
    # Forward and backward lay its blocks out; its gradient's are turned back. Never one a head.
    copies = 4.1 if is_differentiated else 2.1
    assert more <= copies * bias.size * bias.dtype.itemsize


def test_under_shard_map():
    mesh = topologies.tpu("v5e", devices=4)
    spec = PartitionSpec("data")

    def forward(q, k, v):
        return ours(q, k, v, masks.Causal())

    def gradient(q, k, v, d_out):
        split = jax.shard_map(forward, mesh=mesh, in_specs=spec, out_specs=spec)
        return jax.vjp(split, q, k, v)[1](d_out)

    arguments = calls.shapes(4096, 128, batch=8)[:4]
    assert_kernels(topologies.lower(mesh, gradient, *arguments).compile())


def test_context_parallelism():
    """32768 slots on four chips: the mesh says what to compile for, each chip lists its own blocks,
    keys and values travel twice, their gradients once, and nothing is sent of queries."""
    sharding, length, heads = Sharding(data=1, sequence=4), 32768, 16
    mesh = sharding.mesh(topologies.tpu("v5e", devices=4).devices.ravel())
    mask = masks.SlidingWindow(256, 256) | masks.GlobalTokens(count=1)

    def gradient(q, k, v, d_out):
        out, pull = jax.vjp(lambda *x: sharded_attention(*x, mask), q, k, v)
        return out, pull(d_out)

    placed = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    shapes = calls.shapes(length, 128, heads=heads, kv_heads=2)[:4]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for x in shapes]
    with sharding.in_force(mesh):
        program = jax.jit(gradient).lower(*shapes).compile()
    text = program.as_text()
    assert text.count(KERNEL) == 3
    # The first chip has most: the row of globals, one at the edge, and a window and a column each.
    blocks = 64 + 3 + 14 * 4
    flops = 2 * 2 * blocks * 512 * 512 * 128 * heads
    assert f'"cost_estimate":{{"flops":"{flops}"' in text
    sent = re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)
    assert Counter(sent) == {"all-gather": 4, "reduce-scatter": 2}
    assert f"bf16[1,{length},{heads}" not in text and f"bf16[{heads},{length}" not in text


def test_too_much_vector_memory_does_not_compile():
    def copy(x, out):
        out[...] = x[...]

    def kernel(x):
        return pl.pallas_call(copy, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    program = topologies.lower(
        topologies.tpu("v5e"), kernel, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        program.compile()
