"""Masks: a symbolic description of who sees whom, combined with `&`, `|` and `~`.

A mask is a frozen pytree. It says nothing of how it is computed: `Mask.dense` writes it out, and
a backend of `kernels.attention` visits only the blocks in which anything is seen.

Slots and positions: a slot is an index into the row of keys or queries as laid out in memory.
Masks speak of slots, 0..Q-1 and 0..K-1, unless they are given explicit positions, which is how a
decoding step says that its few queries stand at later slots of the cache.

NumPy arrays in a mask are known on the host: the list of active blocks is then made once, when
the program is traced. JAX arrays are data of the run: the list is made on the device.
"""

from kernels.masks.base import And, Builder, Full, Mask, Not, Or, Rows
from kernels.masks.expression import Expr
from kernels.masks.order import AShape, Causal, Dilated, Prefix, SlidingWindow
from kernels.masks.part import Part
from kernels.masks.patterns import BigBird, BlockIndex, VerticalSlash
from kernels.masks.rows import Dense, GlobalTokens, Segments

__all__ = [
    "AShape",
    "And",
    "BigBird",
    "BlockIndex",
    "Builder",
    "Causal",
    "Dense",
    "Dilated",
    "Expr",
    "Full",
    "GlobalTokens",
    "Mask",
    "Not",
    "Or",
    "Part",
    "Prefix",
    "Rows",
    "Segments",
    "SlidingWindow",
    "VerticalSlash",
]
