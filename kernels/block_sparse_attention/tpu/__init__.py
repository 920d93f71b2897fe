"""Block-sparse attention for TPUs, in Pallas."""

from kernels.block_sparse_attention.tpu.backward import backward
from kernels.block_sparse_attention.tpu.forward import forward
from kernels.block_sparse_attention.tpu.limits import block_sizes, refusal

__all__ = ["backward", "block_sizes", "forward", "refusal"]
