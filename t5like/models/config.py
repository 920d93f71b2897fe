"""ModelConfig: one frozen description for encoder, decoder and encoder-decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax

from kernels.masks import BigBird, Mask
from t5like.errors import UserError

Architecture = Literal["encoder", "decoder", "encoder_decoder"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and choices of a transformer; every architecture is built from the same layers.

    Attributes:
      architecture: which stacks there are.
      vocab_size: rows of the embedding V; None is filled in from the vocabulary (rounded up to
        a multiple of `vocab_multiple`).
      vocab_multiple: see vocab_size; a multiple of 128 suits accelerators.
      num_layers: layers of the encoder, or of the one stack.
      num_decoder_layers: layers of an encoder-decoder's decoder; None means `num_layers`.
      d_model, d_ff, num_heads, head_dim: D, F, H, Dh.
      num_kv_heads: N, a divisor of H; None means H. 1 is multi-query attention (Shazeer 2019),
        between 1 and H grouped-query (Ainslie et al. 2023).
      embedding_size: E, width of the token, position and token-type embeddings; None means D.
        Another size adds a projection from E to D (ELECTRA small, Clark et al. 2020).
      token_types: rows of a token-type embedding; 0 for none (BERT: 2).
      embedding_norm: whether the sum of the embeddings is normalised (BERT).
      position: "relative" is T5's bucketed bias, "rope" rotates queries and keys (Su et al.
        2021), "learned" and "sinusoidal" are absolute and added to the embeddings.
      relative_buckets, relative_max_distance: see kernels.relative_position_bucket.
      relative_per_layer: a bias table in each layer instead of one for the stack.
      relative_bidirectional: whether keys after a query have buckets of their own; None means
        in an encoder, not in a decoder (T5).
      relative_from: "slots" takes distances between slots, which is exact as long as positions
        are contiguous within a segment, and cheap; "positions" reads the batch's positions.
      rope_base: base of RoPE's frequencies.
      max_length: rows of a learned position embedding.
      norm, norm_epsilon: RMSNorm (Zhang and Sennrich 2019) or LayerNorm.
      norm_position: "pre" normalises each sublayer's input and the last output, "post" each
        sum of sublayer and residual (BERT).
      activation: "gelu" is the tanh approximation, "gelu_exact" the error function.
      gated_mlp: activation(x W0) * (x W1) instead of activation(x W) (Shazeer 2020).
      use_bias: biases in dense layers and in LayerNorm.
      tie_embeddings: the output embedding is the token embedding.
      scale_tied_logits: tied logits are multiplied by E ** -0.5 (T5 1.0).
      head_transform: a dense layer (D to E), activation and norm before the logits (BERT).
      logits_bias: a bias on the logits (BERT).
      scale_attention: multiply attention logits by Dh ** -0.5. False puts the factor into the
        initial query kernel instead (T5).
      initializer: "fan_in" draws kernels with variance 1 / fan-in and embeddings with 1 (T5);
        "normal" draws all with `initializer_stddev` (BERT, GPT-2).
      dropout_rate: on embeddings, attention weights, inside MLPs and after each sublayer, drawn
        once for all positions of an example (T5).
      dtype: of computation; norms' statistics, softmax and logits stay float32.
      param_dtype: of parameters.
      scan_layers: stack the layers' parameters on a leading axis and scan: compile time no
        longer grows with depth.
      remat: what the backward pass recomputes: nothing, whole layers ("full"), all but the
        outputs of matrix products with weights and of attention ("dots"), or all but what
        `remat_names` lists ("names").
      remat_names: of what a layer computes, what remat = "names" keeps; see REMAT_NAMES.
      attention_pattern: a mask that further limits self-attention, in the encoder or in the one
        stack, such as BigBird() or Or(SlidingWindow(512, 512), GlobalTokens(1)); blocks in which
        it shows nothing cost nothing. It speaks of slots; the first tokens of GlobalTokens and
        AShape are those of each example of a packed row, but BigBird's blocks are the row's. A
        decoder's random blocks want BigBird(causal=True). None: no limit.
      decoder_attention_pattern: the same for the decoder of an encoder-decoder.
      attention_backend: see kernels.attention; None chooses.
    """

    architecture: Architecture = "encoder_decoder"
    vocab_size: int | None = None
    vocab_multiple: int = 128
    num_layers: int = 2
    num_decoder_layers: int | None = None
    d_model: int = 128
    d_ff: int = 512
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int = 32
    embedding_size: int | None = None
    token_types: int = 0
    embedding_norm: bool = False
    position: Literal["relative", "rope", "learned", "sinusoidal", "none"] = "relative"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_per_layer: bool = False
    relative_bidirectional: bool | None = None
    relative_from: Literal["slots", "positions"] = "slots"
    rope_base: float = 10_000.0
    max_length: int = 512
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-6
    activation: Literal["gelu", "gelu_exact", "silu", "relu"] = "gelu"
    gated_mlp: bool = True
    use_bias: bool = False
    tie_embeddings: bool = False
    scale_tied_logits: bool = True
    head_transform: bool = False
    logits_bias: bool = False
    scale_attention: bool = True
    initializer: Literal["fan_in", "normal"] = "fan_in"
    initializer_stddev: float = 0.02
    dropout_rate: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = False
    remat: Literal["none", "full", "dots", "names"] = "none"
    remat_names: Sequence[str] = ()
    attention_pattern: Mask | None = None
    decoder_attention_pattern: Mask | None = None
    attention_backend: str | None = None

    def __post_init__(self):
        for name in ("architecture", *_CHOICES):
            value, allowed = getattr(self, name), _CHOICES.get(name, _ARCHITECTURES)
            if value not in allowed:
                raise UserError(
                    f"ModelConfig.{name} = {value!r} is unknown: choose one of {', '.join(allowed)}"
                )
        for name in (
            "num_layers", "d_model", "d_ff", "num_heads", "head_dim", "num_kv_heads",
            "num_decoder_layers", "relative_buckets", "max_length", "vocab_multiple",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"ModelConfig.{name} = {value} must be at least 1")
        self._check_remat_names()
        for name in ("attention_pattern", "decoder_attention_pattern"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, Mask)):
                raise UserError(
                    f"ModelConfig.{name} = {value!r} is no mask: bind one, as in @BigBird()"
                )
            if jax.tree.leaves(value):
                raise UserError(
                    f"ModelConfig.{name} holds arrays, and those are one batch's: bind masks of "
                    f"numbers alone, such as SlidingWindow, GlobalTokens(count), BigBird"
                )
        if self.decoder_attention_pattern is not None and self.architecture != "encoder_decoder":
            raise UserError(
                f"ModelConfig.decoder_attention_pattern is for an encoder-decoder: of an "
                f"architecture {self.architecture!r} set attention_pattern"
            )
        name = (
            "decoder_attention_pattern"
            if self.architecture == "encoder_decoder"
            else "attention_pattern"
        )
        if "decoder" in self.stacks and _changes_with_length(self.pattern("decoder")):
            raise UserError(
                f"ModelConfig.{name}: a decoder's BigBird draws its random blocks anew at each "
                f"length; set BigBird.causal = True or BigBird.random_blocks = 0"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"ModelConfig.num_kv_heads = {self.num_kv_heads} does not divide num_heads = "
                f"{self.num_heads}: choose a divisor"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"ModelConfig.head_dim = {self.head_dim} must be even for RoPE")
        if self.tie_embeddings and not self.head_transform and self.embedding_width != self.d_model:
            raise UserError(
                f"ModelConfig.tie_embeddings needs embedding_size = {self.embedding_size} to equal "
                f"d_model = {self.d_model}, or head_transform = True to map one to the other"
            )

    def _check_remat_names(self) -> None:
        object.__setattr__(self, "remat_names", tuple(self.remat_names))
        unknown = [name for name in self.remat_names if name not in REMAT_NAMES]
        if unknown:
            raise UserError(
                f"ModelConfig.remat_names has {unknown[0]!r}: choose from {', '.join(REMAT_NAMES)}"
            )
        if bool(self.remat_names) != (self.remat == "names"):
            raise UserError(
                f"ModelConfig.remat = {self.remat!r} with remat_names = {list(self.remat_names)}: "
                "the names are what remat = 'names' keeps; set both or neither"
            )

    @property
    def kv_heads(self) -> int:
        """N, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def embedding_width(self) -> int:
        """E, resolved."""
        return self.d_model if self.embedding_size is None else self.embedding_size

    def pattern(self, stack: str) -> Mask | None:
        """The attention pattern of a stack, "encoder" or "decoder"."""
        if stack == "decoder" and self.architecture == "encoder_decoder":
            return self.decoder_attention_pattern
        return self.attention_pattern

    @property
    def stacks(self) -> dict[str, int]:
        """Stack name ("encoder", "decoder") -> number of layers."""
        if self.architecture != "encoder_decoder":
            return {self.architecture: self.num_layers}
        decoder = self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers
        return {"encoder": self.num_layers, "decoder": decoder}


def _changes_with_length(pattern: Mask | None) -> bool:
    """A longer row has another pattern in front."""
    if isinstance(pattern, BigBird):
        return pattern.random_blocks > 0 and not pattern.causal
    if pattern is None:
        return False
    parts = (getattr(pattern, field.name) for field in dataclasses.fields(pattern))
    return any(_changes_with_length(part) for part in parts if isinstance(part, Mask))


# Arrays of a layer that remat can keep by name: attention_output is [B, H, Q, Dh], attention_lse
# [B, H, Q], all others [B, L, ...].
REMAT_NAMES = (
    "attention_query", "attention_key", "attention_value", "attention_output", "attention_lse",
    "mlp_hidden", "mlp_output",
)  # fmt: skip
_ARCHITECTURES = ("encoder", "decoder", "encoder_decoder")
_CHOICES = {
    "position": ("relative", "rope", "learned", "sinusoidal", "none"),
    "relative_from": ("slots", "positions"),
    "norm": ("rmsnorm", "layernorm"),
    "norm_position": ("pre", "post"),
    "activation": ("gelu", "gelu_exact", "silu", "relu"),
    "initializer": ("fan_in", "normal"),
    "remat": ("none", "full", "dots", "names"),
    "dtype": ("float32", "bfloat16", "float16"),
    "param_dtype": ("float32", "bfloat16"),
}
