"""The networks of replaced token detection: a generator, the main network, and its heads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from t5like.models.config import ModelConfig
from t5like.models.layers import ACTIVATIONS, Dense, dot, kernel_init
from t5like.models.partitioning import named
from t5like.models.transformer import Transformer

Batch = Mapping[str, jax.Array]

# What the main network is asked -> whether it has a detection head, and its own token head.
TASKS = {
    "replaced_token_detection": (True, False),
    "masked_positions_only": (True, False),
    "replace_mlm": (False, True),
    "all_tokens_mlm": (True, True),
}


def generator_config(
    config: ModelConfig, width: float, layers: int | None = None, tied: bool = True
) -> ModelConfig:
    """A generator for the main network `config`: narrower, as deep unless `layers` is set.

    Args:
      config: the main network's.
      width: share of its D, F and heads (at least one each); heads keep their size.
      layers: None: as many as the main network's.
      tied: whether it reads the main network's embeddings, and so has their width E.
    """

    def share(size: int) -> int:
        return max(1, round(size * width))

    heads, kv_heads = share(config.num_heads), config.num_kv_heads
    return dataclasses.replace(
        config,
        num_layers=config.num_layers if layers is None else layers,
        d_model=share(config.d_model),
        d_ff=share(config.d_ff),
        num_heads=heads,
        num_kv_heads=None if kv_heads is None else math.gcd(heads, share(kv_heads)),
        embedding_size=config.embedding_width if tied else None,
        tie_embeddings=True,
        head_transform=True,
        logits_bias=True,
    )


class DetectionHead(nn.Module):
    """A dense layer and activation, then one number a token (Clark et al. 2020, section 3.1)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """States [..., D] -> logits that the token was replaced, float32 [...]."""
        config, param_dtype = self.config, jnp.dtype(self.config.param_dtype)
        x = ACTIVATIONS[config.activation](Dense(config, config.d_model, name="transform")(x))
        axes = ("embed", None)
        init = named(kernel_init(config), *axes)
        kernel = self.param("kernel", init, (config.d_model, 1), param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (1,), param_dtype)
        return (dot(x, kernel, axes, config.dtype, "float32") + bias.astype(jnp.float32))[..., 0]


class GeneratorAndDiscriminator(nn.Module):
    """The main network at `model/`, a generator at `generator/`, and `discriminator_head/`.

    Attributes:
      config, generator_config: of the two transformers.
      tied: whether they share token, position and token-type embeddings and the norm over their
        sum; the generator then also predicts with the shared token embedding.
      task: one of TASKS.
    """

    config: ModelConfig
    generator_config: ModelConfig
    tied: bool
    task: str

    def setup(self):
        self.model = Transformer(self.config)
        self.generator = Transformer(self.generator_config)
        detects, _ = TASKS[self.task]
        if detects:
            self.discriminator_head = DetectionHead(self.config)

    def __call__(self, batch: Batch, *, train: bool = False) -> dict[str, jax.Array]:
        """All outputs on one batch: the generator's "draft" logits float32 [B, L, V]; where the
        task has them "replaced" logits float32 [B, L] and "tokens" logits float32 [B, L, V]."""
        detects, predicts = TASKS[self.task]
        outputs = {"draft": self.generator_logits(self.generator_hidden(batch, train=train))}
        hidden = self.hidden(batch, train=train)
        if detects:
            outputs["replaced"] = self.replaced_logits(hidden)
        if predicts:
            outputs["tokens"] = self.logits(hidden)
        return outputs

    def generator_hidden(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """The generator's last states [B, L, its D]."""
        embedded = self.model.embed(batch) if self.tied else None
        return self.generator.hidden(batch, train=train, embedded=embedded)

    def generator_logits(self, hidden: jax.Array) -> jax.Array:
        """[..., its D] -> float32 [..., V]."""
        return self.generator.logits(hidden, self.model.token_embedder if self.tied else None)

    def hidden(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """The main network's last states [B, L, D]."""
        return self.model.hidden(batch, train=train)

    def replaced_logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [...]."""
        return self.discriminator_head(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return self.model.logits(hidden)
