"""One update: loss terms to gradients to a new state, whole or accumulated over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from t5like.errors import UserError
from t5like.training import tracks as tracks_lib
from t5like.training.schedules import ScheduleFn
from t5like.training.sharding import replicated
from t5like.training.state import TrainState
from t5like.training.terms import Term

# (params, frozen, batch, key, train) -> {name: Term}
LossFn = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array, bool], dict[str, Term]]

# Streams of device randomness, each under the run's seed.
INIT_STREAM, STEP_STREAM, EVAL_STREAM = 0, 1, 2


@flax.struct.dataclass
class StepMetrics:
    """What one update reports; stays on device until it is fetched.

    Attributes:
      terms: {name: Term}, sums and weights over the whole batch.
      scalars: gradient_norm (before clipping), update_norm, parameter_norm (after the update)
        and learning_rate, float32.
    """

    terms: dict[str, Term]
    scalars: dict[str, jax.Array]


def make_train_step(
    loss_fn: LossFn,
    transform: optax.GradientTransformation,
    schedule: ScheduleFn,
    *,
    declares: frozenset[tracks_lib.Path] | None = None,
    accumulate: int = 1,
    after_step: Callable[[TrainState], TrainState] | None = None,
    places: TrainState | None = None,
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, StepMetrics]]:
    """The jitted update (state, batch, key) -> (state, metrics); the state is donated.

    The loss is the sum over terms of coefficient * sum / weight, sums and weights taken over the
    whole batch. With `accumulate` = N the batch goes through in N micro-batches (row r in
    micro-batch r mod N, which keeps rows on their devices) and gives the same gradients: all
    weights are summed before the first gradient, which costs nothing as they depend on the batch
    alone and the compiler drops the rest of that pass.

    Args:
      loss_fn: see LossFn.
      transform: an optimiser's `build`.
      schedule: step -> learning rate, for the report.
      declares: paths of the parameters that loss_fn is given; those elsewhere, and what the
        optimiser keeps for them, stay as they are to the bit. None: all.
      accumulate: micro-batches an update.
      after_step: state -> state, after the update (moving-average teachers).
      places: the state's shardings, see placement.template; gradients lie as the parameters do.
        None lets jax choose.

    The key is the run's; step s draws from `fold_in(key, s)`, so what a step draws depends on
    the seed and the step alone.
    """
    pinned = _pinned_to(None if places is None else places.params)
    whole = _whole(loss_fn)
    gradients = _accumulated(loss_fn, accumulate, pinned) if accumulate > 1 else whole

    def train_step(state, batch, key):
        key = jax.random.fold_in(key, state.step)
        seen = tracks_lib.declared(state.params, declares)
        grads, terms = gradients(seen, state.frozen, batch, key)
        if declares is not None:
            grads = tracks_lib.filled(grads, state.params)
        grads = pinned(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = transform.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        params, opt_state = tracks_lib.keep_undeclared(
            (params, opt_state), (state.params, state.opt_state), state.params, declares
        )
        scalars = {
            "gradient_norm": global_norm(grads),
            "update_norm": global_norm(tracks_lib.declared(updates, declares)),
            "parameter_norm": global_norm(params),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if after_step is not None:
            state = after_step(state)
        return state, StepMetrics(terms=terms, scalars=scalars)

    if places is None:
        return jax.jit(train_step, donate_argnums=0)
    everywhere = replicated(places.step.mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(places, everywhere))


def _pinned_to(places: Any) -> Callable[[Any], Any]:
    """Lays a tree like the parameters, or a part of it, out as they are."""
    if places is None:
        return lambda tree: tree
    by_path = traverse_util.flatten_dict(places)

    def pin(tree: Any) -> Any:
        flat = traverse_util.flatten_dict(tree)
        return traverse_util.unflatten_dict(
            {p: jax.lax.with_sharding_constraint(leaf, by_path[p]) for p, leaf in flat.items()}
        )

    return pin


def make_eval_step(
    loss_fn: LossFn, declares: frozenset[tracks_lib.Path] | None = None
) -> Callable[..., dict[str, Term]]:
    """The jitted (params, frozen, batch, key) -> {name: Term} without dropout."""

    def eval_step(params, frozen, batch, key):
        return loss_fn(tracks_lib.declared(params, declares), frozen, batch, key, False)

    return jax.jit(eval_step)


def run_key(seed: int, stream: int) -> jax.Array:
    """The key of one stream of device randomness: INIT_STREAM, STEP_STREAM or EVAL_STREAM."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def total_loss(terms: Mapping[str, Term], weights: Mapping[str, Any] | None = None) -> Any:
    """Sum over terms of coefficient * sum / weight; a term of weight 0 counts as 0.

    Args:
      weights: divisors by name in place of the terms' own.
    """
    weights = weights or {name: term.weight for name, term in terms.items()}
    total = jnp.zeros((), jnp.float32)
    for name, term in terms.items():
        if term.coefficient:
            weight = jax.lax.stop_gradient(weights[name])
            share = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
            total = total + term.coefficient * share * term.sum
    return total


def global_norm(tree: Any) -> jax.Array:
    """float32 Euclidean norm over all leaves."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def _value_and_grad(loss_fn: LossFn):
    def loss(params, frozen, batch, key, weights):
        terms = loss_fn(params, frozen, batch, key, True)
        return total_loss(terms, weights), terms

    return jax.grad(loss, has_aux=True)


def _whole(loss_fn: LossFn):
    grad = _value_and_grad(loss_fn)
    return lambda params, frozen, batch, key: grad(params, frozen, batch, key, None)


def _accumulated(loss_fn: LossFn, parts: int, pinned: Callable[[Any], Any]):
    grad = _value_and_grad(loss_fn)

    def gradients(params, frozen, batch, key):
        micro = jax.tree.map(lambda x: _split(x, parts), batch)  # [N, B / N, ...]
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(parts))

        def weigh(_, part):
            terms = loss_fn(params, frozen, part[0], part[1], True)
            return None, {name: term.weight for name, term in terms.items()}

        _, weights = jax.lax.scan(weigh, None, (micro, keys))
        weights = jax.tree.map(lambda w: jnp.sum(w, axis=0), weights)

        def add(total, part):
            grads, terms = grad(params, frozen, part[0], part[1], weights)
            return pinned(jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)), terms

        zeros = pinned(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
        total, terms = jax.lax.scan(add, zeros, (micro, keys))
        total = jax.tree.map(lambda g, p: g.astype(p.dtype), total, params)
        return total, jax.tree.map(lambda x: jnp.sum(x, axis=0), terms)

    return gradients


def _split(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [N, B / N, ...] with row r in part r mod N."""
    if x.shape[0] % parts:
        raise UserError(
            f"a batch of {x.shape[0]} rows does not divide into {parts} micro-batches: make the "
            "batch size a multiple of the accumulation"
        )
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
