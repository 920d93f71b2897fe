"""Who sees whom in a batch: the masks of its features, for the model and for whoever shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kernels import masks
from t5like.errors import UserError

Batch = Mapping[str, jax.Array]


def self_mask(batch: Batch, stack: str, pattern: masks.Mask | None = None) -> masks.Mask:
    """The mask of a stack's self-attention.

    Args:
      batch: int [B, L] features. `STACK_segment_ids` (absent: one segment); on a decoder
        `decoder_causal_attention`, 1 at slots of a prefix that see each other both ways; and
        `STACK_isolated`, 1 at slots that see the slots at which it is 0, and themselves, and
        that no other slot sees (the queries of ERNIE-Gram, Xiao et al. 2021, section 3.3).
      stack: "encoder" or "decoder".
      pattern: limits what is seen further, see ModelConfig.attention_pattern.
    """
    ids = batch.get(f"{stack}_segment_ids")
    mask = segments(ids, ids)
    if stack == "decoder":
        flags = batch.get("decoder_causal_attention")
        order = masks.Causal() if flags is None else masks.Causal() | masks.Prefix(flags)
        mask = order if ids is None else order & mask
    isolated = batch.get(f"{stack}_isolated")
    if isolated is not None:
        if pattern is not None:
            beside_encoder = stack == "decoder" and any(k.startswith("encoder_") for k in batch)
            field = "decoder_attention_pattern" if beside_encoder else "attention_pattern"
            raise UserError(
                f"ModelConfig.{field} speaks of the slots of a text, and this objective appends "
                f"queries that have none: set it to None"
            )
        everyone = jnp.ones_like(isolated)
        mask &= masks.Segments(everyone, 1 - isolated) | masks.SlidingWindow(0, 0)
    if pattern is not None:
        positions = batch.get(f"{stack}_positions")
        mask &= pattern if positions is None else _in_each_example(pattern, positions)
    return mask


def _in_each_example(pattern: masks.Mask, positions: jax.Array) -> masks.Mask:
    """`pattern` with each example's first tokens global, or its sink, instead of each row's."""
    if isinstance(pattern, masks.GlobalTokens) and pattern.flags is None:
        return dataclasses.replace(pattern, count=0, flags=positions < pattern.count)
    if isinstance(pattern, masks.AShape):
        sink = masks.GlobalTokens(flags=positions < pattern.sink, rows=False)
        return masks.Causal() & (masks.SlidingWindow(left=pattern.window) | sink)
    if not isinstance(pattern, masks.And | masks.Or | masks.Not):
        return pattern
    parts = {field.name: getattr(pattern, field.name) for field in dataclasses.fields(pattern)}
    return type(pattern)(**{k: _in_each_example(part, positions) for k, part in parts.items()})


def cross_mask(batch: Batch) -> masks.Mask:
    """The mask of a decoder's attention to its encoder."""
    return segments(batch.get("decoder_segment_ids"), batch.get("encoder_segment_ids"))


def segments(q_ids: jax.Array | None, kv_ids: jax.Array | None) -> masks.Mask:
    """Own segment alone; without query ids all but padding; without both everything."""
    if kv_ids is None:
        return masks.Full()
    if q_ids is None:
        return masks.Dense(kv_ids[:, None, :] != 0)
    return masks.Segments(q_ids, kv_ids)
