"""ModelConfig: one frozen description for encoder, decoder and encoder-decoder."""

from __future__ import annotations

import dataclasses
from typing import Literal

Architecture = Literal["encoder", "decoder", "encoder_decoder"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and choices of a transformer; every architecture is built from the same layers.

    Attributes:
      architecture: which stacks there are.
      vocab_size: rows of the embedding; None is filled in from the vocabulary (rounded up to a
        multiple of `vocab_multiple`).
      num_layers: layers of the encoder, or of the one stack.
      num_decoder_layers: layers of an encoder-decoder's decoder; None means `num_layers`.
      d_model, d_ff, num_heads, head_dim: D, F, H, Dh. `num_kv_heads` N None means H.
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
    position: Literal["relative", "rope", "learned", "sinusoidal", "none"] = "relative"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_per_layer: bool = False
    rope_base: float = 10_000.0
    max_length: int = 512
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-6
    activation: Literal["gelu", "gelu_exact", "silu", "relu"] = "gelu"
    gated_mlp: bool = True
    use_bias: bool = False
    tie_embeddings: bool = False
    scale_attention: bool = True
    dropout_rate: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    scan_layers: bool = False
    remat: Literal["none", "full", "dots"] = "none"
