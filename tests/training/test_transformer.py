"""The loop with a real model: bfloat16 compute, dropout, Muon, accumulation."""

import jax
import jax.numpy as jnp
import numpy as np

from t5like.models.config import ModelConfig
from t5like.models.transformer import Transformer
from t5like.training.init_from import restore_params
from t5like.training.losses import cross_entropy
from t5like.training.optimizers import Muon
from t5like.training.schedules import Constant
from t5like.training.terms import Term

CONFIG = ModelConfig(
    architecture="decoder",
    vocab_size=32,
    num_layers=1,
    d_model=16,
    d_ff=32,
    num_heads=2,
    head_dim=8,
    position="rope",
    dropout_rate=0.1,
    dtype="bfloat16",
)
MODEL = Transformer(CONFIG)


def batch_of(step):
    """Counting sequences: the next token is a function of the last."""
    start = np.random.default_rng(step % 4).integers(0, 32, (4, 1))
    tokens = ((start + np.arange(13)) % 32).astype(np.int32)
    ones = np.ones((4, 12), np.int32)
    return {
        "decoder_input_tokens": tokens[:, :-1],
        "decoder_target_tokens": tokens[:, 1:],
        "decoder_loss_weights": ones.astype(np.float32),
        "decoder_segment_ids": ones,
        "decoder_positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
        "decoder_causal_attention": np.zeros_like(ones),
    }


def init(key):
    return MODEL.init(key, batch_of(0))["params"]


def loss_fn(params, frozen, batch, key, train):
    logits = MODEL.apply({"params": params}, batch, train=train, rngs={"dropout": key})
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    out = cross_entropy(logits, targets, weights, z_loss=1e-4)
    return {
        "cross_entropy": Term(out.loss_sum, out.weight_sum),
        "z_loss": Term(out.z_loss_sum, out.weight_sum),
        "accuracy": Term(out.correct_sum, out.weight_sum, 0.0),
    }


def test_a_transformer_learns(toy, assert_same_bits):
    result = toy.fit(
        30,
        init_fn=init,
        loss_fn=loss_fn,
        optimizer=Muon(learning_rate=Constant(0.02)),
        batches=lambda start: ((step, batch_of(step)) for step in range(start, 100)),
        hash_fn=None,
        accumulate=2,
        log_every=10,
        checkpoint_every_steps=None,
    )
    line, params = result.metrics["train"], result.state.params
    assert line["cross_entropy"] < 0.6 * np.log(32)
    np.testing.assert_allclose(line["loss"], line["cross_entropy"] + line["z_loss"], rtol=1e-6)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params
    )
    assert_same_bits(restore_params(toy.workdir, template), params)
