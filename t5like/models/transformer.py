"""The model family: encoder, decoder and encoder-decoder as functions of a parameter tree."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import masks
from t5like.errors import UserError
from t5like.models.config import ModelConfig
from t5like.models.layers import ACTIVATIONS, Dense, Embed, Norm, dot, kernel_init
from t5like.models.partitioning import constrain, gathered, named
from t5like.models.stack import Context, Stack
from t5like.models.visibility import cross_mask, segments, self_mask

Batch = Mapping[str, jax.Array]


class Transformer(nn.Module):
    """One family for every architecture (Raffel et al. 2020, section 3.2).

    A batch holds int [B, L] features under seqio's names: `encoder_input_tokens`,
    `encoder_segment_ids`, `encoder_positions` where there is an encoder, the same for `decoder_`
    where there is a decoder, and `decoder_causal_attention` (1 at slots of a prefix that see
    each other both ways). Segment id 0 is padding. Absent segment ids mean one example a row and
    no padding; absent positions, 0..L-1; absent flags, causal. `encoder_token_types` and
    `decoder_token_types` are read where the config has token types, type 0 when absent. What each
    slot sees is in t5like/models/visibility.py.

    Parameters are a plain tree, initialised by `init_parameters`; t5like/models/axes.py names
    their axes.
    """

    config: ModelConfig

    def setup(self):
        config = self.config
        if config.vocab_size is None:
            raise UserError("ModelConfig.vocab_size is not set: bind it, or name a vocabulary")
        axes = ("vocab", "embed")
        self.token_embedder = Embed(config, config.vocab_size, config.embedding_width, axes)
        if "encoder" in config.stacks:
            self.encoder = Stack(config, "encoder")
        if "decoder" in config.stacks:
            self.decoder = Stack(config, "decoder")
        self.head = Head(config)

    def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
        """Logits, float32 [B, L, V], of the decoder, or of the encoder where it is alone."""
        return self.logits(self.hidden(batch, train=train))

    def logits(self, hidden: jax.Array, token_embedder: Embed | None = None) -> jax.Array:
        """States [..., D] as `hidden` returns them -> logits, float32 [..., V].

        Args:
          hidden: as `hidden` returns them.
          token_embedder: another model's, for a head tied to it; None: this model's own.
        """
        return self.head(hidden, self.token_embedder if token_embedder is None else token_embedder)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """int [B, L] -> token embeddings [B, L, E], without positions, types or norm."""
        return self.token_embedder(tokens)

    def embed(self, batch: Batch, *, token_embeddings: jax.Array | None = None) -> jax.Array:
        """What enters the predicting stack: [B, L, E], positions and types added, normalised.

        Args:
          batch: features, see the class.
          token_embeddings: [B, L, E] in place of the embeddings of the stack's input tokens.
        """
        stack = self._predicting
        x, positions = self._inputs(stack, batch, token_embeddings)
        return getattr(self, stack).embed(x, positions, batch.get(f"{stack}_token_types"))

    def hidden(
        self,
        batch: Batch,
        *,
        train: bool = False,
        all_layers: bool = False,
        token_embeddings: jax.Array | None = None,
        embedded: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, ...]:
        """States of the stack that predicts: the decoder, or the encoder where it is alone.

        Args:
          batch: features, see the class.
          train: whether dropout is on; needs rng collection "dropout".
          all_layers: return every layer's states.
          token_embeddings: [B, L, E] in place of the embeddings of the stack's input tokens.
          embedded: [B, L, E] as `embed` returns it, of this model or of another with the same
            E, whose embeddings are then shared: this model's own are not read, and it has none
            if it never reads them.

        Returns:
          [B, L, D], the last states, normalised; with all_layers a tuple of them: the first
          block's input, then each block's output, the last one normalised.
        """
        context = self._context(batch, train)
        states = self._run(
            self._predicting, batch, context, train, all_layers, token_embeddings, embedded
        )
        return states if all_layers else states[-1]

    def encode(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """The encoder's last states [B, L, D] of tokens, segment ids and positions [B, L]."""
        features = {"input_tokens": tokens, "segment_ids": segment_ids, "positions": positions}
        batch = {f"encoder_{name}": value for name, value in features.items()}
        return self._encode(batch, train)

    def decode_step(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        *,
        prefix_lengths: jax.Array | None = None,
        encoded: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of some tokens given a cache of those before; collection "cache" is mutable.

        Keys and values are written to the slot that equals the token's position, and a query at
        position p sees slots up to p (and all of its row's prefix, if it is in it). So rows may
        stand at different positions, and a right-padded prompt needs nothing more: the slots of
        its padding are not seen before generated tokens overwrite them.

        Args:
          tokens: int [B, T], a whole prompt or one token.
          positions: int [B, T], below the cache's max_length (what lies beyond is not written).
          prefix_lengths: int [B], of a prefix whose slots see each other both ways; the whole
            prefix must be in one call.
          encoded: [B, K, D] for an encoder-decoder. When the cache has room for them (see
            `init_cache`), its keys and values are kept, and later calls may leave it None.
          encoder_segment_ids: int [B, K]; padding, where 0, is hidden; needed in every call.

        Returns:
          float32 [B, T, V].

        Raises:
          ValueError: there is no cache.
        """
        mask = masks.Causal(q_positions=positions)
        if prefix_lengths is not None:
            mask |= masks.Prefix(prefix_lengths, q_positions=positions)
        if self.config.pattern("decoder") is not None:
            mask &= masks.Rows(self.config.pattern("decoder"), positions)
        context = Context(
            mask,
            slots=positions,
            encoded=encoded,
            cross_mask=segments(None, encoder_segment_ids),
        )
        hidden = self.decoder(self.token_embedder(tokens), positions, context)[-1]
        return self.logits(hidden)

    @property
    def _predicting(self) -> str:
        """The stack that predicts."""
        return "encoder" if self.config.architecture == "encoder" else "decoder"

    def _context(self, batch: Batch, train: bool) -> Context:
        """What the predicting stack's layers see; runs the encoder that it attends to."""
        context = Context(self._self_mask(batch, self._predicting))
        if self.config.architecture != "encoder_decoder":
            return context
        return context.replace(encoded=self._encode(batch, train), cross_mask=cross_mask(batch))

    def _encode(self, batch: Batch, train: bool) -> jax.Array:
        return self._run("encoder", batch, Context(self._self_mask(batch, "encoder")), train)[-1]

    def _self_mask(self, batch: Batch, stack: str) -> masks.Mask:
        return self_mask(batch, stack, self.config.pattern(stack))

    def _run(
        self,
        stack: str,
        batch: Batch,
        context: Context,
        train: bool,
        keep_states: bool = False,
        token_embeddings: jax.Array | None = None,
        embedded: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        module, flags = getattr(self, stack), {"train": train, "keep_states": keep_states}
        if embedded is not None:
            return module.run(embedded, _positions(batch, stack, embedded), context, **flags)
        x, positions = self._inputs(stack, batch, token_embeddings)
        return module(x, positions, context, batch.get(f"{stack}_token_types"), **flags)

    def _inputs(
        self, stack: str, batch: Batch, token_embeddings: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Token embeddings [B, L, E] of a stack and their positions [B or 1, L]."""
        x = token_embeddings
        if x is None:
            x = self.token_embedder(batch[f"{stack}_input_tokens"])
        return x, _positions(batch, stack, x)


def _positions(batch: Batch, stack: str, x: jax.Array) -> jax.Array:
    """The batch's positions int [B, L] of inputs [B, L, E]; 0..L-1 where it has none."""
    positions = batch.get(f"{stack}_positions")
    return jnp.arange(x.shape[1])[None] if positions is None else positions


class Head(nn.Module):
    """States to logits: BERT's transform where asked, the output embedding, a bias."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, token_embedder: Embed) -> jax.Array:
        """x [..., D] -> float32 [..., V]."""
        config, vocab = self.config, self.config.vocab_size
        param_dtype = jnp.dtype(config.param_dtype)
        if config.head_transform:
            width = config.embedding_width if config.tie_embeddings else config.d_model
            x = ACTIVATIONS[config.activation](Dense(config, width, name="transform")(x))
            x = Norm(config, name="norm")(x)
        if config.tie_embeddings:
            if config.scale_tied_logits:
                x *= config.embedding_width**-0.5
            logits = token_embedder.attend(x)
        else:
            shape = (x.shape[-1], vocab)
            axes = ("embed", "vocab")
            kernel = self.param("kernel", named(kernel_init(config), *axes), shape, param_dtype)
            logits = dot(x, kernel, axes, config.dtype, "float32")
        if config.logits_bias:
            zeros = named(nn.initializers.zeros_init(), "vocab")
            bias = self.param("bias", zeros, (vocab,), param_dtype).astype(jnp.float32)
            logits += gathered(bias, "vocab")
        return constrain(logits, "batch", "length", "vocab") if logits.ndim == 3 else logits


def init_parameters(config: ModelConfig, rng: jax.Array) -> dict:
    """A fresh parameter tree; `jax.eval_shape` over it costs no memory, jit makes it quick."""
    return nn.unbox(init_named(config, rng))


def init_named(config: ModelConfig, rng: jax.Array) -> dict:
    """As init_parameters, each parameter in a box with the names of its axes."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    batch = {f"{stack}_input_tokens": tokens for stack in config.stacks}
    return Transformer(config).init(rng, batch)["params"]
