"""A shuffle that needs no memory: a keyed bijection on range(n), evaluated one index at a time.

A Feistel network permutes the smallest power of two that holds n, and indices that fall outside
range(n) walk on along their cycle until they are inside (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002, section 4). At most half of the domain lies outside, so an index
takes fewer than two walks on average.

grain has `grain.experimental.index_shuffle`; it takes scalars only and costs an import of jax.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import numpy as np

_ROUNDS = 8
_WORD = (1 << 64) - 1

Index = TypeVar("Index", int, np.ndarray)


def permute(index: Index, n: int, key: int) -> Index:
    """Where `index` goes in the permutation of range(n) that `key` names.

    Args:
      index: an int, or an integer array of any shape, of values in range(n).
      n: size of the permutation, at most 2**62.
      key: 64 bits; different keys give unrelated permutations.

    Returns:
      An int, or an int64 array of index's shape.

    Raises:
      ValueError: an index lies outside range(n).
    """
    bits = max(1, (n - 1).bit_length())
    keys = _round_keys(key & _WORD)
    if not isinstance(index, np.ndarray):
        if not 0 <= index < n:
            raise ValueError(f"index {index} is outside range({n})")
        image = _feistel(int(index), bits, keys)
        while image >= n:
            image = _feistel(image, bits, keys)
        return image
    if index.size and not (index.min() >= 0 and index.max() < n):
        raise ValueError(f"an index is outside range({n})")
    image = _feistel(index.astype(np.uint64).ravel(), bits, keys)
    outside = np.flatnonzero(image >= n)
    while outside.size:
        image[outside] = _feistel(image[outside], bits, keys)
        outside = outside[image[outside] >= n]
    return image.astype(np.int64).reshape(index.shape)


def _feistel(x: Index, bits: int, keys: tuple[int, ...]) -> Index:
    """A bijection on range(2**bits); x is an int or a uint64 array."""
    low_bits = (bits + 1) // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    high, low = x >> low_bits, x & low_mask
    for i in range(0, _ROUNDS, 2):
        high = high ^ (_mix(low, keys[i]) & high_mask)
        low = low ^ (_mix(high, keys[i + 1]) & low_mask)
    return (high << low_bits) | low


def _mix(x: Index, key: int) -> Index:
    """32 well-mixed bits of x and key (the multiplier and shifts of splitmix64)."""
    x = ((x ^ key) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x >> 32


@functools.lru_cache(maxsize=4096)
def _round_keys(key: int) -> tuple[int, ...]:
    keys = []
    for _ in range(_ROUNDS):
        key = (key + 0x9E3779B97F4A7C15) & _WORD
        keys.append((_mix(key, 0) << 32) | _mix(key, _WORD))
    return tuple(keys)
