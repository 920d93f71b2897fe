"""Beam search against exhaustive search."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.inference import beam
from t5like.inference.beam import beam_search, length_penalty
from t5like.inference.decoding import Stop

VOCAB, EOS = 4, 2
PROMPTS = [[1], [3, 0, 3], [0, 1]]
PADDED = jnp.array([[1, 3, 3], [3, 0, 3], [0, 1, 3]])
LENGTHS = jnp.array([1, 3, 2])


@functools.partial(jax.jit, static_argnames=("step", "beams", "max_new_tokens", "alpha"))
def decode(step, model, *arguments, **settings):
    return beam_search(functools.partial(step, model), *arguments, eos_id=EOS, **settings)


def search(model, beams, length, alpha=0.6, prompts=PADDED, lengths=LENGTHS, step=None, **changes):
    cache = model.cache(len(prompts), prompts.shape[1] + length)
    settings = dict(beams=beams, max_new_tokens=length, alpha=alpha, **changes)
    step = step or type(model).step
    return jax.device_get(decode(step, model, cache, prompts, lengths, **settings))


def exhaustive(model, prompt, length, alpha, stop=None, count=0):
    """(score, tokens) of every finished sequence, best first; then every unfinished one."""
    finished, unfinished = [], []

    def grow(tokens, total):
        if tokens and (tokens[-1] == EOS or (stop is not None and tokens.count(stop) == count)):
            finished.append((total / ((5 + len(tokens)) / 6) ** alpha, tokens))
        elif len(tokens) == length:
            unfinished.append((total / ((5 + length) / 6) ** alpha, tokens))
        else:
            log_probs = model.log_probs(list(prompt) + tokens)
            for token in range(VOCAB):
                grow(tokens + [token], total + log_probs[token])

    grow([], 0.0)
    return sorted(finished, reverse=True) + sorted(unfinished, reverse=True)


@pytest.mark.parametrize(("seed", "alpha"), [(0, 0.0), (1, 0.6), (2, 2.0), (3, -0.5)])
def test_enough_beams_find_what_exhaustive_search_finds(toy, seed, alpha):
    model, length = toy(VOCAB, seed), 4
    # 27 beams hold every live prefix of 3 tokens out of the 3 that do not end a sequence.
    out = search(model, 27, length, alpha)
    for row, prompt in enumerate(PROMPTS):
        best = exhaustive(model, prompt, length, alpha)[:27]
        for place, (score, tokens) in enumerate(best):
            assert out.lengths[row, place] == len(tokens)
            assert out.tokens[row, place, : len(tokens)].tolist() == tokens
            np.testing.assert_allclose(out.scores[row, place], score, rtol=1e-4)


def test_a_stop_ends_beams_at_each_rows_own_count(toy):
    model, length, stop, counts = toy(VOCAB, 2), 4, 0, [1, 2, 1]
    out = search(model, 27, length, stop=Stop(jnp.int32(stop), jnp.array(counts)))
    for row, prompt in enumerate(PROMPTS):
        best = exhaustive(model, prompt, length, 0.6, stop, counts[row])[:27]
        assert {tokens[-1] for _, tokens in best} >= {EOS, stop}
        for place, (score, tokens) in enumerate(best):
            assert out.tokens[row, place, : out.lengths[row, place]].tolist() == tokens
            np.testing.assert_allclose(out.scores[row, place], score, rtol=1e-4)


def test_one_beam_without_penalty_is_greedy_until_the_first_end(toy):
    model = toy(VOCAB, 7)
    allowed = jnp.ones(VOCAB, bool).at[EOS].set(False)
    out = search(model, 1, 6, allowed=allowed)
    for row, prompt in enumerate(PROMPTS):
        sequence = list(prompt)
        for _ in range(6):
            log_probs = np.where(allowed, model.log_probs(sequence), -np.inf)
            sequence.append(int(np.argmax(log_probs)))
        assert out.tokens[row, 0].tolist() == sequence[len(prompt) :]


@pytest.mark.parametrize(("beams", "alpha"), [(2, 0.6), (3, 0.0), (2, -1.0)])
def test_stopping_early_changes_nothing(toy, monkeypatch, beams, alpha):
    steps = []

    def counting(model, *arguments):
        jax.debug.callback(lambda: steps.append(1))
        return model.step(*arguments)

    def run_all(step):
        outs = [search(toy(VOCAB, seed), beams, 12, alpha, step=step) for seed in range(6)]
        jax.effects_barrier()
        return outs

    early, taken = run_all(counting), len(steps)
    # An infinite bound on the live beams: the loop can only end at max_new_tokens. A bound is
    # the one penalty that is asked for two lengths at once.
    penalty = beam.length_penalty
    monkeypatch.setattr(
        beam,
        "length_penalty",
        lambda length, alpha: (
            jnp.full(2, jnp.inf) if jnp.shape(length) == (2,) else penalty(length, alpha)
        ),
    )
    full = run_all(lambda *arguments: counting(*arguments))
    assert taken < len(steps) - taken
    for a, b in zip(early, full, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_row_does_not_change_with_its_batch(toy):
    model = toy(VOCAB, 4)
    together = search(model, 3, 8)
    for row in (0, 2):
        alone = search(model, 3, 8, prompts=PADDED[row, None, :2], lengths=LENGTHS[row, None])
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[row], rtol=1e-5)


def test_places_that_nothing_fills_are_empty(toy):
    only_end = jnp.zeros(VOCAB, bool).at[EOS].set(True)
    out = search(toy(VOCAB, 0), 3, 4, allowed=only_end)
    assert out.tokens[:, 0, 0].tolist() == [EOS] * 3
    assert out.lengths.tolist() == [[1, 0, 0]] * 3
    assert np.isneginf(out.scores[:, 1:]).all()
    assert not out.tokens[:, 1:].any()


def test_sequences_of_one_row_are_distinct(toy):
    out = search(toy(VOCAB, 1), 6, 5)
    for row in np.asarray(out.tokens):
        for a, b in itertools.combinations(row.tolist(), 2):
            assert a != b


def test_length_penalty_known_values():
    np.testing.assert_allclose(length_penalty(1, 0.6), 1.0)
    np.testing.assert_allclose(length_penalty(7, 1.0), 2.0)
    np.testing.assert_allclose(length_penalty(19, 0.5), 2.0)
