"""What runs on the device: a batch of laid-out prompts is decoded, or of targets scored."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from t5like.data.layout import FLAGS
from t5like.errors import UserError
from t5like.inference.beam import beam_search
from t5like.inference.decoding import Decoded, Stop, sample
from t5like.inference.sampling import GREEDY, Sampling
from t5like.models.cache import init_cache, take_rows
from t5like.models.config import ModelConfig
from t5like.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How sequences are generated. Hashable: one compilation for each that is used.

    Attributes:
      max_new_tokens: T, the longest continuation, EOS (or what else ends it) included.
      sampling: temperature, top-k and top-p; greedy by default. Unused by a beam search.
      num_samples: samples of each prompt.
      beams: 0 samples; K > 0 searches with K beams and returns K sequences, best first.
      alpha: exponent of the beam search's length penalty.
    """

    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    num_samples: int = 1
    beams: int = 0
    alpha: float = 0.6

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("beams", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.beams and self.num_samples > 1:
            raise UserError(
                f"beams={self.beams} and num_samples={self.num_samples} exclude each other: a "
                "beam search returns its beams; set one of the two"
            )
        if self.beams and self.sampling.temperature:
            raise UserError(
                f"beams={self.beams} and temperature={self.sampling.temperature} exclude each "
                "other: a beam search does not sample; set one of the two to 0"
            )


DEFAULT = Decoding()


@functools.partial(jax.jit, static_argnames=("static", "decoding"))
def decode_batch(
    params, batch, rows, key, allowed, static, decoding: Decoding, stop: Stop | None = None
) -> Decoded:
    """Decodes a batch of prompts as `Generator._prompts` lays them out."""
    config, eos_id, pad_id = static
    model = Transformer(config)
    prompts = batch["decoder_input_tokens"]

    def apply(tokens, positions, state, **encoded):
        logits, updated = model.apply(
            {"params": params, "cache": state["cache"]},
            tokens,
            positions,
            prefix_lengths=state.get("prefix_lengths"),
            encoder_segment_ids=state.get("encoder_segment_ids"),
            **encoded,
            method="decode_step",
            mutable=["cache"],
        )
        return logits, state | updated

    slots = prompts.shape[1] + decoding.max_new_tokens
    if config.architecture == "encoder_decoder":
        features = [batch[f"encoder_{name}"] for name in ("input_tokens", "segment_ids")]
        positions = batch["encoder_positions"]
        encoded = model.apply({"params": params}, *features, positions, method="encode")
        cache = init_cache(config, prompts.shape[0], slots, encoded.shape[1])
        state = {"cache": cache, "encoder_segment_ids": batch["encoder_segment_ids"]}
        # This call keeps the cross-attention's keys and values in the cache.
        _, state = apply(prompts, jnp.zeros_like(prompts), state, encoded=encoded)
    else:
        state = {"cache": init_cache(config, prompts.shape[0], slots)}
        if FLAGS in batch:
            state["prefix_lengths"] = jnp.sum(batch[FLAGS], axis=1)

    arguments = (apply, state, prompts, jnp.sum(batch["decoder_segment_ids"] != 0, axis=1))
    shared = dict(
        max_new_tokens=decoding.max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
        allowed=allowed,
        stop=stop,
        gather=_gather,
    )
    if decoding.beams:
        return beam_search(*arguments, beams=decoding.beams, alpha=decoding.alpha, **shared)
    settings = dict(sampling=decoding.sampling, num_samples=decoding.num_samples, rows=rows)
    return sample(*arguments, key, **settings, **shared)


def _gather(state, rows: jax.Array):
    """Rows of a decoding state: the cache knows its own layout, the rest has rows first."""
    rest = {name: value[rows] for name, value in state.items() if name != "cache"}
    return rest | {"cache": take_rows(state["cache"], rows)}


@functools.partial(jax.jit, static_argnames="config")
def score_batch(params, batch, config: ModelConfig) -> jax.Array:
    """Summed log-probabilities [B] of the targets that have weight."""
    log_probs = jax.nn.log_softmax(Transformer(config).apply({"params": params}, batch), axis=-1)
    targets = batch["decoder_target_tokens"][:, :, None]
    gained = jnp.take_along_axis(log_probs, targets, axis=-1)[:, :, 0]
    return jnp.sum(gained * batch["decoder_loss_weights"], axis=1)
