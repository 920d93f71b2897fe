"""The model on every attention backend: the same logits and gradients, or a clear refusal."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.errors import UserError
from t5like.models.transformer import Transformer, init_parameters


@pytest.mark.parametrize("backend", ["tpu", "gpu"])
def test_kernels_in_the_model_equal_xla(tiny, backend):
    """A packed encoder-decoder with T5's bias, scanned and recomputed; kernels are interpreted."""
    config = tiny.config(
        "encoder_decoder",
        num_layers=1,
        head_dim=32,
        num_kv_heads=2,
        scan_layers=True,
        remat="full",
    )
    batch = tiny.batch("encoder_decoder")
    for stack in ("encoder", "decoder"):
        batch[f"{stack}_segment_ids"][:, 4:] = 2
        batch[f"{stack}_positions"][:, 4:] -= 4
    batch["encoder_segment_ids"][0, 8:] = 0
    params = init_parameters(config, jax.random.key(0))

    def value_and_gradient(backend):
        model = Transformer(dataclasses.replace(config, attention_backend=backend))

        def scalar(params):
            return jnp.sin(model.apply({"params": params}, batch)).mean()

        return jax.jit(jax.value_and_grad(scalar))(params)

    actual, expected = value_and_gradient(backend), value_and_gradient("xla")
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "backend, complaint",
    [("tpu", "cannot serve this call: a head size of 4"), ("abacus", "unknown")],
)
def test_a_backend_that_cannot_serve_is_named_with_its_setting(tiny, backend, complaint):
    config = tiny.config("encoder", attention_backend=backend)
    with pytest.raises(
        UserError, match=f"ModelConfig.attention_backend = '{backend}': .*{complaint}"
    ):
        tiny.logits(config, tiny.batch("encoder"))
