"""Models that are given embeddings instead of token ids, their own or another model's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, traverse_util

from t5like.models.transformer import Transformer
from tests.models.conftest import quick_jit


@pytest.mark.parametrize(("architecture", "family"), [("encoder", "bert"), ("decoder", "t5")])
def test_given_embeddings_equal_those_of_the_tokens(tiny, architecture, family):
    config = tiny.config(architecture, family)
    model, variables = Transformer(config), {"params": tiny.parameters(config)}
    batch = tiny.batch(config.architecture)

    @quick_jit
    def states(variables):
        tokens = batch[f"{architecture}_input_tokens"]
        embeddings = model.apply(variables, tokens, method="embed_tokens")
        blank = {**batch, f"{architecture}_input_tokens": jnp.zeros_like(tokens)}
        embedded = model.apply(variables, blank, token_embeddings=embeddings, method="embed")
        return (
            model.apply(variables, batch, method="hidden"),
            model.apply(variables, blank, token_embeddings=embeddings, method="hidden"),
            model.apply(variables, blank, embedded=embedded, method="hidden"),
            embedded,
        )

    own, given, entered, embedded = states(variables)
    assert embedded.shape == (*own.shape[:2], config.embedding_width)
    np.testing.assert_array_equal(own, given)
    np.testing.assert_array_equal(own, entered)


def test_a_model_that_reads_anothers_embeddings_has_none(tiny):
    config = tiny.config("encoder", "bert")
    narrow = dataclasses.replace(config, d_model=4, d_ff=8, num_heads=1)
    main, other = Transformer(config), Transformer(narrow)

    def whole(batch):
        embedder = main.bind({"params": tiny.parameters(config)})

        def run(module, embedded):
            return module.logits(module.hidden(batch, embedded=embedded), embedder.token_embedder)

        boxed = other.init(jax.random.key(0), embedder.embed(batch), method=run)
        return nn.unbox(boxed)["params"]

    batch = tiny.batch(config.architecture)
    names = traverse_util.flatten_dict(jax.eval_shape(whole, batch), sep="/")
    assert not [name for name in names if "embed" in name]
    assert names["encoder/projection/kernel"].shape == (8, 4)
    assert names["head/transform/kernel"].shape == (4, 8)
    assert names["head/bias"].shape == (32,)
