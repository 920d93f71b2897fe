"""Lists of blocks as the GPU kernels walk them: whose list, and in which order of lines."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def group_of(array: Any, batch: Any, head: Any) -> tuple[Any, Any]:
    """The leading indices into an array or ref [B or 1, H or 1, ..]."""
    return batch if array.shape[0] > 1 else 0, head if array.shape[1] > 1 else 0


def longest_first(length: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """int32 [.., lines]: lines by decreasing length, so that the last programs to start are
    short."""
    xp = np if isinstance(length, np.ndarray) else jnp
    return xp.argsort(-length, axis=-1, stable=True).astype(np.int32)
