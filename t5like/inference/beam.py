"""Beam search with a length penalty, through the same step functions as `decoding`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5like.inference.decoding import (
    Cache,
    Decoded,
    GatherFn,
    StepFn,
    Stop,
    initial_stops,
    last_tokens,
    prefill,
    take_rows,
)


def length_penalty(length: jax.Array | int, alpha: float) -> jax.Array:
    """((5 + length) / 6) ** alpha, float32 (GNMT, Wu et al. 2016, section 7; as in T5X)."""
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


class _Finished(NamedTuple):
    """The best K finished sequences of each row, best first; score -inf marks a free place."""

    scores: jax.Array  # [B, K]
    log_probs: jax.Array  # [B, K]
    lengths: jax.Array  # [B, K]
    tokens: jax.Array  # [B, K, T]


class _State(NamedTuple):
    step: jax.Array
    log_probs: jax.Array  # [B, K] of the live beams, best first
    tokens: jax.Array  # [B, K, T]
    last: jax.Array  # [B, K]
    stops_left: jax.Array  # [B, K] how many more stop tokens may come
    finished: _Finished
    cache: Cache  # B * K rows


def beam_search(
    step_fn: StepFn,
    cache: Cache,
    prompts: jax.Array,
    lengths: jax.Array,
    *,
    beams: int,
    max_new_tokens: int,
    eos_id: int | None,
    pad_id: int = 0,
    alpha: float = 0.6,
    allowed: jax.Array | None = None,
    stop: Stop | None = None,
    gather: GatherFn = take_rows,
) -> Decoded:
    """Finds the likeliest sequences by score = log-probability / length_penalty.

    A row's finished sequences (ended within max_new_tokens) come first, by score; where there are
    fewer than `beams`, the best unfinished ones of max_new_tokens follow. The search stops when
    no live beam of any row can still enter the finished ones: a log-probability only falls and
    the penalty is monotonic in length, so that is exact, not a heuristic. Every live beam may
    end at every step (T5X asks that the ending be among the 2K best extensions), so with enough
    beams the search is exhaustive.

    Args:
      step_fn, cache, prompts, lengths, eos_id, pad_id, allowed, stop, gather: as for
        `decoding.sample`.
      beams: K, beams kept and sequences returned.
      max_new_tokens: T.
      alpha: exponent of the length penalty; 0 ranks by log-probability.

    Returns:
      Decoded with S = K. A place that no sequence could fill has score -inf and length 0.
    """
    batch = prompts.shape[0]
    repeat = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), beams)
    starts = lengths[repeat] - 1

    def body(state: _State) -> _State:
        positions = (starts + state.step)[:, None]
        logits, cache = step_fn(state.last.reshape(-1, 1), positions, state.cache)
        log_probs = jax.nn.log_softmax(logits[:, 0].astype(jnp.float32), axis=-1)
        if allowed is not None:
            log_probs = jnp.where(allowed, log_probs, -jnp.inf)
        totals = state.log_probs[:, :, None] + log_probs.reshape(batch, beams, -1)

        finished = state.finished
        for token, may_end in _ends(state, eos_id, stop):
            gained = jnp.where(may_end, totals[:, :, token], -jnp.inf)
            finished = _merge(finished, _ended(state, gained, token, alpha))
            going_on = jnp.where(may_end, -jnp.inf, totals[:, :, token])
            totals = totals.at[:, :, token].set(going_on)
        values, flat = jax.lax.top_k(totals.reshape(batch, -1), beams)
        parents, tokens = jnp.divmod(flat, totals.shape[-1])
        rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
        left = _gather_beams(state.stops_left, parents)
        return _State(
            step=state.step + 1,
            log_probs=values,
            tokens=_gather_beams(state.tokens, parents).at[:, :, state.step].set(tokens),
            last=tokens,
            stops_left=left if stop is None else left - (tokens == stop.token),
            finished=finished,
            cache=gather(cache, rows),
        )

    def going(state: _State) -> jax.Array:
        penalties = length_penalty(jnp.stack([state.step + 1, max_new_tokens]), alpha)
        best_possible = state.log_probs[:, 0] / jnp.max(penalties)
        open_rows = best_possible > state.finished.scores[:, -1]
        return (state.step < max_new_tokens) & jnp.any(open_rows)

    first = last_tokens(prompts, lengths)
    state = _start(first, batch, beams, max_new_tokens, pad_id)
    state = state._replace(
        cache=gather(prefill(step_fn, cache, prompts), repeat),
        stops_left=initial_stops(stop, batch)[repeat].reshape(batch, beams),
    )
    state = jax.lax.while_loop(going, body, state)
    return _result(state, max_new_tokens, alpha, pad_id)


def _start(first: jax.Array, batch: int, beams: int, length: int, pad_id: int) -> _State:
    """One live beam a row (all beams are equal at first) and no finished sequence."""
    none = jnp.full((batch, beams), -jnp.inf, jnp.float32)
    tokens = jnp.full((batch, beams, length), pad_id, jnp.int32)
    return _State(
        step=jnp.int32(0),
        log_probs=none.at[:, 0].set(0.0),
        tokens=tokens,
        last=jnp.broadcast_to(first[:, None], (batch, beams)),
        stops_left=None,
        finished=_Finished(none, none, jnp.zeros((batch, beams), jnp.int32), tokens),
        cache=None,
    )


def _ends(state: _State, eos_id: int | None, stop: Stop | None):
    """(token, bool [B, K] whether it would end the beam) for each token that can."""
    if eos_id is not None:
        yield eos_id, jnp.ones(state.last.shape, bool)
    if stop is not None:
        yield stop.token, state.stops_left == 1


def _ended(state: _State, log_probs: jax.Array, end: jax.Array | int, alpha: float) -> _Finished:
    """Every live beam with `end` put after it, given its log-probabilities [B, K] with it."""
    return _Finished(
        scores=log_probs / length_penalty(state.step + 1, alpha),
        log_probs=log_probs,
        lengths=jnp.full(log_probs.shape, state.step + 1, jnp.int32),
        tokens=state.tokens.at[:, :, state.step].set(end),
    )


def _gather_beams(values: jax.Array, beams: jax.Array) -> jax.Array:
    """values [B, K, ...] at beams [B, M] -> [B, M, ...]."""
    return jax.vmap(lambda row, index: row[index])(values, beams)


def _merge(old: _Finished, new: _Finished) -> _Finished:
    """The best K of two sets; a tie goes to the older."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    _, best = jax.lax.top_k(both.scores, old.scores.shape[1])
    return jax.tree.map(lambda x: _gather_beams(x, best), both)


def _result(state: _State, max_new_tokens: int, alpha: float, pad_id: int) -> Decoded:
    """Finished sequences, then live ones in the places that are left."""
    finished, beams = state.finished, state.log_probs.shape[1]
    # A live beam counts only once it has all its tokens: after an early stop no place is left.
    live = _Finished(
        state.log_probs / length_penalty(max_new_tokens, alpha),
        state.log_probs,
        jnp.full_like(finished.lengths, max_new_tokens),
        state.tokens,
    )
    count = jnp.sum(jnp.isfinite(finished.scores), axis=1)
    places = jnp.arange(beams)[None, :] - count[:, None]
    fill = jax.tree.map(lambda x: _gather_beams(x, jnp.maximum(places, 0)), live)

    def select(done, live):
        return jnp.where((places < 0).reshape(places.shape + (1,) * (done.ndim - 2)), done, live)

    out = jax.tree.map(select, finished, fill)
    real = jnp.isfinite(out.scores)
    return Decoded(
        tokens=jnp.where(real[..., None], out.tokens, pad_id),
        lengths=jnp.where(real, out.lengths, 0),
        log_probs=out.log_probs,
        scores=out.scores,
    )
