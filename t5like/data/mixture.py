"""Which component the i-th example of a mixture comes from, and which of its examples it is.

Examples come in blocks. After b blocks component c has given floor(rate_c * examples so far), the
largest component the rest; so rates are exact in the long run, each component counts 0, 1, 2, ...
without a gap, and the whole map is a function of the index. The order inside a block is shuffled.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from t5like.data.rng import generator
from t5like.errors import UserError

_MIN_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A deterministic interleaving of components.

    Attributes:
      rates: relative rates, at least 0 and with a positive sum; they need not sum to 1.
      seed: seed of the order inside the blocks.
    """

    rates: tuple[float, ...]
    seed: int

    def __post_init__(self):
        if any(not (math.isfinite(r) and r >= 0) for r in self.rates) or sum(self.rates) <= 0:
            raise UserError(
                f"mixture rates {self.rates} must be finite, not negative and not all zero"
            )

    @property
    def block_size(self) -> int:
        """Examples a block: so many that the largest component's count never falls."""
        return max(_MIN_BLOCK, 1 << (len(self.rates) ** 2).bit_length())

    def given(self, blocks: int) -> np.ndarray:
        """int64 [components], how many examples of each come before block number `blocks`."""
        examples, total = blocks * self.block_size, math.fsum(self.rates)
        counts = np.array([math.floor(r / total * examples) for r in self.rates], np.int64)
        largest = self.rates.index(max(self.rates))
        counts[largest] += examples - counts.sum()
        return counts

    def locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Components of examples start..stop-1, and their number within the component.

        Returns:
          (component, k), both int64 [stop - start].
        """
        size = self.block_size
        first, last = start // size, (stop - 1) // size
        blocks = [_block(self, b) for b in range(first, last + 1)]
        component, k = (np.concatenate(part) for part in zip(*blocks, strict=True))
        offset = first * size
        return component[start - offset : stop - offset], k[start - offset : stop - offset]


@functools.lru_cache(maxsize=64)
def _block(mixture: Mixture, block: int) -> tuple[np.ndarray, np.ndarray]:
    before, after = mixture.given(block), mixture.given(block + 1)
    component = np.repeat(np.arange(len(mixture.rates)), after - before)
    component = generator(mixture.seed, "mixture", block).permutation(component)
    k = np.empty(mixture.block_size, np.int64)
    for c in range(len(mixture.rates)):
        k[component == c] = np.arange(before[c], after[c])
    return component, k
