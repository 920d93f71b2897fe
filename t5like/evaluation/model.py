"""A trained model as the measures see it, and its embeddings of texts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from t5like.data.examples import Aligned, Example, Seq2Seq
from t5like.data.layout import lay_out
from t5like.errors import UserError
from t5like.models.config import ModelConfig
from t5like.models.transformer import Transformer

Pooling = Literal["mean", "first", "last"]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A backbone and what it was trained to read.

    Attributes:
      config: of any architecture.
      params: the backbone's tree, as `t5like.models.transformer.Transformer` reads it.
      vocabulary: that it was trained with.
      objective: that it was trained on, bound, or None; says how text is generated, if it is.
      both_ways: on a decoder, whether a text that it is given sees itself in both directions.
    """

    config: ModelConfig
    params: Any
    vocabulary: Any
    objective: Any | None = None
    both_ways: bool = False

    def rows(self, texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
        """Texts as the model reads a whole document, cut to rows of `length` slots.

        An encoder, and a decoder whose objective reads in place, read [CLS] text [SEP], where the
        vocabulary has these, else text and EOS. An encoder-decoder's encoder reads text and EOS;
        any other decoder BOS and the text.

        Returns:
          {feature: [n, length]}, a text a row.

        Raises:
          UserError: `length` exceeds the learned positions.
        """
        self.check_length(length)
        tokens = self.vocabulary.encode_batch(list(texts))
        batch = lay_out(
            [[self._example(ids, length)] for ids in tokens],
            architecture=self.config.architecture,
            length=length,
            targets_length=1,
            bos_id=self.vocabulary.bos_id,
            pad_id=self.vocabulary.pad_id,
            sees_ahead=self.both_ways or self._in_place,
        )
        if self.config.architecture == "encoder_decoder":
            return {name: value for name, value in batch.items() if name.startswith("encoder_")}
        return batch

    def check_length(self, length: int) -> None:
        """Raises UserError if rows of `length` slots exceed the learned positions."""
        if self.config.position == "learned" and length > self.config.max_length:
            raise UserError(
                f"rows of length={length} do not fit the model's {self.config.max_length} learned "
                "positions: lower the measure's length or raise ModelConfig.max_length"
            )

    @property
    def _in_place(self) -> bool:
        return self.objective is not None and self.objective.reads_in_place

    def _example(self, ids: np.ndarray, length: int) -> Example:
        vocabulary, architecture = self.vocabulary, self.config.architecture
        if architecture == "decoder" and not self._in_place:
            text = ids[: length - 1]
            # The target that nothing is asked of makes room for BOS.
            return Seq2Seq(text, np.array([vocabulary.pad_id]), bidirectional_inputs=self.both_ways)
        first, last = None, vocabulary.eos_id
        if architecture != "encoder_decoder":
            ends = vocabulary.named_id("[CLS]"), vocabulary.named_id("[SEP]")
            first, last = (first, last) if None in ends else ends
        head = [] if first is None else [first]
        tail = [] if last is None else [last]
        text = np.concatenate([head, ids[: length - len(head) - len(tail)], tail]).astype(np.int32)
        if architecture == "encoder_decoder":
            return Seq2Seq(text, np.array([vocabulary.pad_id]))
        return Aligned(text, text, np.zeros(len(text), np.float32))

    def embed(
        self, texts: Sequence[str], *, length: int, batch_size: int, pooling: Pooling = "mean"
    ) -> np.ndarray:
        """Embeddings float32 [n, D] of n texts; see the function `embed_rows`.

        Args:
          texts: each cut to what fits `length` slots.
          length: slots a row.
          batch_size: rows at once; the last batch is filled up, so that one shape is compiled.
          pooling: over a text's slots: their mean, the first one's state or the last one's.
        """
        rows = self.rows(texts, length)
        embedded = [
            jax.device_get(embed_rows(self.params, batch, self.config, pooling))[:count]
            for batch, count in batches(rows, batch_size)
        ]
        return np.concatenate(embedded or [np.empty((0, self.config.d_model), np.float32)])


def embed(
    model: TrainedModel,
    texts: Sequence[str],
    *,
    length: int,
    batch_size: int,
    pooling: Pooling = "mean",
) -> np.ndarray:
    """As `TrainedModel.embed`."""
    return model.embed(texts, length=length, batch_size=batch_size, pooling=pooling)


def batches(
    rows: Mapping[str, np.ndarray], batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Consecutive batches of one shape, and how many rows of each are real.

    The last one is filled up by repeating the last row.
    """
    total = len(next(iter(rows.values())))
    for start in range(0, total, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), total - 1)
        yield {name: value[index] for name, value in rows.items()}, min(batch_size, total - start)


@functools.partial(jax.jit, static_argnames=("config", "pooling"))
def embed_rows(params, batch, config: ModelConfig, pooling: Pooling) -> jax.Array:
    """Embeddings float32 [B, D] of rows as `TrainedModel.rows` lays them out."""
    return pooled_states(params, batch, config, pooling)


def pooled_states(
    params: Any,
    batch: Mapping[str, jax.Array],
    config: ModelConfig,
    pooling: Pooling = "mean",
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Last states of the encoder, or of the decoder where it is alone, pooled: float32 [B, D].

    Args:
      params: the backbone's tree.
      batch: one text a row.
      pooling: see `TrainedModel.embed`.
      dropout_key: turns dropout on.
    """
    stack = "decoder" if config.architecture == "decoder" else "encoder"
    features = [batch[f"{stack}_{name}"] for name in ("input_tokens", "segment_ids", "positions")]
    train = dropout_key is not None
    run = functools.partial(
        Transformer(config).apply,
        {"params": params},
        train=train,
        rngs={"dropout": dropout_key} if train else {},
    )
    reads_all = stack == "decoder"
    states = run(batch, method="hidden") if reads_all else run(*features, method="encode")
    return pool(states.astype(jnp.float32), features[1] != 0, pooling)


def pool(states: jax.Array, present: jax.Array, pooling: Pooling) -> jax.Array:
    """states [B, L, D] over the slots where present [B, L], which are the first ones: [B, D]."""
    if pooling == "first":
        return states[:, 0]
    count = jnp.sum(present, axis=1)
    if pooling == "last":
        return jnp.take_along_axis(states, (count - 1)[:, None, None], axis=1)[:, 0]
    weights = present.astype(jnp.float32) / jnp.maximum(count, 1)[:, None]
    return jnp.einsum("bld,bl->bd", states, weights)
