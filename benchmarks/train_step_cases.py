"""What benchmarks/train_step.py races on: models, objectives and batches by name, and our step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from objectives.base import Objective, Setting
from objectives.causal_lm import CausalLM
from objectives.electra import Electra
from objectives.mlm import MaskedLM
from objectives.span_corruption import SpanCorruption
from t5like.models.config import ModelConfig
from t5like.training import state as state_lib, step as step_lib
from t5like.training.optimizers import AdamW

# Clipping is off on all sides; our step still computes the norms that it reports.
OPTIMIZER = AdamW(learning_rate=1e-3, weight_decay=0.1, clip_norm=None)
MASK = 3  # an id that stands for [MASK]

T5 = ModelConfig(
    architecture="encoder_decoder", vocab_size=32_128, num_layers=4, d_model=256, d_ff=1024,
    num_heads=4, head_dim=64, scale_attention=False,
)  # fmt: skip
BERT = ModelConfig(
    architecture="encoder", vocab_size=30_522, num_layers=8, d_model=256, d_ff=1024, num_heads=4,
    head_dim=64, token_types=2, embedding_norm=True, position="learned", norm="layernorm",
    norm_position="post", norm_epsilon=1e-12, activation="gelu_exact", gated_mlp=False,
    use_bias=True, tie_embeddings=True, scale_tied_logits=False, head_transform=True,
    logits_bias=True, initializer="normal",
)  # fmt: skip
LLAMA = ModelConfig(
    architecture="decoder", vocab_size=32_000, num_layers=8, d_model=256, d_ff=704, num_heads=4,
    num_kv_heads=2, head_dim=64, position="rope", norm_epsilon=1e-5, activation="silu",
    initializer="normal",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what trains it, and the shape of a batch.

    Attributes:
      name: of the peers' family too.
      objective: its losses are timed; what it does on the host is not.
      rows, length: B and L of a batch; `targets` is the decoder's of an encoder-decoder.
    """

    name: str
    config: ModelConfig
    objective: Objective
    rows: int = 8
    length: int = 256
    targets: int | None = None

    @property
    def tokens(self) -> int:
        """Of a batch, inputs and targets."""
        return self.rows * (self.length + (self.targets or 0))

    @property
    def bound(self) -> Objective:
        setting = Setting(self.config.architecture, None, self.length, self.targets)
        return dataclasses.replace(self.objective, setting=setting)

    def batch(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random tokens as layout gives them, every slot filled."""
        rng = np.random.default_rng(seed)

        def tokens(length: int) -> np.ndarray:
            return rng.integers(4, self.config.vocab_size, (self.rows, length), np.int32)

        if self.config.architecture == "encoder":
            text = tokens(self.length)
            chosen = rng.random(text.shape).argsort(1) < round(0.15 * self.length)
            return {
                "encoder_input_tokens": np.where(chosen, MASK, text).astype(np.int32),
                "encoder_target_tokens": text,
                "encoder_loss_weights": chosen.astype(np.float32),
            }
        features = {} if self.targets is None else {"encoder_input_tokens": tokens(self.length)}
        text = tokens(self.targets or self.length)
        inputs = np.zeros_like(text)
        inputs[:, 1:] = text[:, :-1]
        return features | {
            "decoder_input_tokens": inputs,
            "decoder_target_tokens": text,
            "decoder_loss_weights": np.ones(text.shape, np.float32),
        }


CASES = {
    case.name: case
    for case in (
        Case("T5", T5, SpanCorruption(z_loss=0.0), length=256, targets=64),
        Case("BERT", BERT, MaskedLM()),
        Case("ELECTRA", dataclasses.replace(BERT, embedding_size=128), Electra()),
        Case("Llama", LLAMA, CausalLM(z_loss=0.0)),
    )
}


@dataclasses.dataclass
class Ours:
    """Our network and its step, as a run compiles it.

    Attributes:
      config: the model's.
      state: donated to each step and replaced by it.
      update: (state, batch, key) -> (state, metrics).
      loss: (params, batch, key) -> the total loss of a batch.
    """

    config: ModelConfig
    state: state_lib.TrainState
    update: Callable
    loss: Callable

    def step(self, batch: dict[str, jax.Array], key: jax.Array) -> step_lib.StepMetrics:
        self.state, metrics = self.update(self.state, batch, key)
        return metrics


def ours(case: Case, objective: Objective | None = None, params: Any = None) -> Ours:
    """Our contender.

    Args:
      objective: another than the case's, of the same parameters.
      params: to start from; None: fresh ones.
    """
    objective = case.bound if objective is None else objective
    network = objective.network(case.config)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in case.batch().items()}

    def init(key: jax.Array) -> state_lib.TrainState:
        fresh = nn.unbox(network.init(key, jax.tree.map(_first_row, batch)))["params"]
        return state_lib.create(fresh if params is None else params, transform)

    def loss_fn(params, frozen, batch, key, train):
        return objective.losses(network.apply, params, frozen, batch, key, train)

    transform = OPTIMIZER.build(1000)
    return Ours(
        config=case.config,
        state=jax.jit(init)(step_lib.run_key(0, step_lib.INIT_STREAM)),
        update=step_lib.make_train_step(loss_fn, transform, OPTIMIZER.schedule(1000)),
        loss=jax.jit(lambda p, b, k: step_lib.total_loss(loss_fn(p, None, b, k, False))),
    )


def _first_row(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.numpy.zeros((1, *x.shape[1:]), x.dtype)
