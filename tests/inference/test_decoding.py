"""Sampling through a cache, on a toy model whose every distribution is known."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.inference.decoding import Stop, sample
from t5like.inference.sampling import GREEDY, Sampling

VOCAB, EOS, PAD = 7, 2, 0
PROMPTS = [[3], [4, 5, 6], [6, 3, 3, 1], [5, 1]]


STATIC = ("max_new_tokens", "eos_id", "pad_id", "sampling", "num_samples")


@functools.partial(jax.jit, static_argnames=STATIC)
def decode(model, *arguments, **settings):
    return sample(model.step, *arguments, **settings)


def run(model, prompts, width=None, **changes):
    """Right-pads prompts with a token that is not special, and decodes them."""
    width = width or max(map(len, prompts))
    padded = np.full((len(prompts), width), 5, np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    settings = dict(max_new_tokens=8, eos_id=EOS, pad_id=PAD, sampling=Sampling()) | changes
    cache = model.cache(len(prompts), width + settings["max_new_tokens"])
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    return jax.device_get(decode(model, cache, padded, lengths, jax.random.key(0), **settings))


def greedy(model, prompt, steps):
    sequence = list(prompt)
    for _ in range(steps):
        sequence.append(int(np.argmax(model.log_probs(sequence))))
        if sequence[-1] == EOS:
            break
    return sequence[len(prompt) :]


@pytest.mark.parametrize("seed", range(2))
def test_greedy_equals_argmax_recomputed_from_scratch(toy, seed):
    model = toy(VOCAB, seed)
    out = run(model, PROMPTS, sampling=GREEDY)
    for row, prompt in enumerate(PROMPTS):
        expected = greedy(model, prompt, 8)
        assert out.lengths[row, 0] == len(expected)
        assert out.tokens[row, 0].tolist() == expected + [PAD] * (8 - len(expected))


def test_log_probs_are_the_models_own_whatever_the_sampling(toy):
    model = toy(VOCAB, 1)
    out = run(model, PROMPTS, sampling=Sampling(0.6, top_k=4, top_p=0.9), num_samples=3)
    for row, draw in itertools.product(range(4), range(3)):
        tokens = out.tokens[row, draw, : out.lengths[row, draw]].tolist()
        total, sequence = 0.0, list(PROMPTS[row])
        for token in tokens:
            total += model.log_probs(sequence)[token]
            sequence.append(token)
        np.testing.assert_allclose(out.log_probs[row, draw], total, rtol=1e-4)


def test_eos_stops_a_row_and_leaves_the_others_alone(toy):
    out = run(toy(VOCAB, 0), PROMPTS, num_samples=8, max_new_tokens=12)
    tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
    ended = 0
    for row, length in zip(tokens.reshape(-1, 12), lengths.reshape(-1), strict=True):
        assert EOS not in row[: length - 1]
        assert set(row[length:]) <= {PAD}
        ended += row[length - 1] == EOS
        assert row[length - 1] == EOS or length == 12
    assert 0 < ended < 32


def test_a_stop_cuts_a_row_at_its_own_count(toy):
    stop, counts = 4, [1, 2, 3, 1]
    settings = dict(num_samples=8, max_new_tokens=12)
    free = run(toy(VOCAB, 0), PROMPTS, **settings)
    out = run(toy(VOCAB, 0), PROMPTS, stop=Stop(np.int32(stop), np.array(counts)), **settings)
    reached = 0
    for row, draw in itertools.product(range(4), range(8)):
        tokens = free.tokens[row, draw, : free.lengths[row, draw]].tolist()
        stops = [i for i, token in enumerate(tokens, 1) if token == stop]
        if len(stops) >= counts[row]:
            tokens = tokens[: stops[counts[row] - 1]]
            reached += len(stops) > counts[row]
        assert out.lengths[row, draw] == len(tokens)
        assert out.tokens[row, draw].tolist() == tokens + [PAD] * (12 - len(tokens))
    assert reached > 3


def test_loop_stops_when_every_row_is_done(toy):
    model = toy(VOCAB, 0)
    calls = []

    def counted(tokens, positions, cache):
        jax.debug.callback(lambda: calls.append(1))
        logits, cache = model.step(tokens, positions, cache)
        return logits.at[:, :, EOS].set(jnp.where(positions >= 3, 99.0, -99.0)), cache

    cache = model.cache(2, 101)
    prompts, lengths = jnp.array([[3], [4]]), jnp.array([1, 1])
    settings = dict(max_new_tokens=100, eos_id=EOS, sampling=GREEDY)
    run_counted = jax.jit(functools.partial(sample, counted, **settings))
    out = run_counted(cache, prompts, lengths, jax.random.key(0))
    jax.effects_barrier()
    assert out.lengths.tolist() == [[4], [4]]
    assert len(calls) == 4


def test_without_eos_nothing_stops(toy):
    out = run(toy(VOCAB, 0), PROMPTS, eos_id=None, max_new_tokens=20, sampling=Sampling(3.0))
    assert (out.lengths == 20).all()
    assert (out.tokens == EOS).any()


def test_a_sample_does_not_change_with_its_batch_or_padding(toy):
    model = toy(VOCAB, 2)
    together = run(model, PROMPTS, num_samples=2)
    for row, width in [(0, 9), (1, 3), (1, 9), (2, 9), (3, 9)]:
        alone = run(model, [PROMPTS[row]], width, num_samples=2, rows=jnp.array([row]))
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    more = run(model, PROMPTS, num_samples=5)
    np.testing.assert_array_equal(more.tokens[:, :2], together.tokens)


def test_equal_prompts_and_repeated_samples_are_drawn_independently(toy):
    out = run(toy(VOCAB, 2), [[3], [3]], num_samples=4, eos_id=None)
    assert len({tuple(row) for row in np.asarray(out.tokens).reshape(-1, 8).tolist()}) == 8


def test_sequences_follow_the_product_of_conditionals(toy):
    vocab, draws = 3, 8_000
    model = toy(vocab, 5)
    out = run(model, [[1]], num_samples=draws, max_new_tokens=2, eos_id=None)
    pairs = np.asarray(out.tokens[0]) @ [vocab, 1]
    expected = [
        draws * np.exp(model.log_probs([1])[a] + model.log_probs([1, a])[b])
        for a, b in itertools.product(range(vocab), repeat=2)
    ]
    observed = np.bincount(pairs, minlength=vocab**2)
    assert ((observed - expected) ** 2 / expected).sum() < 26.1  # 99.9% point, 8 degrees


def test_disallowed_tokens_never_appear(toy):
    allowed = jnp.ones(VOCAB, bool).at[jnp.array([0, 4])].set(False)
    out = run(toy(VOCAB, 3), PROMPTS, num_samples=16, eos_id=None, allowed=allowed)
    assert not set(np.asarray(out.tokens).ravel().tolist()) & {0, 4}
