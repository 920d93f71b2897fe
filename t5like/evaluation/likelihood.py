"""Bits per byte of held-out middles and continuations, for models that can say them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from t5like.data.examples import Example, Seq2Seq
from t5like.data.layout import lay_out
from t5like.data.sources.base import Source
from t5like.errors import UserError
from t5like.evaluation import metrics, pieces
from t5like.evaluation.model import TrainedModel, batches
from t5like.evaluation.pieces import Piece
from t5like.inference.compiled import score_batch
from t5like.inference.text import encode_after

Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]
# What a format puts around a text, mode tokens, separators and ends, fits beside it.
_ROOM_FOR_MARKS = 8


@dataclasses.dataclass(frozen=True)
class _BitsPerByte:
    """Fields and figures of both measures; see Infilling."""

    source: Source
    pieces: int = 128
    characters: int = 128
    length: int = 64
    batch_size: int = 32
    documents: int = 1000
    draw: int = 0

    higher_is_better: ClassVar[dict[str, bool]] = {"bits_per_byte": False}

    def measure(self, model: TrainedModel, seed: int) -> dict[str, float]:
        """{"bits_per_byte"}, or {} for a model that was not trained to do this.

        The seed is not used: the pieces are the same for all models and seeds.

        Raises:
          UserError: no piece of the source fits a row.
        """
        del seed
        ask = self._asker(model)
        if ask is None:
            return {}
        chosen = self._chosen(model.vocabulary)
        rows = self._rows(model, [ask(tokens) for _, tokens in chosen])
        log_likelihood = sum(
            float(np.sum(jax.device_get(score_batch(model.params, batch, model.config))[:count]))
            for batch, count in batches(rows, self.batch_size)
        )
        text_bytes = sum(piece.hidden_bytes for piece, _ in chosen)
        return {"bits_per_byte": metrics.bits_per_byte(log_likelihood, text_bytes)}

    def _asker(self, model: TrainedModel) -> Callable[[Tokens], Example] | None:
        """What makes the example that asks for a piece's hidden part; None: nothing does."""
        raise NotImplementedError

    def _hide(self, text: str) -> Piece | None:
        raise NotImplementedError

    def _counted(self, batch: dict[str, np.ndarray], eos_id: int | None) -> np.ndarray:
        """Weights [B, L] of the tokens whose bits count."""
        raise NotImplementedError

    def _chosen(self, vocabulary: Any) -> list[tuple[Piece, Tokens]]:
        """The pieces and their tokens: the first of those that fit a row in every format."""
        chosen = []
        for text in pieces.texts(self.source, self.characters, self.documents, self.draw):
            piece = self._hide(text)
            if piece is None:
                continue
            tokens = (
                encode_after(vocabulary, piece.before, start=True),
                encode_after(vocabulary, piece.hidden, start=False),
                encode_after(vocabulary, piece.after, start=False),
            )
            if sum(map(len, tokens)) + _ROOM_FOR_MARKS <= self.length:
                chosen.append((piece, tokens))
            if len(chosen) == self.pieces:
                break
        if not chosen:
            name = type(self).__name__
            raise UserError(
                f"no piece of {self.source} of up to {self.characters} characters fits a row of "
                f"{self.length} tokens: lower {name}.characters or raise {name}.length"
            )
        return chosen

    def _rows(self, model: TrainedModel, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        model.check_length(self.length)
        batch = lay_out(
            [[example] for example in examples],
            architecture=model.config.architecture,
            length=self.length,
            targets_length=self.length,
            bos_id=model.vocabulary.bos_id,
            pad_id=model.vocabulary.pad_id,
            sees_ahead=model.objective.sees_ahead,
        )
        weights = self._counted(batch, model.vocabulary.eos_id)
        return batch | {"decoder_loss_weights": weights}


@dataclasses.dataclass(frozen=True)
class Infilling(_BitsPerByte):
    """Bits per byte of the hidden middle of held-out texts, in the model's own infill format.

    All that the model must say is paid for, the marks of its format included (where a middle ends
    is a part of the answer); what is divided by is the middle's bytes alone. Comparable between
    models of one vocabulary: middles are chosen in the text, before it is tokenised, and a piece
    that would not fit a row in one format is left out for all.

    Attributes:
      source: held-out documents.
      pieces: how many.
      characters: of a piece, at most.
      length: slots of a row (of each of the two, on an encoder-decoder).
      batch_size: pieces scored at once.
      documents: how many of the source's documents are read, from the first.
      draw: of pieces and middles: another number, other ones.
      hidden: characters of a middle, rounded up to whole words.
    """

    hidden: int = 24

    def _asker(self, model: TrainedModel) -> Callable[[Tokens], Example] | None:
        known = model.objective.infilling() if _generates(model) else None
        if known is None:
            return None
        return lambda tokens: Seq2Seq(
            known.prompt([tokens[0], tokens[2]]),
            known.answer([tokens[1]]),
            bidirectional_inputs=known.bidirectional_inputs,
        )

    def _hide(self, text: str) -> Piece | None:
        return pieces.hide_middle(text, self.hidden, self.draw)

    def _counted(self, batch: dict[str, np.ndarray], eos_id: int | None) -> np.ndarray:
        return batch["decoder_loss_weights"]


@dataclasses.dataclass(frozen=True)
class Continuation(_BitsPerByte):
    """Bits per byte of the second part of held-out texts, given the first.

    The end-of-sequence token after it is not counted: the pieces end in the middle of a document,
    where some objectives are trained to say it and others are not.

    Attributes:
      source, pieces, characters, length, batch_size, documents, draw: see Infilling.
      share: of a piece that is to be said, about.
    """

    share: float = 0.5

    def _asker(self, model: TrainedModel) -> Callable[[Tokens], Example] | None:
        some = np.array([model.vocabulary.pad_id], np.int32)
        if not _generates(model) or model.objective.continuation(some, some) is None:
            return None
        return lambda tokens: model.objective.continuation(tokens[0], tokens[1])

    def _hide(self, text: str) -> Piece | None:
        return pieces.hide_end(text, self.share)

    def _counted(self, batch: dict[str, np.ndarray], eos_id: int | None) -> np.ndarray:
        return without_last_eos(
            batch["decoder_loss_weights"], batch["decoder_target_tokens"], eos_id
        )


def without_last_eos(weights: np.ndarray, targets: np.ndarray, eos_id: int | None) -> np.ndarray:
    """Weights [B, L] with each row's last asked target set to 0 if that is EOS."""
    slots = np.arange(weights.shape[1])
    last = slots == np.max(np.where(weights > 0, slots, -1), axis=1, keepdims=True)
    return np.where(last & (targets == eos_id), np.float32(0), weights)


def _generates(model: TrainedModel) -> bool:
    return model.objective is not None and model.config.architecture != "encoder"
