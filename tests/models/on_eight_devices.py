"""Attention and models on a mesh of eight devices; test_devices.py runs these with them."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import RelativeBias, attention, masks
from t5like.errors import UserError
from t5like.models.config import ModelConfig
from t5like.models.sharding import sharded_attention
from t5like.models.transformer import Transformer, init_parameters
from t5like.training.sharding import Sharding

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ROWS, LENGTH = 2, 512
EVERY_AXIS = Sharding(data=2, sequence=2, tensor=2)
IDS = np.sort(np.random.default_rng(0).integers(1, 5, (ROWS, LENGTH)), 1).astype(np.int32)
IDS[:, -3:] = 0
# By name: the mask, and the bias of a table, if any.
CALLS = {
    "packed causal": (masks.Causal() & masks.Segments(jnp.asarray(IDS), jnp.asarray(IDS)), True),
    "prefix": (masks.Causal() | masks.Prefix(jnp.array([300, 0])), None),
    "BigBird": (masks.BigBird(64), False),
    "index of each head": (
        masks.BlockIndex(jnp.arange(64).reshape(1, 4, 8, 2) % 7 - 1, 64, 64),
        None,
    ),
    "isolated": (
        masks.Segments(jnp.ones_like(IDS), jnp.asarray(IDS == 2)) | masks.SlidingWindow(0, 0),
        None,
    ),
}


def draw(q_len=LENGTH, kv_len=LENGTH, heads=4, kv_heads=2, head_dim=8):
    rng = np.random.default_rng(1)
    sizes = (q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads)
    return [rng.normal(size=(ROWS, *size, head_dim)).astype(np.float32) for size in sizes]


def outputs_and_gradients(attend, calls):
    """Of each call, with respect to q, k, v and a table of the bias."""

    def one(mask, bidirectional, arrays, table):
        bias = None
        if bidirectional is not None:
            bias = RelativeBias(table, bidirectional=bidirectional, max_distance=100)
        out = attend(*arrays, mask, bias=bias)
        return jnp.sin(out).sum(), out

    def every(arrays, table):
        grad = jax.grad(one, argnums=(2, 3), has_aux=True)
        return {name: grad(*call, arrays, table) for name, call in calls.items()}

    return jax.jit(every, compiler_options=QUICK)


def assert_same(actual, expected, tolerance=1e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        e = np.asarray(e)
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * max(np.abs(e).max(), 1))


def check(sharding: Sharding, calls, **sizes):
    """Each call on a mesh against the definition."""
    arrays = draw(**sizes)
    table = np.random.default_rng(2).normal(size=(8, arrays[0].shape[2])).astype(np.float32)

    def reference(*arguments, **options):
        return attention(*arguments, backend="reference", **options)

    expected = outputs_and_gradients(reference, calls)(arrays, table)
    with sharding.in_force(sharding.mesh()):
        actual = outputs_and_gradients(sharded_attention, calls)(arrays, table)
    assert_same(actual, expected)


def test_masks_on_every_axis():
    check(EVERY_AXIS, CALLS)


def test_keys_of_another_length():
    """Queries that attend to an encoder's keys, of a length that divides and of one that does
    not."""
    for kv_len in (256, 301):
        ids = np.sort(IDS[:, :kv_len], 1)
        calls = {"cross": (masks.Segments(jnp.asarray(IDS), jnp.asarray(ids)), None)}
        check(EVERY_AXIS, calls, kv_len=kv_len)


def test_rows_and_lengths_that_do_not_divide_are_whole():
    sharding = Sharding(data=4, sequence=2)
    check(sharding, {"causal": (masks.Causal(), False)}, q_len=301, kv_len=301)


def test_a_decoding_step():
    step = masks.Rows(masks.Causal() & masks.SlidingWindow(left=99), jnp.array([[7], [290]]))
    check(EVERY_AXIS, {"a step": (step, None)}, q_len=1)


def test_causal_halves_are_swapped():
    """Opposite devices of four exchange half of their queries, and the outputs back."""
    sharding, length = Sharding(data=1, sequence=4, tensor=2), 1024
    calls = {"causal": (masks.Causal(), False)}
    check(sharding, calls, q_len=length, kv_len=length)
    q, k, v = draw(length, length)

    def sends(mask) -> bool:
        with sharding.in_force(sharding.mesh()):
            text = jax.jit(lambda *x: sharded_attention(*x, mask)).lower(q, k, v).as_text()
        return "collective_permute" in text

    assert sends(masks.Causal()) and not sends(masks.SlidingWindow(9, 9))


def test_kv_heads_that_devices_share():
    sharding = Sharding(data=1, sequence=2, tensor=4)
    calls = {"causal": (masks.Causal(), True)}
    check(sharding, calls, heads=8, kv_heads=2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "named"), [(6, 6, "num_heads = 6"), (12, 3, "num_kv_heads = 3")]
)
def test_heads_that_do_not_divide(heads, kv_heads, named):
    sharding = Sharding(data=2, tensor=4)
    q, k, v = draw(heads=heads, kv_heads=kv_heads)
    with sharding.in_force(sharding.mesh()), pytest.raises(UserError, match="tensor = 4") as error:
        jax.eval_shape(lambda *x: sharded_attention(*x, masks.Full()), q, k, v)
    assert named in str(error.value)


SMALL = ModelConfig(
    vocab_size=32,
    num_layers=1,
    d_model=32,
    d_ff=32,
    num_heads=4,
    head_dim=8,
    relative_max_distance=64,
)
MODELS = {
    "decoder": {"position": "rope", "num_kv_heads": 2, "remat": "dots"},
    "encoder_decoder": {
        "attention_pattern": masks.SlidingWindow(64, 64) | masks.GlobalTokens(count=1),
        "relative_from": "positions",
    },
}


def batch_of(architecture: str) -> dict[str, np.ndarray]:
    rng, batch = np.random.default_rng(3), {}
    for stack, length in (("encoder", 384), ("decoder", LENGTH)):
        if stack in architecture:
            ids = 1 + (np.arange(length) >= [[150], [length]]).astype(np.int32)
            starts = np.where(ids == 2, 150, 0)
            batch |= {
                f"{stack}_input_tokens": rng.integers(0, 32, (ROWS, length)).astype(np.int32),
                f"{stack}_segment_ids": ids,
                f"{stack}_positions": (np.arange(length) - starts).astype(np.int32),
            }
    return batch


@pytest.mark.parametrize("architecture", MODELS)
def test_models(architecture):
    """Loss and gradients as on one device; nothing of the size of a layer's states is gathered."""
    config = dataclasses.replace(SMALL, architecture=architecture, **MODELS[architecture])
    params = init_parameters(config, jax.random.key(0))
    batch = batch_of(architecture)

    def loss(params, batch):
        return (Transformer(config).apply({"params": params}, batch) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    expected = step(params, batch)
    mesh = EVERY_AXIS.mesh()
    with EVERY_AXIS.in_force(mesh):
        compiled = step.lower(params, EVERY_AXIS.put_batch(mesh, batch)).compile()
        actual = compiled(params, EVERY_AXIS.put_batch(mesh, batch))
    assert_same(actual, expected)
    whole = ROWS * min(batch[key].shape[1] for key in batch) * config.d_model
    assert max(gathered(compiled.as_text())) < whole // 2


def gathered(text: str) -> list[int]:
    """Sizes of what is gathered, in elements."""
    results = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    shapes = [dims for result in results for dims in re.findall(r"\w+\[([\d,]+)\]", result)]
    return [int(np.prod([int(n) for n in dims.split(",")])) for dims in shapes]
