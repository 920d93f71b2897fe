"""Counter-based randomness for the host: a generator from (seed, stream, index), nothing else.

Philox is keyed, so example 10**12 costs what example 0 costs, and no draw depends on which
process, worker or restart asks for it.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np


@functools.lru_cache(maxsize=4096)
def stream_key(seed: int, stream: str) -> int:
    """A 64-bit key for one named stream of randomness under one seed."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator(seed: int, stream: str, index: int = 0) -> np.random.Generator:
    """A fresh generator for (seed, stream, index); equal arguments give equal draws."""
    key = np.array([stream_key(seed, stream), index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


class Stream:
    """One stream's generators, made by re-keying a single Philox: ten times cheaper than new ones.

    `Stream(seed, stream).at(index)` draws what `generator(seed, stream, index)` draws, until the
    next call of `at`, which takes the generator over. Not to be shared between threads.
    """

    def __init__(self, seed: int, stream: str):
        self._generator = generator(seed, stream)
        self._state = self._generator.bit_generator.state

    def at(self, index: int) -> np.random.Generator:
        """The generator of (seed, stream, index), good until the next call."""
        self._state["state"]["key"][1] = index
        self._generator.bit_generator.state = self._state
        return self._generator
