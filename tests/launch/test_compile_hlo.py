"""Reading compiled programs: known values, and the ways in which compilers write things."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from launch.compiling import collectives, counts, hlo, loops, products

MESH = {"data": 4, "fsdp": 4}


def compiled(function, *shapes):
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return jax.jit(function).lower(*arguments).compile()


def counted(function, *shapes):
    module = hlo.parse(compiled(function, *shapes).as_text())
    return counts.count(module, {"data": 1}, unknown_trips=5)


def test_a_product():
    assert counted(lambda x, y: x @ y, (8, 32), (32, 16)).flops == 2 * 8 * 32 * 16


def test_a_batched_product_and_its_gradient():
    def loss(x, y):
        return jnp.sum(jnp.einsum("bhqd,bhkd->bhqk", x, y) ** 2)

    one = 2 * 2 * 3 * 16 * 24 * 8
    gradient = jax.grad(loss, (0, 1))
    assert counted(gradient, (2, 3, 16, 8), (2, 3, 24, 8)).flops == 3 * one


def test_a_loop_counts_each_turn():
    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    assert counted(scanned, (8, 32), (7, 32, 32)).flops == 7 * 2 * 8 * 32 * 32


def gradient_flops(depth, unroll=1, remat=False):
    """Of `depth` layers tanh(x w), forward and backward."""

    def loss(x, weights):
        body = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jax.lax.scan(body, x, weights, unroll=unroll)[0])

    def layer(x, w):
        return jnp.tanh(x @ w), None

    return counted(jax.grad(loss, (0, 1)), (64, 32), (depth, 32, 32)).flops


def test_scanned_layers_count_as_unrolled_ones():
    a_layer = gradient_flops(3, unroll=True) - gradient_flops(2, unroll=True)
    assert a_layer == 3 * 2 * 64 * 32 * 32
    assert gradient_flops(9) == 9 * a_layer


def test_recomputation_counts():
    assert gradient_flops(9, remat=True) == gradient_flops(9) * 4 / 3


def test_nested_loops_multiply():
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x)

    def outer(x, w):
        return jax.lax.fori_loop(2, 12, lambda i, x: inner(x, w), x)

    assert counted(outer, (8, 32), (32, 32)).flops == 10 * 3 * 2 * 8 * 32 * 32


def test_a_loop_that_data_ends_runs_as_often_as_is_said():
    def while_small(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: jnp.tanh(x @ w), x)

    found = counted(while_small, (8, 32), (32, 32))
    assert found.flops == 5 * 2 * 8 * 32 * 32
    assert list(found.loops.values()) == [(5, False)] and found.unknown_loops == 1


def test_a_conditional_counts_its_cheaper_branch():
    def either(x, w):
        return jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: x @ w @ w @ w)

    assert counted(either, (8, 32), (32, 32)).flops == 2 * 8 * 32 * 32


def test_bytes_of_a_loop_are_slices_not_stacks():
    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (x * w, jnp.sum(x)), x, weights)

    read_once = 50 * 4096 * 4
    assert read_once <= counted(scanned, (4096,), (50, 4096)).bytes < 8 * read_once


# --- as TPUs write it --------------------------------------------------------------------------

TPU = """HloModule jit_step, is_scheduled=true, num_partitions=16

%body (arg: (s32[], f32[8,128], bf16[7,256,1024])) -> (s32[], f32[8,128], bf16[7,256,1024]) {
  %arg = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}, /*index=2*/bf16[7,256,1024]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %one = s32[]{:T(128)} constant(2)
  %x = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=1
  %w = bf16[7,256,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %start = (f32[8,128], f32[32,128]{1,0:T(8,128)}, s32[2]{0:S(4)}) fusion(%x), kind=kCustom, \
calls=%first
  %piece = f32[32,128]{1,0:T(8,128)} get-tuple-element(%start), index=1
  %done = f32[32,128]{1,0:T(8,128)} fusion(%piece), kind=kCustom, calls=%last
  %cut = f32[2,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}, bf16[7,256,1024]) \
