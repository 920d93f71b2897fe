"""Decoding through the cache equals the full forward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.models.cache import init_cache, take_rows
from t5like.models.transformer import Transformer

# As in conftest.py: XLA's optimisation, without LLVM's, which is most of the compile time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


SLOTS = 14


@functools.cache
def stepper(config):
    """(params, cache, tokens, positions, options) -> (logits, cache), jitted."""

    def step(params, cache, tokens, positions, options):
        logits, mutated = Transformer(config).apply(
            {"params": params, "cache": cache},
            tokens,
            positions,
            method="decode_step",
            mutable="cache",
            **options,
        )
        return logits, mutated["cache"]

    return quick_jit(step)


@functools.cache
def encoder(config):
    return quick_jit(
        lambda params, tokens, ids: Transformer(config).apply(
            {"params": params}, tokens, ids, method="encode"
        )
    )


def encoder_options(config, batch, params) -> dict:
    """The encoder's output as `decode_step` wants it, with the first row's end padded."""
    ids = batch["encoder_segment_ids"]
    ids[0, 7:] = 0
    encoded = encoder(config)(params, batch["encoder_input_tokens"], ids)
    return {"encoded": encoded, "encoder_segment_ids": ids}


@pytest.mark.parametrize(
    "family, scan",
    [(family, False) for family in ("t5", "llama", "bert", "per layer", "sinusoidal")]
    + [("t5", True), ("per layer", True)],
)
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_steps_equal_the_forward_pass(tiny, architecture, family, scan):
    """A prompt of three tokens at once, then one by one; cross keys kept from the first call."""
    config = tiny.config(architecture, family, scan_layers=scan)
    params, batch = tiny.parameters(config), tiny.batch(architecture)
    options, encoder_length = {}, None
    if architecture == "encoder_decoder":
        options, encoder_length = encoder_options(config, batch, params), tiny.length
    expected = tiny.logits(config, batch, params)
    cache = init_cache(config, 2, SLOTS, encoder_length)
    tokens, step = batch["decoder_input_tokens"], stepper(config)
    pieces = [slice(0, 3), *(slice(t, t + 1) for t in range(3, tokens.shape[1]))]
    actual = []
    for piece in pieces:
        positions = np.arange(SLOTS, dtype=np.int32)[None, piece].repeat(2, 0)
        logits, cache = step(params, cache, tokens[:, piece], positions, options)
        options.pop("encoded", None)
        actual.append(logits)
    np.testing.assert_allclose(np.concatenate(actual, 1), expected, atol=2e-5)


@pytest.mark.parametrize("family", ["t5", "llama", "per layer"])
def test_prefix_rows_at_different_positions(tiny, family):
    """Right-padded prompts of different lengths; pad slots are overwritten before being seen."""
    config = tiny.config("decoder", family)
    params, batch = tiny.parameters(config), tiny.batch("decoder")
    tokens, prompts = batch["decoder_input_tokens"], np.array([3, 5])
    flags = (np.arange(tiny.length)[None] < prompts[:, None]).astype(np.int32)
    expected = tiny.logits(config, {**batch, "decoder_causal_attention": flags}, params)
    step, options = stepper(config), {"prefix_lengths": prompts}
    padded = np.where(flags[:, :5] == 1, tokens[:, :5], 31)
    everywhere = np.arange(5, dtype=np.int32)[None].repeat(2, 0)
    logits, cache = step(params, init_cache(config, 2, SLOTS), padded, everywhere, options)
    rows = np.arange(2)
    for offset in range(5):
        positions = prompts + offset - 1
        np.testing.assert_allclose(
            np.asarray(logits)[rows, positions if offset == 0 else 0],
            expected[rows, positions],
            atol=2e-5,
        )
        following = (prompts + offset)[:, None].astype(np.int32)
        new = np.take_along_axis(tokens, following, 1)
        logits, cache = step(params, cache, new, following, options)


def test_encoded_in_every_call_needs_no_room_in_the_cache(tiny):
    config = tiny.config("encoder_decoder")
    params, batch = tiny.parameters(config), tiny.batch("encoder_decoder")
    options = encoder_options(config, batch, params)
    expected, cache = tiny.logits(config, batch, params), init_cache(config, 2, SLOTS)
    for t in range(3):
        token, position = batch["decoder_input_tokens"][:, t : t + 1], jnp.full((2, 1), t)
        logits, cache = stepper(config)(params, cache, token, position, options)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=2e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_take_rows_reorders_beams(tiny, scan):
    config = tiny.config("decoder", scan_layers=scan)
    params, batch = tiny.parameters(config), tiny.batch("decoder")
    tokens, step = batch["decoder_input_tokens"], stepper(config)
    first = np.arange(4, dtype=np.int32)[None].repeat(2, 0)
    _, cache = step(params, init_cache(config, 2, SLOTS), tokens[:, :4], first, {})
    token, position = jnp.full((2, 1), 5), jnp.full((2, 1), 4)
    straight, _ = step(params, cache, token, position, {})
    rows = jnp.array([1, 0, 1])
    beams, _ = step(params, take_rows(cache, rows), token[rows], position[rows], {})
    np.testing.assert_allclose(beams, straight[rows], atol=1e-6)


def test_missing_cache_is_named(tiny):
    config = tiny.config("decoder")
    with pytest.raises(ValueError, match="init_cache"):
        Transformer(config).apply(
            {"params": tiny.parameters(config)},
            jnp.zeros((1, 1), jnp.int32),
            jnp.zeros((1, 1), jnp.int32),
            method="decode_step",
            mutable="cache",
        )


def test_cache_is_of_the_compute_dtype(tiny):
    config = tiny.config("decoder", "llama", dtype="bfloat16")
    leaves = jax.tree.leaves(init_cache(config, 3, SLOTS))
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
    assert {leaf.shape for leaf in leaves} == {(3, SLOTS, 2, 4)}
