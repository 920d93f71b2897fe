"""Parameter counts and model FLOPs, from the config alone.

Model FLOPs are those the mathematics asks for (PaLM, Chowdhery et al. 2022, appendix B): a
product of [m, k] and [k, n] counts 2 m k n; embedding lookups, norms, activations and softmax
count nothing; causal self-attention counts half of the square, with or without a prefix; under an
attention pattern the pairs that it shows count; padding and packed segments count as if every slot
were a token that sees its whole row; recomputation (remat) is not counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from kernels import masks
from kernels.block_sparse_attention.count import visible_pairs
from t5like.models.axes import parameter_shapes
from t5like.models.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, embeddings and head included; nothing is allocated."""
    shapes = parameter_shapes(dataclasses.replace(config, scan_layers=True))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def forward_flops(
    config: ModelConfig, spec: Mapping[str, Any], predictions: int | None = None
) -> float:
    """FLOPs of one forward pass over a batch, logits included.

    Args:
      config: of the model.
      predictions: positions of a row whose logits are asked for; None: all.
      spec: feature name -> (shape, dtype), or -> anything with `.shape` such as an array; the
        shapes [B, L] of `encoder_input_tokens` and `decoder_input_tokens` are read, where the
        architecture has them.
    """
    shapes = {stack: _shape(spec[f"{stack}_input_tokens"]) for stack in config.stacks}
    total = sum(_stack_flops(config, stack, shapes) for stack in config.stacks)
    batch, length = shapes["encoder" if config.architecture == "encoder" else "decoder"]
    asked = length if predictions is None else min(predictions, length)
    return batch * (total + asked * head_flops(config))


def train_flops(
    config: ModelConfig, spec: Mapping[str, Any], predictions: int | None = None
) -> float:
    """FLOPs of one training step over a batch: the backward pass costs two forward passes."""
    return 3.0 * forward_flops(config, spec, predictions)


def _shape(feature: Any) -> tuple[int, int]:
    return tuple(getattr(feature, "shape", None) or feature[0])


def _stack_flops(config: ModelConfig, stack: str, shapes: Mapping[str, tuple[int, int]]) -> float:
    """Of one row through a whole stack."""
    length = shapes[stack][1]
    d, joined = config.d_model, config.num_heads * config.head_dim
    joined_kv = config.kv_heads * config.head_dim
    queries_and_out, keys_and_values = 4.0 * d * joined, 4.0 * d * joined_kv
    mlp = (6.0 if config.gated_mlp else 4.0) * d * config.d_ff
    # Logits and weighted values are 2 H Dh each, a pair of slots.
    square = 4.0 * joined * _self_pairs(config.pattern(stack), stack, length)
    layer = length * (queries_and_out + keys_and_values + mlp) + square
    if stack == "decoder" and "encoder" in shapes:
        source = shapes["encoder"][1]
        layer += length * queries_and_out + source * keys_and_values
        layer += 4.0 * joined * length * source
    projection = 2.0 * config.embedding_width * d if config.embedding_width != d else 0.0
    return config.stacks[stack] * layer + length * projection


@functools.lru_cache(maxsize=64)
def _self_pairs(pattern: masks.Mask | None, stack: str, length: int) -> float:
    """Pairs of a row's slots that self-attention is about."""
    if pattern is None:
        return length**2 / (2.0 if stack == "decoder" else 1.0)
    shown = pattern & masks.Causal() if stack == "decoder" else pattern
    return visible_pairs(shown, length, length)


def head_flops(config: ModelConfig) -> float:
    """Of one token's logits, forward."""
    width = config.embedding_width if config.tie_embeddings else config.d_model
    transform = 2.0 * config.d_model * width if config.head_transform else 0.0
    return transform + 2.0 * width * config.vocab_size
