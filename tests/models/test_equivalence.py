"""Choices that must not change the result: scan, remat, dtype; and what dropout does."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.models.axes import parameter_shapes
from t5like.models.layers import dot
from t5like.models.transformer import Transformer, init_parameters

# As in conftest.py: XLA's optimisation, without LLVM's, which is most of the compile time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def value_and_gradient(config):
    """(params, batch) -> a scalar of logits at real slots and its gradient, jitted."""

    def scalar(params, batch):
        logits = Transformer(config).apply({"params": params}, batch)
        ids = batch[f"{'encoder' if config.architecture == 'encoder' else 'decoder'}_segment_ids"]
        return jnp.mean(jnp.where(ids[..., None] > 0, jnp.sin(logits), 0.0))

    return quick_jit(jax.value_and_grad(scalar))


def padded(batch):
    """The batch with the end of its first row made padding."""
    for name in batch:
        if name.endswith("segment_ids"):
            batch[name][0, 5:] = 0
    return batch


def stack_layers(params: dict) -> dict:
    """Unrolled parameters as a scanned model has them: layers_i stacked on axis 0."""
    stacked = {}
    for name, tree in params.items():
        layers = [tree[f"layers_{i}"] for i in range(2)] if "layers_0" in tree else []
        stacked[name] = {key: leaf for key, leaf in tree.items() if key[:7] != "layers_"}
        if layers:
            stacked[name]["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return stacked


def assert_trees_close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected)


@pytest.mark.parametrize("family, architecture", [("t5", "encoder_decoder"), ("bert", "encoder")])
def test_scan_equals_unrolled(tiny, family, architecture):
    unrolled = tiny.config(architecture, family)
    scanned = dataclasses.replace(unrolled, scan_layers=True)
    params, batch = tiny.parameters(unrolled), padded(tiny.batch(architecture))
    value, gradient = value_and_gradient(unrolled)(params, batch)
    scanned_value, scanned_gradient = value_and_gradient(scanned)(stack_layers(params), batch)
    np.testing.assert_allclose(scanned_value, value, atol=1e-6)
    assert_trees_close(scanned_gradient, stack_layers(gradient), atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_equals_no_remat(tiny, remat, scan):
    plain = tiny.config("decoder", "llama", scan_layers=scan)
    params, batch = tiny.parameters(plain), padded(tiny.batch("decoder"))
    expected = value_and_gradient(plain)(params, batch)
    actual = value_and_gradient(dataclasses.replace(plain, remat=remat))(params, batch)
    assert_trees_close(actual, expected, atol=1e-6)


def test_remat_keeps_less(tiny):
    """Residuals between the passes: none > dots > full, in bytes beside the parameters."""

    def kept_bytes(remat: str) -> int:
        config = tiny.config("encoder", "t5", remat=remat)
        batch, params = tiny.batch("encoder"), tiny.parameters(config)
        _, backward = jax.eval_shape(
            lambda p: jax.vjp(lambda q: Transformer(config).apply({"params": q}, batch), p), params
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    kept = [kept_bytes(remat) for remat in ("none", "dots", "full")]
    assert kept[0] > 1.3 * kept[1] > 1.3**2 * kept[2]


@pytest.mark.parametrize(
    "architecture, family",
    [("decoder", "llama"), ("encoder", "bert")],
)
def test_bfloat16_is_close_to_float32(tiny, architecture, family):
    """Logits of order 1 within 0.1, and parameters and their gradients stay float32."""
    config = tiny.config(architecture, family)
    half = dataclasses.replace(config, dtype="bfloat16")
    params, batch = tiny.parameters(config), tiny.batch(architecture)
    full, rounded = tiny.logits(config, batch), tiny.logits(half, batch)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(full - rounded).max() < 0.1 * np.abs(full).max()
    _, gradient = value_and_gradient(half)(params, batch)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradient)} == {"float32"}


def test_gradients_are_finite_where_rows_are_all_padding(tiny):
    for architecture in ("encoder", "encoder_decoder"):
        config, batch = tiny.config(architecture), tiny.batch(architecture)
        for name in batch:
            if name.endswith("segment_ids"):
                batch[name][1] = 0
        value, gradient = value_and_gradient(config)(tiny.parameters(config), batch)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_dot_has_the_gradient_of_a_product():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 5), (5, 4)))

    def scalar(product):
        return lambda x, kernel: jnp.sin(product(x, kernel)).sum()

    axes = (None, None)
    ours = jax.grad(scalar(lambda x, w: dot(x, w, axes, "float32", "float32")), (0, 1))(x, kernel)
    plain = jax.grad(scalar(jnp.dot), (0, 1))(x, kernel)
    assert_trees_close(ours, plain, rtol=1e-5, atol=1e-6)


@functools.cache
def training_states(config):
    """(params, batch, seed) -> every layer's states with dropout on, jitted."""

    def states(params, batch, seed):
        return Transformer(config).apply(
            {"params": params},
            batch,
            train=True,
            all_layers=True,
            rngs={"dropout": jax.random.key(seed)},
            method="hidden",
        )

    return quick_jit(states)


