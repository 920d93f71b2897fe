"""Short fine-tuning of a whole backbone: one jitted step, whatever the loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5like.models.config import ModelConfig
from t5like.training import schedules, state as train_state
from t5like.training.optimizers import AdamW, Optimizer

# (params, batch, key, config) -> scalar; a module-level function, so that it compiles once.
Loss = Callable[[Any, Mapping[str, jax.Array], jax.Array | None, ModelConfig], jax.Array]


def adamw(learning_rate: float, steps: int) -> AdamW:
    """BERT's recipe for fine-tuning: a tenth of the steps warm up, then straight down to 0."""
    schedule = schedules.Linear(peak=learning_rate, warmup=max(1, steps // 10))
    return AdamW(learning_rate=schedule, b2=0.999, weight_decay=0.01)


def tune(
    params: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss: Loss,
    config: ModelConfig,
    optimizer: Optimizer,
    steps: int,
    seed: int,
) -> Any:
    """Parameters after as many updates as there are batches; those given stay as they are.

    Args:
      params: any tree that `loss` reads.
      batches: of one shape.
      loss: see Loss; the key is None unless the model has dropout.
      steps: that the optimiser's schedule is made for.
      seed: of dropout.
    """
    transform = optimizer.build(steps)
    tuned = train_state.create(jax.tree.map(jnp.array, params), transform)
    key = jax.random.key(seed)
    for batch in batches:
        tuned = _step(tuned, dict(batch), key, loss, config, optimizer, steps)
    return tuned.params


@functools.partial(
    jax.jit, static_argnames=("loss", "config", "optimizer", "steps"), donate_argnums=0
)
def _step(state, batch, key, loss: Loss, config: ModelConfig, optimizer: Optimizer, steps: int):
    dropout_key = jax.random.fold_in(key, state.step) if config.dropout_rate else None
    grads = jax.grad(loss)(state.params, batch, dropout_key, config)
    updates, opt_state = optimizer.build(steps).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)
