"""Sampling token by token through a cache, for any model behind a step function.

A step function is `step(tokens [R, T], positions [R, T], cache) -> (logits [R, T, V], cache)`.
It writes what it computes at slot = position, and a query at position p sees no slot after p
(or after its bidirectional prefix). Prompts may therefore be padded on the right: what padding
left in a slot is overwritten by the generated token of that position before anyone sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5like.inference import sampling as sampling_lib
from t5like.inference.sampling import Sampling

Cache = Any
StepFn = Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]
GatherFn = Callable[[Cache, jax.Array], Cache]


class Stop(NamedTuple):
    """A token that ends sequences, besides EOS.

    Attributes:
      token: its id.
      counts: int32 [B], of each prompt, at which occurrence of the token its sequences end; at
        least 1.
    """

    token: jax.Array | int
    counts: jax.Array


class Decoded(NamedTuple):
    """What was generated for B prompts, S sequences each.

    Attributes:
      tokens: int32 [B, S, T], ending with EOS (or a `Stop`) where it came, then padding.
      lengths: int32 [B, S], tokens generated, the one that ends them included.
      log_probs: float32 [B, S], natural log-likelihood of the sequence under the model's own
        distribution (no temperature, nothing filtered).
      scores: float32 [B, S], what the sequences were ranked by: log_probs over the length
        penalty for a beam search, log_probs for samples (which are not sorted).
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probs: jax.Array
    scores: jax.Array


class _State(NamedTuple):
    step: jax.Array
    last: jax.Array  # [R] the token to be fed next
    done: jax.Array  # [R]
    stops_left: jax.Array  # [R] how many more stop tokens may come
    tokens: jax.Array  # [R, T]
    lengths: jax.Array  # [R]
    log_probs: jax.Array  # [R]
    cache: Cache


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """Selects rows of a cache whose leaves all have the batch on axis 0."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), cache)


def prefill(step_fn: StepFn, cache: Cache, prompts: jax.Array) -> Cache:
    """Writes prompts [B, P] into the cache in one pass.

    The logits are dropped (under jit they are never computed): the last token of each prompt is
    fed once more as the first step, which writes the same values to the same slot. That spares
    [B, P, V] logits of which only one position a row is wanted.
    """
    if prompts.shape[1] == 1:
        return cache
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1], dtype=jnp.int32), prompts.shape)
    _, cache = step_fn(prompts, positions, cache)
    return cache


def last_tokens(prompts: jax.Array, lengths: jax.Array) -> jax.Array:
    """The last real token [B] of prompts [B, P] with lengths [B] >= 1."""
    return jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]


def initial_stops(stop: Stop | None, batch: int) -> jax.Array:
    """int32 [B], the stop tokens that end each row at the start."""
    return jnp.ones(batch, jnp.int32) if stop is None else jnp.asarray(stop.counts, jnp.int32)


def sample(
    step_fn: StepFn,
    cache: Cache,
    prompts: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    pad_id: int = 0,
    sampling: Sampling,
    num_samples: int = 1,
    rows: jax.Array | None = None,
    allowed: jax.Array | None = None,
    stop: Stop | None = None,
    gather: GatherFn = take_rows,
) -> Decoded:
    """Samples continuations until EOS or max_new_tokens, stopping when every row is done.

    Args:
      step_fn, cache: see the module; the cache holds B rows and P + max_new_tokens slots.
      prompts: int32 [B, P], padded on the right; at least a start token each.
      lengths: int32 [B], real tokens of each prompt.
      key: typed PRNG key of the whole request.
      max_new_tokens: T.
      eos_id: ends a sequence; None: nothing does.
      pad_id: fills a sequence after its end.
      sampling: temperature, top-k, top-p.
      num_samples: S independent samples for each prompt.
      rows: int32 [B], index of each prompt in the request (default 0..B-1). A sample depends on
        (key, index, sample number) alone, so it does not change with the batch it is in.
      allowed: bool [V], tokens that may be generated; None: all.
      stop: what ends a sequence besides EOS, or None.
      gather: selects rows of the cache.

    Returns:
      Decoded.
    """
    batch = prompts.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32) if rows is None else rows
    repeat = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), num_samples)
    draws = jnp.tile(jnp.arange(num_samples, dtype=jnp.int32), batch)
    keys = sampling_lib.row_keys(key, rows[repeat], draws)
    starts = lengths[repeat] - 1

    def body(state: _State) -> _State:
        positions = (starts + state.step)[:, None]
        logits, cache = step_fn(state.last[:, None], positions, state.cache)
        logits = logits[:, 0].astype(jnp.float32)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        token = sampling_lib.choose(step_keys, logits, sampling)
        token = jnp.where(state.done, pad_id, token)
        gained = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        done, stops_left = state.done, state.stops_left
        if eos_id is not None:
            done |= token == eos_id
        if stop is not None:
            stops_left -= token == stop.token
            done |= stops_left == 0
        return _State(
            step=state.step + 1,
            last=token,
            done=done,
            stops_left=stops_left,
            tokens=state.tokens.at[:, state.step].set(token),
            lengths=state.lengths + ~state.done,
            log_probs=state.log_probs + jnp.where(state.done, 0.0, gained),
            cache=cache,
        )

    count = batch * num_samples
    state = _State(
        step=jnp.int32(0),
        last=last_tokens(prompts, lengths)[repeat],
        done=jnp.zeros(count, bool),
        stops_left=initial_stops(stop, batch)[repeat],
        tokens=jnp.full((count, max_new_tokens), pad_id, jnp.int32),
        lengths=jnp.zeros(count, jnp.int32),
        log_probs=jnp.zeros(count, jnp.float32),
        cache=gather(prefill(step_fn, cache, prompts), repeat),
    )
    going = lambda state: (state.step < max_new_tokens) & ~jnp.all(state.done)  # noqa: E731
    state = jax.lax.while_loop(going, body, state)
    group = lambda x: x.reshape(batch, num_samples, *x.shape[1:])  # noqa: E731
    log_probs = group(state.log_probs)
    return Decoded(group(state.tokens), group(state.lengths), log_probs, log_probs)