def test_dropout_draws_from_its_key(tiny):
    config, batch = tiny.config("encoder", dropout_rate=0.3), tiny.batch("encoder")
    draws = [training_states(config)(tiny.parameters(config), batch, seed) for seed in (0, 0, 1)]
    assert_trees_close(draws[0], draws[1], rtol=0)
    assert np.abs(draws[0][-1] - draws[2][-1]).max() > 1e-2


def test_dropout_is_off_outside_training(tiny):
    batch = tiny.batch("encoder")
    with_dropout, without = (tiny.config("encoder", dropout_rate=rate) for rate in (0.3, 0.0))
    np.testing.assert_array_equal(tiny.logits(with_dropout, batch), tiny.logits(without, batch))


def test_dropout_is_shared_along_the_length_and_keeps_the_mean(tiny):
    config = tiny.config("encoder", "t5", dropout_rate=0.5)
    params, batch = tiny.parameters(config), tiny.batch("encoder")
    batch["encoder_input_tokens"][:] = 3
    embedding = params["token_embedder"]["embedding"][3]
    kept = np.stack(
        [training_states(config)(params, batch, seed)[0] / embedding for seed in range(40)]
    )
    assert set(np.unique(kept.round(4))) == {0.0, 2.0}
    np.testing.assert_array_equal(kept, kept[:, :, :1].repeat(kept.shape[2], 2))
    assert abs(kept.mean() - 1) < 0.1


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_draws_anew_in_each_layer(tiny, scan):
    """Without attention's part, what a layer adds is exactly 0 where its MLP's is dropped."""
    config = tiny.config("encoder", "sinusoidal", dropout_rate=0.5, scan_layers=scan, num_layers=3)

    def without_attention(path, leaf):
        return leaf * 0 if [key.key for key in path[-2:]] == ["out", "kernel"] else leaf

    params = jax.tree_util.tree_map_with_path(without_attention, tiny.parameters(config))
    states = training_states(config)(params, tiny.batch("encoder"), 0)
    dropped = [np.asarray(states[i + 1] == states[i])[:, 0] for i in (0, 1)]
    for mask in dropped:
        assert 0.2 < mask.mean() < 0.8
    assert (dropped[0] != dropped[1]).any()


def test_all_layers_ends_with_hidden(tiny):
    for scan in (False, True):
        config = tiny.config("encoder_decoder", scan_layers=scan)
        variables, batch = {"params": tiny.parameters(config)}, tiny.batch("encoder_decoder")
        states = quick_jit(
            lambda v, b, c=config: Transformer(c).apply(v, b, all_layers=True, method="hidden")
        )(variables, batch)
        assert [state.shape for state in states] == [(2, tiny.targets, 16)] * 3
        logits = Transformer(config).apply(variables, states[-1], method="logits")
        np.testing.assert_allclose(logits, tiny.logits(config, batch), atol=1e-5)
        np.testing.assert_allclose(
            states[0][0, 0],
            variables["params"]["token_embedder"]["embedding"][batch["decoder_input_tokens"][0, 0]],
            atol=1e-6,
        )


def test_initial_values_are_t5s(tiny):
    """Standard deviations: embeddings 1, kernels fan-in ** -0.5, queries Dh ** -0.5 less."""
    config = tiny.config("encoder_decoder", d_model=64, d_ff=96, vocab_size=512, scan_layers=True)
    params = quick_jit(lambda rng: init_parameters(config, rng))(jax.random.key(1))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, parameter_shapes(config))
    layers = params["encoder"]["layers"]
    attention, mlp = layers["self_attention"], layers["mlp"]
    expected = {
        1.0: params["token_embedder"]["embedding"],
        64**-0.5: attention["key"]["kernel"],
        (64 * 4) ** -0.5: attention["query"]["kernel"],
        16**-0.5: attention["out"]["kernel"],
        96**-0.5: mlp["wo"]["kernel"],
    }
    for deviation, leaf in expected.items():
        np.testing.assert_allclose(leaf.std(), deviation, rtol=0.1)
    assert (layers["mlp_norm"]["scale"] == 1).all()
    kernels = mlp["wo"]["kernel"]
    assert (kernels[0] != kernels[1]).any(), "layers must not start equal"
