"""Optimisers minimise, decay what should be decayed, and count their steps in their state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5like.training import optimizers as O
from t5like.training.schedules import Constant

ALL = [O.AdamW, O.Adafactor, O.Lion, O.Muon]


@pytest.fixture
def params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "token_embedder": {"embedding": normal(16, 8)},
        "layers": {  # scanned: stacked on axis 0
            "mlp": {"wi": {"kernel": normal(3, 8, 12), "bias": normal(3, 12)}},
            "mlp_norm": {"scale": normal(3, 8)},
        },
        "relative_bias": {"embedding": normal(32, 4)},
        "head": {"kernel": normal(8, 16)},
        "pair_head": {"kernel": normal(8, 1)},
        "final_norm": {"scale": normal(8)},
    }


def first_update(transform, gradients, params):
    """(updates, state) after one update from a fresh state, compiled whole."""
    return jax.jit(lambda g, p: transform.update(g, transform.init(p), p))(gradients, params)


@pytest.mark.parametrize("cls", ALL)
def test_every_optimizer_minimises_and_counts_its_updates_in_its_state(cls, params):
    transform = cls(learning_rate=Constant(0.02), weight_decay=0.0).build(200)
    goal = jax.tree.map(lambda p: p + np.float32(0.5), params)

    def loss(p):
        leaves = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), p, goal)
        return sum(jax.tree.leaves(leaves))

    def update(carry, _):
        p, state = carry
        updates, state = transform.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    @jax.jit
    def run(p):
        (final, state), _ = jax.lax.scan(update, (p, transform.init(p)), None, length=200)
        return loss(p), loss(final), state

    before, after, state = run(params)
    assert after < 0.2 * before
    counts = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32 and x.ndim == 0]
    assert counts and all(int(count) == 200 for count in counts)


@pytest.mark.parametrize("cls", ALL)
def test_decay_is_rate_times_strength_on_matrices_and_nothing_on_vectors(cls, params):
    transform = cls(learning_rate=Constant(0.1), weight_decay=0.5).build(10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = first_update(transform, zeros, params)
    decayed = jax.tree.map(lambda u, p: np.allclose(u, -0.05 * p, rtol=1e-4), updates, params)
    untouched = jax.tree.map(lambda u: not np.any(u), updates)
    wanted = {
        "token_embedder": {"embedding": True},
        "layers": {
            "mlp": {"wi": {"kernel": True, "bias": False}},
            "mlp_norm": {"scale": False},
        },
        "relative_bias": {"embedding": False},
        "head": {"kernel": True},
        "pair_head": {"kernel": True},
        "final_norm": {"scale": False},
    }
    assert decayed == wanted
    assert untouched == jax.tree.map(lambda x: not x, wanted)


def test_gradients_are_clipped_by_their_global_norm(params):
    # Lion's first update is the sign, AdamW's nearly so; look at the clip through the momentum.
    transform = O.AdamW(learning_rate=Constant(0.1), clip_norm=1.0).build(10)
    huge = jax.tree.map(lambda p: 1e3 * p, params)
    _, state = first_update(transform, huge, params)
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(optax.global_norm(moments), 0.1, rtol=1e-5)


def test_muon_orthogonalises_each_layer_of_a_stack_and_leaves_the_rest_to_adamw(params):
    muon = O.Muon(learning_rate=Constant(1.0), weight_decay=0.0, clip_norm=None)
    adamw = O.AdamW(learning_rate=Constant(1.0), weight_decay=0.0, clip_norm=None)
    updates, adam_updates = (
        first_update(o.build(10), params, params)[0] for o in (muon, adamw)
    )
    for matrix in updates["layers"]["mlp"]["wi"]["kernel"]:  # [D, F]
        singular = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        # Newton-Schulz brings singular values to about 1, times rms * sqrt(max side).
        assert (singular > 0.5 * 0.2 * np.sqrt(12)).all()
        assert (singular < 1.3 * 0.2 * np.sqrt(12)).all()
    for name in ("token_embedder", "relative_bias", "head", "pair_head", "final_norm"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
            updates[name],
            adam_updates[name],
        )


def test_adafactor_keeps_rows_and_columns_of_large_matrices_only():
    state = O.Adafactor().build(10).init({"kernel": jnp.ones((256, 512))})
    largest = max(leaf.size for leaf in jax.tree.leaves(state))
    assert largest == 512
