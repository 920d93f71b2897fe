"""What a traced program holds of the kernels: how often they run, and what they say they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from kernels import attention, masks

LENGTH, HEAD_DIM, HEADS = 1024, 64, 4
POLICIES = jax.checkpoint_policies
BY_NAME = POLICIES.save_only_these_names("attention_output", "attention_lse")
DOTS = POLICIES.dots_with_no_batch_dims_saveable


def kernels(jaxpr) -> Iterator:
    """The pallas_call equations of a program, inner ones included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from kernels(inner)


def names(jaxpr) -> Counter:
    found = (eqn.params["name"] for eqn in kernels(jaxpr))
    return Counter(name.removeprefix("block_sparse_attention_") for name in found)


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
@pytest.mark.parametrize(
    ("policy", "forward"),
    [(None, 2), (DOTS, 2), (BY_NAME, 1), (POLICIES.save_from_both_policies(DOTS, BY_NAME), 1)],
)
def test_named_outputs_that_are_kept_spare_the_forward(backend, policy, forward):
    def block(x):
        q = x.reshape(1, LENGTH, 2, 32)
        out = attention(q, q, q, masks.Causal(), backend=backend)
        return jnp.tanh(out.reshape(x.shape) @ jnp.ones((64, 64)))

    gradient = jax.grad(lambda x: jax.checkpoint(block, policy=policy)(x).sum())
    program = jax.make_jaxpr(gradient)(jnp.ones((LENGTH, 64)))
    assert names(program.jaxpr) == {"forward": forward, "dq": 1, "dkv": 1}


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_estimates_count_active_blocks(backend):
    """Two products of a block forward, seven backward, of the 36 that a triangle of 8 by 8 has."""
    q = jnp.ones((2, LENGTH, HEADS, HEAD_DIM))
    k = q[:, :, :2]

    def call(q, k, mask):
        return attention(q, k, k, mask, backend=backend, block_sizes=(128, 128)).sum()

    def costs(mask):
        program = jax.make_jaxpr(jax.grad(call, (0, 1)))(q, k, mask)
        found = ((e.params["name"], e.params["cost_estimate"]) for e in kernels(program.jaxpr))
        return {name.removeprefix("block_sparse_attention_"): cost for name, cost in found}

    one = 2 * 128 * 128 * HEAD_DIM * 2 * HEADS
    found = costs(masks.Causal())
    products = {"forward": 2, "dq": 3, "dkv": 4}
    assert {name: cost.flops for name, cost in found.items()} == {
        name: n * 36 * one for name, n in products.items()
    }
    assert found["forward"].transcendentals == 36 * 128 * 128 * 2 * HEADS
    # Keys and values of each entry, queries and outputs once.
    block, rows = 128 * HEAD_DIM * 4, 2 * HEADS * LENGTH * HEAD_DIM * 4
    assert found["forward"].bytes_accessed == 2 * 36 * 2 * HEADS * block + 2 * rows
    # What the run alone knows may be all that the host cannot rule out.
    ids = jnp.ones((2, LENGTH), jnp.int32)
    packed = costs(masks.Causal() & masks.Segments(ids, ids))
    assert packed["forward"].flops == found["forward"].flops
