"""A stack of blocks: the one body of encoder and decoder."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax

from kernels import RelativeBias, masks
from t5like.models.attention import Attention
from t5like.models.config import ModelConfig
from t5like.models.layers import Dense, Dropout, Embed, Mlp, Norm
from t5like.models.partitioning import constrain
from t5like.models.positions import (
    RelativePositionBias,
    Rotation,
    rope_rotation,
    sinusoids,
)

# What the forward kernel of attention leaves for the backward one: without them it runs again.
_ATTENTION = ("attention_output", "attention_lse")


def remat_policy(config: ModelConfig):
    """What the backward pass finds kept of a block; see ModelConfig.remat."""
    if config.remat == "full":
        return None
    policies = jax.checkpoint_policies
    if config.remat == "names":
        return policies.save_only_these_names(*config.remat_names)
    return policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(*_ATTENTION)
    )


@flax.struct.dataclass
class Context:
    """What every layer of a stack is given beside its input.

    Attributes:
      mask: of self-attention.
      q_positions: int [B, Q] where the relative bias needs explicit positions, else None.
      kv_positions: int [B, K] likewise.
      bias: the stack's shared relative bias, or None.
      rotation: RoPE's, or None.
      slots: int [B, T], where a decoding step writes into the cache; None outside decoding.
      encoded: [B, K, D] for cross-attention, or None (no cross-attention, or cached).
      cross_mask: of cross-attention.
    """

    mask: masks.Mask
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None
    bias: RelativeBias | None = None
    rotation: Rotation | None = None
    slots: jax.Array | None = None
    encoded: jax.Array | None = None
    cross_mask: masks.Mask | None = None


class Block(nn.Module):
    """Self-attention, cross-attention where `cross`, and an MLP, each with norm and residual."""

    config: ModelConfig
    train: bool
    cross: bool
    bidirectional: bool
    keep_states: bool

    @nn.compact
    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
        """x [B, L, D] -> the same, and once more as a state to keep (the form nn.scan wants)."""
        bias = context.bias
        if self.config.position == "relative" and self.config.relative_per_layer:
            relative = RelativePositionBias(self.config, self.bidirectional, name="relative_bias")
            bias = relative(context.q_positions, context.kv_positions)

        def self_attention(y: jax.Array) -> jax.Array:
            attend = Attention(self.config, self.train, name="self_attention")
            rotation, slots = context.rotation, context.slots
            return attend(y, y, context.mask, bias=bias, rotation=rotation, slots=slots)

        def cross_attention(y: jax.Array) -> jax.Array:
            attend = Attention(self.config, self.train, name="cross_attention")
            return attend(y, context.encoded, context.cross_mask)

        x = self._sublayer(x, self_attention, "self_attention_norm")
        if self.cross:
            x = self._sublayer(x, cross_attention, "cross_attention_norm")
        x = self._sublayer(x, Mlp(self.config, self.train, name="mlp"), "mlp_norm")
        return x, (x if self.keep_states else None)

    def _sublayer(self, x: jax.Array, function, norm_name: str) -> jax.Array:
        norm = Norm(self.config, name=norm_name)
        dropout = Dropout(self.config, self.train)
        if self.config.norm_position == "pre":
            x = x + dropout(function(norm(x)))
        else:
            x = norm(x + dropout(function(x)))
        return constrain(x, "batch", "length", "width")


class Stack(nn.Module):
    """Embeddings in, hidden states out.

    Attributes:
      stack: "encoder" or "decoder".
    """

    config: ModelConfig
    stack: str

    def setup(self):
        config, width = self.config, self.config.embedding_width
        if config.position == "learned":
            self.position_embedder = Embed(config, config.max_length, width)
        if config.token_types:
            self.token_type_embedder = Embed(config, config.token_types, width)
        if config.embedding_norm:
            self.embedding_norm = Norm(config)
        if width != config.d_model:
            self.projection = Dense(config, config.d_model, (None, "embed"))

    def __call__(
        self,
        embedded: jax.Array,
        positions: jax.Array,
        context: Context,
        token_types: jax.Array | None = None,
        *,
        train: bool = False,
        keep_states: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Runs the stack on token embeddings [B, L, E]: `embed`, then `run`."""
        x = self.embed(embedded, positions, token_types)
        return self.run(x, positions, context, train=train, keep_states=keep_states)

    def embed(
        self, x: jax.Array, positions: jax.Array, token_types: jax.Array | None = None
    ) -> jax.Array:
        """Token embeddings with positions and token types added, and normalised.

        Args:
          x: [B, L, E] token embeddings.
          positions: int [B or 1, L].
          token_types: int [B, L]; None means type 0.

        Returns:
          [B, L, E], what this stack's `run` takes, or that of another with the same E: two
          stacks that share their embeddings share this.
        """
        config = self.config
        if config.position == "learned":
            x += self.position_embedder(positions)
        elif config.position == "sinusoidal":
            x += sinusoids(positions, config.embedding_width).astype(x.dtype)
        if config.token_types:
            x += self.token_type_embedder(positions * 0 if token_types is None else token_types)
        return self.embedding_norm(x) if config.embedding_norm else x

    @nn.compact
    def run(
        self,
        x: jax.Array,
        positions: jax.Array,
        context: Context,
        *,
        train: bool = False,
        keep_states: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Runs the stack on what `embed` returns, its own or another stack's.

        Args:
          x: [B, L, E].
          positions: int [B or 1, L].
          context: mask, cross-attention inputs and decoding slots; the rest is filled in here.
          train: whether dropout is on.
          keep_states: return every layer's states instead of the last alone.

        Returns:
          [B, L, D] each: the last states; or with keep_states the blocks' input and then each
          block's output. The last has the final norm applied either way.
        """
        config = self.config
        x = Dropout(config, train)(x)
        if config.embedding_width != config.d_model:
            x = self.projection(x)
        context = self._positioned(context, positions)
        x, states = self._blocks(x, context, train, keep_states)
        if config.norm_position == "pre":
            x = Dropout(config, train)(Norm(config, name="final_norm")(x))
        return (*states[:-1], x) if keep_states else (x,)

    @property
    def _bidirectional(self) -> bool:
        choice = self.config.relative_bidirectional
        return self.stack == "encoder" if choice is None else choice

    def _positioned(self, context: Context, positions: jax.Array) -> Context:
        """Fills in the relative bias or RoPE's rotation, once for all layers."""
        config = self.config
        if config.position == "rope":
            rotation = rope_rotation(positions, config.head_dim, config.rope_base)
            return context.replace(rotation=rotation)
        if config.position != "relative":
            return context
        if context.slots is not None:
            context = context.replace(q_positions=context.slots)
        elif config.relative_from == "positions":
            context = context.replace(q_positions=positions, kv_positions=positions)
        if config.relative_per_layer:
            return context
        relative = RelativePositionBias(config, self._bidirectional, name="relative_bias")
        return context.replace(bias=relative(context.q_positions, context.kv_positions))

    def _blocks(
        self, x: jax.Array, context: Context, train: bool, keep_states: bool
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """All blocks, scanned or unrolled; states are (x, block 1's output, ...) or empty."""
        config, depth = self.config, self.config.stacks[self.stack]
        cross = self.stack == "decoder" and config.architecture == "encoder_decoder"
        arguments = (config, train, cross, self._bidirectional, keep_states)
        block = Block
        if config.remat != "none":
            policy = remat_policy(config)
            block = nn.remat(Block, policy=policy, prevent_cse=not config.scan_layers)
        if config.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0, "cache": 0},
                split_rngs={"params": True, "dropout": True},
                metadata_params={nn.PARTITION_NAME: "layers"},
                in_axes=nn.broadcast,
                length=depth,
            )
            last, stacked = scanned(*arguments, name="layers")(x, context)
            return last, (x, *stacked) if keep_states else ()
        states = [x]
        for layer in range(depth):
            x, _ = block(*arguments, name=f"layers_{layer}")(x, context)
            states.append(x)
        return x, tuple(states) if keep_states else ()
