"""Attention kernels and the symbolic masks they obey. Imports jax and numpy alone."""

from kernels import masks
from kernels.bias import RelativeBias, relative_position_bucket
from kernels.block_sparse_attention import BackendRefusal, attention

__all__ = ["BackendRefusal", "RelativeBias", "attention", "masks", "relative_position_bucket"]
