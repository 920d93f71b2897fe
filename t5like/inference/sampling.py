"""Choosing the next token: temperature, top-k and top-p, as pure functions of logits and keys.

The order is temperature, then top-k, then top-p over what top-k has left (renormalised), as in
Hugging Face's generation. Ties are broken by the lower token id, so that "k tokens" means k.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5like.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Hashable, so that it can be static under jit.

    Attributes:
      temperature: divides the logits; 0 means greedy (argmax), and then the rest is ignored.
      top_k: keep the k likeliest tokens; None keeps all.
      top_p: keep the smallest set of likeliest tokens whose probability is at least p (nucleus
        sampling, Holtzman et al. 2020, section 3.1); None keeps all.

    Raises:
      UserError: where a value has no meaning.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be 1 or more, or None to keep all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be over 0 and at most 1")


GREEDY = Sampling(temperature=0.0)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Sets all but the k largest logits [..., V] to -inf; ties go to lower ids."""
    if k >= logits.shape[-1]:
        return logits
    _, ids = jax.lax.top_k(logits, k)
    keep = jnp.put_along_axis(jnp.zeros(logits.shape, bool), ids, True, axis=-1, inplace=False)
    return jnp.where(keep, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Sets to -inf all logits [..., V] outside the smallest likeliest set with mass >= p.

    A token stays if the tokens ranked before it sum to less than p, so the first always stays.
    """
    if p >= 1:  # a rounded cumulative sum may reach 1 before the last token
        return logits
    order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    mass = jnp.cumsum(probabilities, axis=-1)
    before = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1)
    keep = jnp.put_along_axis(
        jnp.zeros(logits.shape, bool), order, before < p, axis=-1, inplace=False
    )
    return jnp.where(keep, logits, -jnp.inf)


def warp(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits [..., V] whose softmax `choose` draws from (temperature must be over 0)."""
    # The maximum is taken off first: a tiny temperature may then underflow but never overflow.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    return logits


def choose(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token for each row with the row's own key.

    Args:
      keys: typed PRNG keys [B] (unused when greedy).
      logits: float32 [B, V]; -inf forbids a token.
      sampling: how.

    Returns:
      int32 [B].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    return draw(keys, warp(logits, sampling)).astype(jnp.int32)


def row_keys(key: jax.Array, rows: jax.Array, samples: jax.Array) -> jax.Array:
    """Keys [B] that depend on (key, row, sample) alone, never on the batch a row is in.

    Args:
      key: one typed PRNG key.
      rows: int32 [B], each row's index in the request.
      samples: int32 [B], which of the row's samples this is.
    """
    by_row = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return jax.vmap(jax.random.fold_in)(by_row, samples)
