"""Loss terms of the shared device half on a tiny model."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from objectives import heads
from objectives.causal_lm import CausalLM
from objectives.mlm import MaskedLM
from objectives.prefix_lm import PrefixLM
from objectives.span_corruption import SpanCorruption
from t5like.data.layout import lay_out
from t5like.data.rng import generator
from t5like.models.config import ModelConfig

V = 1000


def config(architecture):
    return ModelConfig(
        architecture=architecture,
        vocab_size=V,
        num_layers=1,
        d_model=16,
        d_ff=32,
        num_heads=2,
        head_dim=8,
    )


def made(objective, architecture, setting, record, rows=3, length=32):
    """(bound objective, network, parameters, batch)."""
    bound = objective.bind(setting(architecture, length))
    unit = bound.unit
    raw = getattr(unit, "raw_length", None) or unit.max_raw_length
    examples = [[bound.corrupt(record(raw, r), generator(r, "x"))] for r in range(rows)]
    batch = lay_out(
        examples,
        architecture=architecture,
        length=bound.lengths.inputs,
        targets_length=bound.lengths.targets,
        bos_id=0,
        pad_id=0,
        sees_ahead=bound.sees_ahead,
    )
    network = bound.network(config(architecture))
    shapes = nn.unbox(jax.eval_shape(network.init, {"params": jax.random.key(0)}, batch))["params"]
    rng = np.random.default_rng(0)  # drawn here: an initialiser takes seconds to compile
    params = jax.tree.map(lambda x: np.float32(rng.normal(scale=0.3, size=x.shape)), shapes)
    return bound, network, params, batch


def compiled(bound, network):
    """(params, batch) -> (terms without dropout, logits)."""

    @jax.jit
    def compute(params, batch):
        terms = bound.losses(network.apply, params, None, batch, jax.random.key(0), False)
        return terms, network.apply({"params": params}, batch)

    return compute


CASES = [
    (CausalLM(), "decoder"),
    (PrefixLM(), "decoder"),
    (SpanCorruption(), "decoder"),
    (SpanCorruption(), "encoder_decoder"),
    (MaskedLM(), "encoder"),
    (MaskedLM(), "decoder"),
]
IDS = [f"{type(objective).__name__}-{architecture}" for objective, architecture in CASES]


@pytest.mark.parametrize(("objective", "architecture"), CASES, ids=IDS)
def test_terms_by_hand_and_under_uniform_logits(objective, architecture, setting, record):
    bound, network, params, batch = made(objective, architecture, setting, record)
    assert set(params) == {"model"}
    compute = compiled(bound, network)
    terms, logits = compute(params, batch)

    stack = "encoder" if architecture == "encoder" else "decoder"
    weights, targets = batch[f"{stack}_loss_weights"], batch[f"{stack}_target_tokens"]
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert weights.sum() > 0
    np.testing.assert_allclose(terms["cross_entropy"].sum, (nll * weights).sum(), rtol=1e-5)
    correct = (logits.argmax(-1) == targets) * weights
    np.testing.assert_allclose(terms["accuracy"].sum, correct.sum())
    assert terms["accuracy"].coefficient == 0
    assert all(term.weight == weights.sum() for term in terms.values())
    if bound.z_loss:
        np.testing.assert_allclose(
            terms["z_loss"].sum, 1e-4 * (log_z**2 * weights).sum(), rtol=1e-5
        )

    uniform = compute(jax.tree.map(np.zeros_like, params), batch)[0]["cross_entropy"]
    np.testing.assert_allclose(uniform.sum / uniform.weight, np.log(V), rtol=1e-6)


@pytest.mark.parametrize("asked", [0, 3, 8, 20])
def test_gathered_predictions_equal_all_of_them(asked):
    """Also where a row asks for more than is gathered, and where nothing is asked at all."""
    rng = np.random.default_rng(asked)
    hidden = jnp.asarray(rng.normal(size=(4, 32, 16)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(16, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (4, 32)))
    weights = np.zeros((4, 32), np.float32)
    for row in weights:
        row[rng.permutation(32)[:asked]] = rng.uniform(0.5, 1.0, asked)

    @functools.partial(jax.jit, static_argnums=2)
    def value_and_grad(hidden, kernel, predictions):
        def loss(hidden, kernel):
            sums = heads.token_losses(
                lambda x: x @ kernel, hidden, targets, jnp.asarray(weights),
                z_loss=0.01, label_smoothing=0.1, predictions=predictions,
            )  # fmt: skip
            return sums[0] + sums[1], sums

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, kernel)

    full = value_and_grad(hidden, kernel, None)
    gathered = value_and_grad(hidden, kernel, 8)
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(gathered), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_gathering_spares_most_logits(setting, record):
    bound, network, params, batch = made(MaskedLM(), "encoder", setting, record, rows=2, length=128)
    assert 19 <= bound.usual_predictions <= 32

    program = str(jax.make_jaxpr(compiled(bound, network))(params, batch))
    assert f"2,{bound.usual_predictions},{V}" in program


def test_prefix_lm_asks_half_of_what_causal_lm_asks(setting, record):
    rows = 200
    asked = {}
    for objective in (CausalLM(), PrefixLM()):
        bound = objective.bind(setting("decoder", 64))
        examples = [[bound.corrupt(record(64, r), generator(r, "x"))] for r in range(rows)]
        batch = lay_out(
            examples, architecture="decoder", length=64, bos_id=0, pad_id=0,
            sees_ahead=bound.sees_ahead,
        )  # fmt: skip
        asked[type(objective)] = batch["decoder_loss_weights"].mean()
    assert asked[CausalLM] == 1.0
    assert abs(asked[PrefixLM] - 0.5) < 0.06
