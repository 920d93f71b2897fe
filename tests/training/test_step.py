"""One update: accumulation is exact, terms are global sums over global weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.errors import UserError
from t5like.training import optimizers, state as state_lib, step as step_lib
from t5like.training.schedules import Constant
from t5like.training.terms import Term
from tests import many_devices

OPTIMIZER = optimizers.AdamW(learning_rate=Constant(0.1))


def one_update(loss_fn, params, batch, accumulate=1, after_step=None):
    transform = OPTIMIZER.build(10)
    update = step_lib.make_train_step(
        loss_fn, transform, OPTIMIZER.schedule(10), accumulate=accumulate, after_step=after_step
    )
    state = state_lib.create(jax.tree.map(jnp.copy, params), transform)
    return update(state, batch, step_lib.run_key(0, step_lib.STEP_STREAM))


def without_dropout(loss_fn):
    return lambda params, frozen, batch, key, train: loss_fn(params, frozen, batch, key, False)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_gives_the_whole_batchs_update(toy_parts, accumulate):
    params = toy_parts.init(jax.random.key(0))
    batch = toy_parts.batch_of(0)
    batch["weights"][:3] *= 100  # micro-batches of very different weight
    loss_fn = without_dropout(toy_parts.loss_fn)
    whole_state, whole = one_update(loss_fn, params, batch)
    state, metrics = one_update(loss_fn, params, batch, accumulate)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        (state.opt_state, state.params, metrics),
        (whole_state.opt_state, whole_state.params, whole),
    )


def test_the_gradient_is_that_of_the_sum_of_ratios(toy_parts):
    params, batch = toy_parts.init(jax.random.key(0)), toy_parts.batch_of(0)

    def total(params):
        terms = toy_parts.loss_fn(params, None, batch, None, False)
        return sum(t.coefficient * t.sum / t.weight for t in terms.values())

    _, metrics = one_update(without_dropout(toy_parts.loss_fn), params, batch, 4)
    norm = step_lib.global_norm(jax.grad(total)(params))
    np.testing.assert_allclose(metrics.scalars["gradient_norm"], norm, rtol=1e-5)


def test_weights_cost_no_second_forward_pass(toy_parts):
    """The pass that sums the weights is emptied by the compiler."""

    def matmuls(loss_fn, accumulate):
        transform = OPTIMIZER.build(10)
        update = step_lib.make_train_step(
            loss_fn, transform, OPTIMIZER.schedule(10), accumulate=accumulate
        )
        params = {"w": jnp.ones((256, 256))}
        batch = {"x": jnp.ones((64, 256))}
        state = state_lib.create(params, transform)
        compiled = update.lower(state, batch, jax.random.key(0)).compile()
        return compiled.as_text().count(" dot(")

    def loss_fn(params, frozen, batch, key, train):
        y = jnp.tanh(batch["x"] @ params["w"]) @ params["w"]
        return {"y": Term(jnp.sum(y), jnp.float32(y.size))}

    assert matmuls(loss_fn, 4) == matmuls(loss_fn, 1) > 0


def test_a_term_of_weight_zero_counts_as_nothing():
    def loss_fn(params, frozen, batch, key, train):
        real = jnp.sum(params["w"] * batch["x"])
        return {"real": Term(real, jnp.float32(2)), "none": Term(real * 0, jnp.sum(batch["w"]))}

    batch = {"x": jnp.ones(4), "w": jnp.zeros(4)}
    state, metrics = one_update(loss_fn, {"w": jnp.ones(4)}, batch)
    assert np.isfinite(state.params["w"]).all()
    np.testing.assert_allclose(metrics.scalars["gradient_norm"], 1.0, rtol=1e-6)


def test_after_step_sees_the_new_state(toy_parts):
    def after(state):
        return state.replace(params=jax.tree.map(lambda p: p * state.step, state.params))

    args = toy_parts.loss_fn, toy_parts.init(jax.random.key(0)), toy_parts.batch_of(0)
    plain, _ = one_update(*args)
    doubled, _ = one_update(*args, after_step=after)
    np.testing.assert_array_equal(
        doubled.params["layer"]["kernel"], plain.params["layer"]["kernel"] * plain.step
    )


def test_randomness_is_a_function_of_seed_and_step():
    def loss_fn(params, frozen, batch, key, train):
        return {"draw": Term(jax.random.uniform(key) + 0 * params["w"], jnp.float32(1))}

    transform = OPTIMIZER.build(10)
    update = step_lib.make_train_step(loss_fn, transform, OPTIMIZER.schedule(10))

    def draws(seed):
        state = state_lib.create({"w": jnp.float32(0)}, transform)
        for _ in range(3):
            state, metrics = update(state, {}, step_lib.run_key(seed, step_lib.STEP_STREAM))
            yield float(metrics.terms["draw"].sum)

    first = list(draws(1))
    assert first == list(draws(1))
    assert len(set(first)) == 3 and not set(first) & set(draws(2))


def test_a_batch_that_does_not_divide_is_refused(toy_parts):
    args = toy_parts.loss_fn, toy_parts.init(jax.random.key(0)), toy_parts.batch_of(0)
    with pytest.raises(UserError, match="8 rows does not divide into 3"):
        one_update(*args, accumulate=3)


SEVERAL_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from t5like.errors import UserError
from t5like.training import optimizers, placement, step as step_lib
from t5like.training.sharding import Sharding, put_replicated
from t5like.training.terms import Term
assert jax.device_count() == 4

def loss_fn(params, frozen, batch, key, train):
    y = jnp.tanh(batch["x"] @ params["w"])
    return {"y": Term(jnp.sum(y * batch["m"]), jnp.sum(batch["m"]))}

rng = np.random.default_rng(0)
batch = {"x": rng.normal(size=(16, 8)).astype("f"), "m": rng.random((16, 1)).astype("f")}
params = {"w": rng.normal(size=(8, 8)).astype("f")}
optimizer = optimizers.AdamW()
transform = optimizer.build(10)
results = []
sharding = Sharding()
for count, accumulate in ((1, 1), (4, 1), (4, 4)):
    mesh = sharding.mesh(jax.devices()[:count])
    with sharding.in_force(mesh):
        template = placement.template(lambda key: params, transform, sharding, mesh)
        update = step_lib.make_train_step(
            loss_fn, transform, optimizer.schedule(10), accumulate=accumulate,
            places=placement.shardings(template))
        state = placement.fresh_state(lambda key: params, transform)(None)
        state = jax.device_put(state, placement.shardings(template))
        put = sharding.put_batch(mesh, batch)
        assert put["x"].addressable_shards[0].data.shape[0] == 16 // count
        key = put_replicated(step_lib.run_key(0, 1), mesh)
        results.append(jax.device_get(update(state, put, key)))
for other in results[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                 results[0], other)
try:
    sharding.put_batch(sharding.mesh(), {"x": np.zeros((6, 2))})
except UserError as error:
    assert "6 rows" in str(error)
else:
    raise AssertionError("an uneven batch was accepted")
"""


def test_one_device_equals_four():
    run = many_devices.run(4, "-c", SEVERAL_DEVICES)
    assert run.returncode == 0, run.stderr
