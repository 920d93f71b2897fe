"""Cross-entropy against the formula written out, and T5X's normalising modes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.training.losses import cross_entropy, normalise_loss

V = 11


def naive(logits, targets, weights, z_loss, label_smoothing):
    """The same with soft targets, as the definitions have it; autodiff gives the gradient."""
    low = label_smoothing / (V - 1)
    soft = jax.nn.one_hot(targets, V) * (1 - label_smoothing - low) + low
    log_p = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.where(soft > 0, soft * jnp.log(jnp.where(soft > 0, soft, 1)), 0), -1)
    loss = -jnp.sum(soft * log_p, -1) - entropy
    z = z_loss * jnp.square(jax.nn.logsumexp(logits, -1))
    return jnp.sum(loss * weights), jnp.sum(z * weights)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 5, V)) * 4, jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (3, 5)), jnp.int32)
    weights = jnp.asarray(rng.random((3, 5)) * (rng.random((3, 5)) > 0.3), jnp.float32)
    return logits, targets, weights


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_values_and_gradients_are_those_of_the_formula(case, z_loss, label_smoothing):
    logits, targets, weights = case

    def ours(logits):
        out = cross_entropy(
            logits, targets, weights, z_loss=z_loss, label_smoothing=label_smoothing
        )
        return out.loss_sum + out.z_loss_sum, out

    def theirs(logits):
        loss, z = naive(logits, targets, weights, z_loss, label_smoothing)
        return loss + z, (loss, z)

    (_, out), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(logits)
    (_, (loss, z)), wanted = jax.jit(jax.value_and_grad(theirs, has_aux=True))(logits)
    np.testing.assert_allclose(out.loss_sum, loss, rtol=1e-5)
    np.testing.assert_allclose(out.z_loss_sum, z, rtol=1e-5)
    np.testing.assert_allclose(out.weight_sum, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_each_sum_has_its_own_gradient(case):
    logits, targets, weights = case

    @jax.jit
    def gradients(logits):
        ours = jax.grad(lambda x: cross_entropy(x, targets, weights, z_loss=0.5).z_loss_sum)
        return ours(logits), jax.grad(lambda x: naive(x, targets, weights, 0.5, 0.0)[1])(logits)

    ours, wanted = gradients(logits)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)


def test_correct_sum_counts_the_weighted_hits(case):
    logits, targets, weights = case
    hits = np.asarray(weights)[np.asarray(logits).argmax(-1) == np.asarray(targets)].sum()
    np.testing.assert_allclose(cross_entropy(*case).correct_sum, hits, rtol=1e-6)


def test_ties_are_the_first_classes():
    logits, weights = jnp.asarray([[2.0, 3, 3, 1], [2.0, 3, 3, 1]]), jnp.ones(2)
    assert cross_entropy(logits, jnp.asarray([1, 2]), weights).correct_sum == 1


def test_a_perfect_prediction_costs_nothing_under_label_smoothing():
    smoothed = np.log(np.r_[0.9, np.full(V - 1, 0.1 / (V - 1))])[None].astype(np.float32)
    targets, weights = jnp.zeros(1, jnp.int32), jnp.ones(1)
    out = cross_entropy(jnp.asarray(smoothed), targets, weights, label_smoothing=0.1)
    assert abs(float(out.loss_sum)) < 1e-6


def test_large_logits_stay_finite_and_padding_gets_no_gradient():
    logits = jnp.asarray([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    targets, weights = jnp.asarray([0, 1]), jnp.asarray([1.0, 0.0])
    gradient = jax.grad(lambda x: cross_entropy(x, targets, weights, z_loss=1e-4).loss_sum)(logits)
    assert np.isfinite(gradient).all()
    assert not np.any(gradient[1])


def test_bfloat16_logits_are_summed_in_float32_and_keep_their_dtype_in_the_gradient():
    logits = jnp.zeros((4096, V), jnp.bfloat16)
    targets, weights = jnp.zeros(4096, jnp.int32), jnp.ones(4096)
    loss, gradient = jax.value_and_grad(lambda x: cross_entropy(x, targets, weights).loss_sum)(
        logits
    )
    np.testing.assert_allclose(loss, 4096 * np.log(V), rtol=1e-5)
    assert gradient.dtype == jnp.bfloat16


def test_the_backward_pass_keeps_the_logits_and_nothing_else_of_their_size(case):
    logits, targets, weights = case
    _, backward = jax.vjp(lambda x: cross_entropy(x, targets, weights).loss_sum, logits)
    large = [leaf for leaf in jax.tree.leaves(backward) if leaf.size == logits.size]
    assert len(large) == 1


def test_an_impossible_target_is_not_silent():
    out = cross_entropy(jnp.zeros((1, V)), jnp.asarray([V]), jnp.ones(1))
    assert np.isnan(out.loss_sum)


def test_normalising_modes_match_t5x(shared_data):
    golden = json.loads((shared_data / "peer" / "peer_expectations.json").read_text())
    cases = golden["loss_normalising"]["cases"]
    assert {case["mode"] for case in cases} == {
        "NUM_REAL_TARGET_TOKENS",
        "NUM_TOTAL_TARGET_TOKENS",
        "AVERAGE_PER_SEQUENCE",
    }
    for case in cases:
        real = (np.asarray(case["decoder_target_tokens"]) > 0).astype(np.float32)
        factor, weights = normalise_loss(case["mode"], jnp.asarray(real))
        np.testing.assert_allclose(factor, case["factor"], rtol=1e-6)
        np.testing.assert_allclose(weights, case["weights"], rtol=1e-6)


def test_packed_sequences_have_equal_say():
    weights = jnp.asarray([[1.0, 1, 0, 1, 1, 1, 0, 0]])
    segments = jnp.asarray([[1, 1, 1, 2, 3, 3, 0, 0]])
    factor, scaled = normalise_loss("AVERAGE_PER_SEQUENCE", weights, segments)
    np.testing.assert_allclose(scaled, [[0.5, 0.5, 0, 1, 0.5, 0.5, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(factor, 3.0, rtol=1e-6)
