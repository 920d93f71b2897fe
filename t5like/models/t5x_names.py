"""Parameter names and layouts of T5X and Flaxformer, and the way there and back.

The one table of the mapping; tests hold it against the shapes that Flaxformer pins and against
a T5X checkpoint.
"""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from t5like.models.config import ModelConfig

# Ours -> theirs, as regular expressions over paths joined by "/", applied in order. {stack}
# stands for encoder or decoder. A relative bias is transposed too: ours is [buckets, H].
_RENAMES = (
    (r"^(encoder|decoder)/layers/", r"\1/\1/"),
    (r"^(encoder)/(.*)self_attention_norm/", r"\1/\2pre_attention_layer_norm/"),
    (r"^(encoder)/(.*)self_attention/", r"\1/\2attention/"),
    (r"self_attention_norm/", r"pre_self_attention_layer_norm/"),
    (r"cross_attention_norm/", r"pre_cross_attention_layer_norm/"),
    (r"cross_attention/", r"encoder_decoder_attention/"),
    (r"mlp_norm/", r"pre_mlp_layer_norm/"),
    (r"^(encoder|decoder)/final_norm/", r"\1/\1_norm/"),
    (r"relative_bias/embedding$", r"relpos_bias/rel_embedding"),
    (r"position_embedder/embedding$", r"position_embedder/pos_embedding"),
    (r"^head/kernel$", r"{stack}/logits_dense/kernel"),
    (r"^token_embedder/", r"{stack}/token_embedder/"),
)
_LAYER_AXIS = 1  # of scanned layers in T5X; ours is 0


def t5x_name(name: str, config: ModelConfig) -> str:
    """Our parameter path, joined by "/", in T5X's naming.

    An encoder-decoder's token embedding is shared and stands at the root, a lone stack's stands
    inside it; the output embedding is always the predicting stack's.
    """
    stack = "encoder" if config.architecture == "encoder" else "decoder"
    if config.architecture == "encoder_decoder" and name.startswith("token_embedder/"):
        return name
    for ours, theirs in _RENAMES:
        name = re.sub(ours, theirs, name)
    return name.format(stack=stack)


def to_t5x(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Our parameter tree as T5X's `target`: renamed and laid out, values untouched.

    Works on anything with shape and jnp semantics (arrays, or traced by jax.eval_shape).
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    theirs = {t5x_name(name, config): _transpose(name, flat[name], out=True) for name in flat}
    return traverse_util.unflatten_dict(theirs, sep="/")


def from_t5x(target: dict[str, Any], params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """T5X's `target` as our parameter tree.

    Args:
      target: their tree of arrays.
      params: our tree, of arrays or shapes: which names are wanted.
      config: of our model.

    Raises:
      KeyError: a wanted parameter is not there, under its T5X name.
    """
    theirs = traverse_util.flatten_dict(target, sep="/")
    names = traverse_util.flatten_dict(params, sep="/")
    ours = {name: _transpose(name, theirs[t5x_name(name, config)], out=False) for name in names}
    return traverse_util.unflatten_dict(ours, sep="/")


def _transpose(name: str, leaf: Any, *, out: bool) -> Any:
    """One parameter between our layout and theirs; `out` is towards T5X."""
    if "/layers/" in name and not out:
        leaf = jnp.moveaxis(leaf, _LAYER_AXIS, 0)
    if name.endswith("relative_bias/embedding"):
        leaf = jnp.swapaxes(leaf, -1, -2)
    if "/layers/" in name and out:
        leaf = jnp.moveaxis(leaf, 0, _LAYER_AXIS)
    return leaf
