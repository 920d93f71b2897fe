"""Attention under a symbolic mask: one call, several backends."""

from kernels.block_sparse_attention.api import BackendRefusal, attention

__all__ = ["BackendRefusal", "attention"]
