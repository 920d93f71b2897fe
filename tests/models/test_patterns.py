"""Attention patterns in the model: who is seen, in decoding too, and what it costs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import masks
from t5like.errors import UserError
from t5like.models.cache import init_cache
from t5like.models.config import ModelConfig
from t5like.models.flops import forward_flops
from t5like.models.transformer import Transformer, init_parameters
from t5like.models.visibility import self_mask

WINDOW = masks.SlidingWindow(1, 1) | masks.GlobalTokens(count=1)


def test_a_pattern_limits_each_layer(tiny):
    config = tiny.config("encoder", "llama", num_layers=1, attention_pattern=WINDOW)
    batch = tiny.batch("encoder")
    changed = {**batch, "encoder_input_tokens": batch["encoder_input_tokens"].copy()}
    changed["encoder_input_tokens"][0, 5] += 1
    difference = np.abs(tiny.logits(config, batch) - tiny.logits(config, changed)).max(-1)
    assert np.flatnonzero(difference[0] > 0).tolist() == [0, 4, 5, 6]
    assert not difference[1].any()


def test_first_tokens_of_packed_examples_are_global():
    batch = {
        "encoder_segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2]]),
        "encoder_positions": np.array([[0, 1, 2, 0, 1, 2, 3]]),
    }
    pattern = masks.GlobalTokens(count=1) & ~masks.SlidingWindow(0, 0)
    seen = np.asarray(self_mask(batch, "encoder", pattern).dense(7, 7))[0, 0]
    assert np.argwhere(seen[:3]).tolist() == [[0, 1], [0, 2], [1, 0], [2, 0]]
    assert np.argwhere(seen[3:, 3:]).tolist() == [[0, 1], [0, 2], [0, 3], [1, 0], [2, 0], [3, 0]]
    assert not seen[:3, 3:].any() and not seen[3:, :3].any()


def test_packed_examples_have_sinks_of_their_own_and_the_rows_blocks():
    batch = {
        "decoder_segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2]]),
        "decoder_positions": np.array([[0, 1, 2, 0, 1, 2, 3]]),
    }

    def seen(pattern):
        return np.argwhere(self_mask(batch, "decoder", pattern).dense(7, 7)[0, 0]).tolist()

    first = [[0, 0], [1, 0], [1, 1], [2, 0], [2, 2]]
    second = [[3, 3], [4, 3], [4, 4], [5, 3], [5, 5], [6, 3], [6, 6]]
    assert seen(masks.AShape(sink=1, window=0)) == first + second
    assert seen(~~masks.AShape(sink=1, window=0)) == first + second
    blocks = [[0, 0], [1, 0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 4], [5, 5], [6, 6]]
    assert seen(masks.BigBird(2, 1, 0, 0)) == blocks


@pytest.mark.parametrize(
    "pattern",
    [
        masks.SlidingWindow(left=3),
        masks.AShape(sink=2, window=2),
        masks.BigBird(2, 1, 1, 1, causal=True),
        masks.Dilated(2, 0, 2) | masks.GlobalTokens(count=1),
    ],
    ids=["window", "a shape", "bigbird", "dilated"],
)
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_decoding_step_by_step_equals_the_whole_row(tiny, architecture, pattern):
    name = "attention_pattern" if architecture == "decoder" else "decoder_attention_pattern"
    config = tiny.config(architecture, **{name: pattern})
    batch, params = tiny.batch(architecture), tiny.parameters(config)
    tokens = batch["decoder_input_tokens"]
    rows, length = tokens.shape
    encoded = None
    model = Transformer(config)
    if architecture == "encoder_decoder":
        encoded = model.apply({"params": params}, batch["encoder_input_tokens"], method="encode")
    # Longer than the row that the model was trained on, as generation may ask for.
    cache = init_cache(config, rows, length + 6)

    @jax.jit
    def step(params, cache, tokens, positions):
        return model.apply(
            {"params": params, "cache": cache},
            tokens,
            positions,
            encoded=encoded,
            method="decode_step",
            mutable="cache",
        )

    found = []
    for start, stop in [(0, 3), *((t, t + 1) for t in range(3, length))]:
        positions = np.tile(np.arange(start, stop, dtype=np.int32), (rows, 1))
        logits, changed = step(params, cache, tokens[:, start:stop], positions)
        cache = changed["cache"]
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, 1), tiny.logits(config, batch), atol=2e-5)


def test_flops_count_the_pairs_that_a_pattern_shows(tiny):
    config = tiny.config("encoder")
    spec = {"encoder_input_tokens": ((3, 200), "int32")}
    pairs = {
        pattern: forward_flops(dataclasses.replace(config, attention_pattern=pattern), spec)
        for pattern in (None, masks.SlidingWindow(0, 0), masks.Causal())
    }
    per_pair = 3 * config.num_layers * 4 * config.num_heads * config.head_dim
    assert pairs[None] - pairs[masks.SlidingWindow(0, 0)] == per_pair * (200 * 200 - 200)
    assert pairs[None] - pairs[masks.Causal()] == per_pair * 200 * 199 // 2


def test_refusals(tiny):
    with pytest.raises(UserError, match="attention_pattern = 'window' is no mask"):
        tiny.config("encoder", attention_pattern="window")
    with pytest.raises(UserError, match="set attention_pattern"):
        tiny.config("encoder", decoder_attention_pattern=masks.Causal())
    with pytest.raises(UserError, match="appends queries"):
        self_mask({"encoder_isolated": np.zeros((1, 4), np.int32)}, "encoder", WINDOW)
    features = {name: np.zeros((1, 4), np.int32) for name in ("decoder_isolated", "encoder_x")}
    with pytest.raises(UserError, match="ModelConfig.decoder_attention_pattern speaks"):
        self_mask(features, "decoder", WINDOW)
    del features["encoder_x"]
    with pytest.raises(UserError, match="ModelConfig.attention_pattern speaks"):
        self_mask(features, "decoder", WINDOW)
    with pytest.raises(UserError, match="ModelConfig.attention_pattern holds arrays"):
        tiny.config("encoder", attention_pattern=~masks.GlobalTokens(flags=np.ones((1, 4))))


@pytest.mark.parametrize(
    "architecture, field",
    [("decoder", "attention_pattern"), ("encoder_decoder", "decoder_attention_pattern")],
)
def test_a_decoders_bigbird_is_causal_wherever_it_is(tiny, architecture, field):
    with pytest.raises(UserError, match=rf"ModelConfig.{field}: .* set BigBird.causal = True"):
        tiny.config(architecture, **{field: WINDOW & ~(masks.Full() | masks.BigBird())})
    tiny.config(architecture, **{field: masks.BigBird(random_blocks=0)})
    tiny.config("encoder_decoder", attention_pattern=masks.BigBird())


LONG = 16_384


def test_a_long_step_takes_less_than_the_dense_mask():
    """A training step of 16k tokens with a window and a global token, gradient included, in less
    memory than the dense attention's mask alone: [L, L] bytes. It is run, too."""
    config = ModelConfig(
        architecture="encoder",
        vocab_size=128,
        num_layers=2,
        d_model=32,
        d_ff=64,
        num_heads=2,
        head_dim=16,
        scan_layers=True,
        remat="full",
        attention_pattern=masks.SlidingWindow(256, 256) | masks.GlobalTokens(count=1),
    )
    params = init_parameters(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 128, (1, LONG)).astype(np.int32)

    def loss(params, tokens):
        logits = Transformer(config).apply({"params": params}, {"encoder_input_tokens": tokens})
        chosen = jnp.take_along_axis(logits, tokens[..., None], -1)
        return (jax.nn.logsumexp(logits, -1, keepdims=True) - chosen).mean()

    step = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()
    memory = step.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    assert peak < LONG * LONG
    value, gradients = step(params, tokens)
    assert np.isfinite(value)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
