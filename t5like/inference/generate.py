"""Generation and scoring with a trained model: text in, text out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from t5like.data.examples import Seq2Seq
from t5like.data.layout import lay_out
from t5like.errors import UserError
from t5like.inference.batching import batches
from t5like.inference.compiled import DEFAULT, Decoding, decode_batch, score_batch
from t5like.inference.decoding import Decoded, Stop
from t5like.inference.text import decode_after
from t5like.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated sequence.

    Attributes:
      tokens: int32 [n], without EOS or what else ended it.
      text: what the tokens say where they stand, a leading space included.
      log_prob: natural log-likelihood given the prompt, its end included if it came.
      score: what a beam search ranks by; log_prob otherwise.
      ended: whether EOS came, or the stop that was asked for.
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
        self, prompts: Sequence[str], decoding: Decoding = DEFAULT, *, seed: int = 0
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
        self,
        inputs: Sequence[np.ndarray],
        decoding: Decoding = DEFAULT,
        *,
        seed: int = 0,
        stop: Stop | None = None,
    ) -> list[list[Completion]]:
        """As `complete`, from token ids [n] exactly as given (no EOS is added).

        Args:
          stop: what ends a sequence besides EOS, with a count for each of the inputs.
        """
        if stop is not None and stop.token == self.vocabulary.eos_id:
            stop = None
        for ids in inputs:
            self._check_room(len(ids), decoding.max_new_tokens)
        results: list[list[Completion]] = [[] for _ in inputs]
        key = jax.random.key(seed)
        for (width,), rows, count in batches([len(i) + 1 for i in inputs], self.batch_size):
            batch = self._prompts([inputs[row] for row in rows], width)
            ends = None if stop is None else Stop(np.int32(stop.token), stop.counts[rows])
            decoded = jax.device_get(
                decode_batch(
                    self.params, batch, rows, key, self._allowed, self._static, decoding, ends
                )
            )
            for place, row in enumerate(rows[:count]):
                last = None if stop is None else (stop.token, int(stop.counts[row]))
                results[row] = self._completions(decoded, place, last)
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
            scores[rows[:count]] = jax.device_get(score_batch(self.params, batch, self.config))[
                :count
            ]
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
            sees_ahead=self.bidirectional_inputs,
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

    def _completions(
        self, decoded: Decoded, place: int, stop: tuple[int, int] | None
    ) -> list[Completion]:
        """The sequences of one row, without places that a beam search could not fill.

        Args:
          stop: (token, count) that ends the row besides EOS.
        """
        completions = []
        for tokens, length, log_prob, score in zip(*(x[place] for x in decoded), strict=True):
            if not np.isfinite(score):
                continue
            tokens = tokens[:length]
            ended = bool(length) and (
                tokens[-1] == self.vocabulary.eos_id
                or (stop is not None and (tokens == stop[0]).sum() == stop[1])
            )
            tokens = tokens[:-1] if ended else tokens
            text = self.vocabulary.decode(tokens)
            completions.append(Completion(tokens, text, float(log_prob), float(score), bool(ended)))
        return completions
