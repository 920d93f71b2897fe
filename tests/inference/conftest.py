"""A toy language model whose next-token logits depend on the whole history through a cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyModel:
    """logits after x_0..x_p = now[x_p] + sum over j < p of past[x_j] / (p - j + 1)."""

    now: np.ndarray  # [V, V]
    past: np.ndarray  # [V, V]

    @classmethod
    def random(cls, vocab: int, seed: int) -> ToyModel:
        rng = np.random.default_rng(seed)
        return cls(*rng.normal(size=(2, vocab, vocab)).astype(np.float32) * 1.5)

    def cache(self, batch: int, slots: int) -> dict[str, jax.Array]:
        # Full of a token that would change every logit, if an unwritten slot were ever read.
        return {"tokens": jnp.full((batch, slots), 1, jnp.int32)}

    def step(self, tokens, positions, cache):
        rows = jnp.arange(tokens.shape[0])[:, None]
        memory = cache["tokens"].at[rows, positions].set(tokens)
        distance = positions[:, :, None] - jnp.arange(memory.shape[1])  # [R, T, S]
        weight = jnp.where(distance > 0, 1.0 / (distance + 1), 0.0)
        history = jnp.einsum("rts,rsv->rtv", weight, jnp.asarray(self.past)[memory])
        return jnp.asarray(self.now)[tokens] + history, {"tokens": memory}

    def log_probs(self, sequence) -> np.ndarray:
        """log p(next | sequence) [V], in plain NumPy."""
        last = len(sequence) - 1
        logits = self.now[sequence[last]].astype(np.float64)
        for j in range(last):
            logits = logits + self.past[sequence[j]] / (last - j + 1)
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


@pytest.fixture
def toy():
    return ToyModel.random