tuple(%next, %x, %w)
}

%first (p: f32[8,128]) -> (f32[8,128], f32[32,128], s32[2]) {
  %p = f32[8,128]{1,0} parameter(0)
  %gather = f32[32,128]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=4,'b'=4], \
device_ids=([4,4]T(1,0)) {'b'}, dimensions={0}, use_global_device_ids=true
  ROOT %t = (f32[8,128]{1,0}, f32[32,128]{1,0}, s32[2]{0}) tuple(%p, %gather, %gather)
}

%last (q: f32[32,128]) -> f32[32,128] {
  %q = f32[32,128]{1,0} parameter(0)
  ROOT %gather.1 = f32[32,128]{1,0} all-gather(%q), channel_id=3, \
replica_groups=mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'b'}, dimensions={0}, \
use_global_device_ids=true
}

%all-reduce-scatter (r: f32[8,128]) -> f32[2,128] {
  %r = f32[8,128]{1,0} parameter(0)
  %at = s32[] constant(0)
  %all-reduce = f32[8,128]{1,0} all-reduce(%r), channel_id=4, \
replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %slice = f32[2,128]{1,0} dynamic-slice(%all-reduce, %at, %at), \
dynamic_slice_sizes={2,128}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (arg.1: (s32[], f32[8,128], bf16[7,256,1024])) -> pred[] {
  %bound = s32[]{:T(128)} constant(15)
  %arg.1 = (s32[]{:T(128)}, f32[8,128]{1,0}, bf16[7,256,1024]) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

ENTRY %main (x.1: f32[8,128], w.1: bf16[7,256,1024]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0} parameter(0)
  %w.1 = bf16[7,256,1024]{2,1,0} parameter(1)
  %from = s32[] constant(1)
  %copied = s32[] copy(%from)
  %carried = (s32[], f32[8,128]{1,0}, bf16[7,256,1024]{2,1,0}) tuple(%copied, %x.1, %w.1)
  %while = (s32[], f32[8,128]{1,0}, bf16[7,256,1024]{2,1,0}) while(%carried), \
condition=%condition, body=%body
  %permute = f32[8,128]{1,0} collective-permute(%x.1), channel_id=5, \
source_target_pairs={{0,4},{4,8},{8,12},{12,0}}
  %reduce-start = f32[8,128]{1,0} all-reduce-start(%permute), channel_id=6, \
replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, to_apply=%add
  %reduce-done = f32[8,128]{1,0} all-reduce-done(%reduce-start)
  ROOT %result = f32[8,128]{1,0} get-tuple-element(%while), index=1
}
"""


def test_a_loop_whose_length_only_its_condition_tells():
    module = hlo.parse(TPU)
    entry = module.entry
    assert loops.trip_count(entry.by_name["while"], entry, module) == 7  # 1, 3, ... 13


def test_collectives_in_all_their_forms():
    found = counts.count(hlo.parse(TPU), MESH).collectives
    size = 8 * 128 * 4
    assert [(c.kind, c.axes, c.group, c.times, c.wire) for c in found] == [
        # Started and ended in two fusions, and one collective all the same.
        ("all-gather", ("data",), 4, 7, 4 * size * 3 / 4),
        ("reduce-scatter", ("fsdp",), 4, 7, size * 3 / 4),
        ("collective-permute", ("data",), 2, 1, size),
        ("all-reduce", ("data",), 4, 1, 2 * size * 3 / 4),
    ]
    # What starts and ends in one fusion has nothing beside it.
    assert [c.asynchronous for c in found] == [True, False, False, True]


def test_an_all_reduce_that_is_cut_later_sends_what_it_sums():
    text = (
        "HloModule jit_step, num_partitions=16\n\n"
        "ENTRY %main (x: f32[8,128]) -> f32[2,128] {\n"
        "  %x = f32[8,128]{1,0} parameter(0)\n"
        "  %at = s32[] constant(0)\n"
        "  %sum = f32[8,128]{1,0} all-reduce(%x), channel_id=1, replica_groups=[4,4]<=[16], "
        "to_apply=%add\n"
        "  ROOT %cut = f32[2,128]{1,0} dynamic-slice(%sum, %at, %at), "
        "dynamic_slice_sizes={2,128}\n"
        "}\n"
    )
    [found] = counts.count(hlo.parse(text), MESH).collectives
    assert (found.kind, found.wire) == ("all-reduce", 2 * 8 * 128 * 4 * 3 / 4)


def test_slices_of_a_stack_are_read_as_slices_however_deep():
    text = (
        "%inner (p: bf16[12,768,64], i: s32[]) -> bf16[1,768,64] {\n"
        "  %p = bf16[12,768,64]{2,1,0} parameter(0)\n"
        "  %i = s32[] parameter(1)\n"
        "  ROOT %one = bf16[1,768,64]{2,1,0} dynamic-slice(%p, %i, %i, %i), "
        "dynamic_slice_sizes={1,768,64}\n"
        "}\n\n"
        "%outer (q: bf16[12,768,64], j: s32[]) -> bf16[1,768,64] {\n"
        "  %q = bf16[12,768,64]{2,1,0} parameter(0)\n"
        "  %j = s32[] parameter(1)\n"
        "  ROOT %in = bf16[1,768,64]{2,1,0} fusion(%q, %j), kind=kLoop, calls=%inner\n"
        "}\n\n"
        "ENTRY %main (w: bf16[12,768,64], k: s32[]) -> bf16[1,768,64] {\n"
        "  %w = bf16[12,768,64]{2,1,0} parameter(0)\n"
        "  %k = s32[]{:S(2)} parameter(1)\n"
        "  %begun = ((bf16[12,768,64]{2,1,0}), bf16[1,768,64]{2,1,0:S(1)}, s32[]{:S(2)}) "
        "slice-start(%w), slice={[0:1], [0:768], [0:64]}\n"
        "  %ended = bf16[1,768,64]{2,1,0:S(1)} slice-done(%begun)\n"
        "  ROOT %out = bf16[1,768,64]{2,1,0} fusion(%w, %k), kind=kOutput, calls=%outer\n"
        "}\n"
    )
    # Read on to the chip; then read and written.
    assert counts.count(hlo.parse(text), {"data": 1}).bytes == 3 * 768 * 64 * 2


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2] {'x'}", [[0, 2], [1, 3]]),
        ("mesh['x'=4] {'x':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['x'=4] {'x':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
    ],
)
def test_groups(groups, expected):
    text = f"%r = f32[4]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"
    instruction = hlo._instruction(f"  {text}")
    assert sorted(collectives.groups_of(instruction, 4)) == expected


def test_groups_that_are_no_axis_are_called_none():
    assert collectives.axes_of([[0, 5], [1, 4]], MESH) == ()
    assert collectives.axes_of([list(range(16))], MESH) == ("data", "fsdp")


def test_a_batched_product_written_as_a_padded_convolution():
    text = (
        "ENTRY %main (x: bf16[4,8,512,128], y: bf16[4,8,128,512]) -> bf16[4,8,512,512] {\n"
        "  %x = bf16[4,8,512,128]{3,2,1,0} parameter(0)\n"
        "  %y = bf16[4,8,128,512]{3,2,1,0} parameter(1)\n"
        "  ROOT %c = bf16[4,8,512,512]{3,2,1,0} convolution(%x, %y), "
        "window={size=4x8 stride=3x7 lhs_dilate=4x8}, dim_labels=01bf_01io->01bf\n"
        "}\n"
    )
    module = hlo.parse(text)
    expected = 2 * 4 * 8 * 512 * 512 * 128
    assert products.flops(module.entry.root, module.entry) == expected
