"""Generation and scoring with a trained model: text in, text out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5like.data.examples import Seq2Seq
from t5like.data.layout import lay_out
from t5like.errors import UserError
from t5like.inference.batching import batches
from t5like.inference.beam import beam_search
from t5like.inference.decoding import Decoded, sample
from t5like.inference.sampling import GREEDY, Sampling
from t5like.inference.text import decode_after
from t5like.models.cache import init_cache, take_rows
from t5like.models.config import ModelConfig
from t5like.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How sequences are generated. Hashable: one compilation for each that is used.

    Attributes:
      max_new_tokens: T, the longest continuation, EOS included.
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


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated sequence.

    Attributes:
      tokens: int32 [n], without EOS.
      text: what the tokens say where they stand, a leading space included.
      log_prob: natural log-likelihood given the prompt, EOS included if it came.
      score: what a beam search ranks by; log_prob otherwise.
      ended: whether EOS came.
    """

    tokens: np.ndarray
    text: str
    log_prob: float
    score: float
    ended: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A model with a decoder, ready to generate.

    Attributes:
      config: of a decoder or an encoder-decoder.
      params: its parameter tree.
      vocabulary: that it was trained with.
      bidirectional_inputs: on a decoder, whether a prompt sees itself in both directions: as it
        was trained.
      batch_size: most prompts that are decoded at once.

    Raises:
      UserError: the model has no decoder.
    """

    config: ModelConfig
    params: Any
    vocabulary: Any
    bidirectional_inputs: bool = False
    batch_size: int = 16

    def __post_init__(self):
        if self.config.architecture == "encoder":
            raise UserError(
                "ModelConfig.architecture is 'encoder', which cannot generate or score text: "
                "load a decoder or an encoder_decoder"
            )

    def complete(
        self, prompts: Sequence[str], decoding: Decoding = Decoding(), *, seed: int = 0
    ) -> list[list[Completion]]:
        """Continues each prompt; prompt + text reads as one.

        A decoder goes on in the prompt's own row; an encoder-decoder reads the prompt, with EOS
        after it, in its encoder, as T5's prefix language model is trained.

        Args:
          prompts: n texts, possibly empty.
          decoding: how.
          seed: of samples; sample k of prompt i depends on (seed, i, k) alone.

        Returns:
          for each prompt its samples, or its beams with the best first.
        """
        contexts = self.vocabulary.encode_batch(list(prompts))
        results = self.generate([self._input(ids) for ids in contexts], decoding, seed=seed)
        return [
            [
                dataclasses.replace(c, text=decode_after(self.vocabulary, context, c.tokens))
                for c in completions
            ]
            for context, completions in zip(contexts, results, strict=True)
        ]

    def generate(
        self, inputs: Sequence[np.ndarray], decoding: Decoding = Decoding(), *, seed: int = 0
    ) -> list[list[Completion]]:
        """As `complete`, from token ids [n] exactly as given (no EOS is added)."""
        for ids in inputs:
            self._check_room(len(ids), decoding.max_new_tokens)
        results: list[list[Completion]] = [[] for _ in inputs]
        key = jax.random.key(seed)
        for (width,), rows, count in batches([len(i) + 1 for i in inputs], self.batch_size):
            batch = self._prompts([inputs[row] for row in rows], width)
            decoded = jax.device_get(
                _decode(self.params, batch, rows, key, self._allowed, self._static, decoding)
            )
            for place, row in enumerate(rows[:count]):
                results[row] = self._completions(decoded, place)
        return results

    def score(
        self, inputs: Sequence[str], targets: Sequence[str], *, end: bool = True
    ) -> np.ndarray:
        """Log-likelihoods, float32 [n], of targets given inputs.

        Args:
          inputs: n texts, possibly empty on a decoder.
          targets: n texts; on a decoder they go on from the inputs.
          end: whether EOS after the targets counts.
        """
        encode = self.vocabulary.encode_batch
        return self.score_tokens(
            [self._input(ids) for ids in encode(list(inputs))],
            [self._ended(ids) if end else ids for ids in encode(list(targets))],
        )

    def score_tokens(
        self, inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]
    ) -> np.ndarray:
        """As `score`, from token ids exactly as given."""
        one_row = self.config.architecture == "decoder"
        lengths = [
            (len(i) + len(t),) if one_row else (len(i), len(t))
            for i, t in zip(inputs, targets, strict=True)
        ]
        scores = np.zeros(len(lengths), np.float32)
        for (length, *rest), rows, count in batches(lengths, self.batch_size):
            pairs = [(inputs[row], targets[row]) for row in rows]
            batch = self._rows(pairs, length, rest[0] if rest else None)
            scores[rows[:count]] = jax.device_get(_score(self.params, batch, self.config))[:count]
        return scores

    # --- parts ---

    def _input(self, ids: np.ndarray) -> np.ndarray:
        """What the objectives make of a text that is to be continued."""
        return self._ended(ids) if self.config.architecture == "encoder_decoder" else ids

    def _ended(self, ids: np.ndarray) -> np.ndarray:
        """ids with EOS, if the vocabulary has one."""
        eos = self.vocabulary.eos_id
        return ids if eos is None else np.append(ids, np.int32(eos))

    def _check_room(self, length: int, max_new_tokens: int) -> None:
        """Learned positions end somewhere; all others go on."""
        needed = max_new_tokens
        if self.config.architecture == "decoder":
            needed += length
        needed = max(needed, length)
        if self.config.position == "learned" and needed > self.config.max_length:
            raise UserError(
                f"a prompt of {length} tokens and max_new_tokens={max_new_tokens} do not fit the "
                f"model's {self.config.max_length} learned positions: shorten one of them"
            )

    def _rows(self, pairs, length: int, targets_length: int | None) -> dict[str, np.ndarray]:
        """One (inputs, targets) pair a row, laid out as for training."""
        return lay_out(
            [[Seq2Seq(i, t, bidirectional_inputs=self.bidirectional_inputs)] for i, t in pairs],
            architecture=self.config.architecture,
            length=length,
            targets_length=targets_length,
            bos_id=self.vocabulary.bos_id,
            pad_id=self.vocabulary.pad_id,
        )

    def _prompts(self, inputs: Sequence[np.ndarray], width: int) -> dict[str, np.ndarray]:
        """What the model reads before the first token is asked for: a target not yet known."""
        unknown = np.array([self.vocabulary.pad_id], np.int32)
        return self._rows([(ids, unknown) for ids in inputs], width, 1)

    @functools.cached_property
    def _allowed(self) -> np.ndarray:
        """bool [V]: all but rows without a token, padding and BOS."""
        allowed = np.zeros(self.config.vocab_size, bool)
        allowed[: self.vocabulary.size] = True
        allowed[[self.vocabulary.pad_id, self.vocabulary.bos_id]] = False
        if self.vocabulary.eos_id is not None:
            allowed[self.vocabulary.eos_id] = True
        return allowed

    @property
    def _static(self) -> tuple[ModelConfig, int | None, int]:
        return self.config, self.vocabulary.eos_id, self.vocabulary.pad_id

    def _completions(self, decoded: Decoded, place: int) -> list[Completion]:
        """The sequences of one row, without places that a beam search could not fill."""
        completions = []
        for tokens, length, log_prob, score in zip(*(x[place] for x in decoded), strict=True):
            if not np.isfinite(score):
                continue
            tokens = tokens[:length]
            ended = bool(length) and tokens[-1] == self.vocabulary.eos_id
            tokens = tokens[:-1] if ended else tokens
            text = self.vocabulary.decode(tokens)
            completions.append(
                Completion(tokens, text, float(log_prob), float(score), bool(ended))
            )
        return completions


@functools.partial(jax.jit, static_argnames=("static", "decoding"))
def _decode(params, batch, rows, key, allowed, static, decoding: Decoding) -> Decoded:
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
        prefix_lengths = jnp.sum(batch["decoder_causal_attention"], axis=1)
        cache = init_cache(config, prompts.shape[0], slots)
        state = {"cache": cache, "prefix_lengths": prefix_lengths}

    arguments = (apply, state, prompts, jnp.sum(batch["decoder_segment_ids"] != 0, axis=1))
    shared = dict(
        max_new_tokens=decoding.max_new_tokens,
        eos_id=eos_id,
        pad_id=pad_id,
        allowed=allowed,
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
def _score(params, batch, config: ModelConfig) -> jax.Array:
    """Summed log-probabilities [B] of the targets that have weight."""
    log_probs = jax.nn.log_softmax(Transformer(config).apply({"params": params}, batch), axis=-1)
    targets = batch["decoder_target_tokens"][:, :, None]
    gained = jnp.take_along_axis(log_probs, targets, axis=-1)[:, :, 0]
    return jnp.sum(gained * batch["decoder_loss_weights"], axis=1)
