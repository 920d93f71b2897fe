"""What benchmarks/attention.py races: one shape and mask as each library wants them.

A maker takes a case and a direction and returns a Run, whose arrays are on the device already, in
the layout the library likes best: [B, L, H, Dh] for jax.nn and tokamax, heads first for PyTorch.
Ours too is given heads first: kernels.attention takes [B, L, H, Dh] and turns it round, and the
two transposes inside the jit cancel, as they do in a model whose projections write heads first.
All are given the same bfloat16 numbers, and the same d_out for the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention, masks
from kernels.block_sparse_attention import flash

BLOCK = 128
WHOLE = 4096  # tokens of which every row is looked at
CUDA = "cuda"  # PyTorch's name of the device
LONGEST_DENSE = 8192  # tokens of which XLA's dense product writes all logits out


class Refusal(Exception):
    """A contender's own word that it does not serve a case."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and mask: of the causal triangle, the diagonal's blocks and others at random.

    Attributes:
      density: the wanted share of the triangle's pairs; `share` is what blocks can make of it.
    """

    length: int
    head_dim: int
    density: float
    batch: int
    heads: int

    @property
    def block(self) -> int:
        return min(BLOCK, self.length // 4)

    def kept(self) -> np.ndarray:
        """bool [R, R]: the diagonal, and as many blocks below it as meet the density best."""
        rows, block = self.length // self.block, self.block
        below = np.flatnonzero(np.tri(rows, k=-1, dtype=bool))
        wanted = self.density * self._triangle - rows * block * (block + 1) / 2
        count = min(max(round(wanted / block**2), 0), below.size)
        kept = np.eye(rows, dtype=bool)
        kept.flat[np.random.default_rng(0).choice(below, count, replace=False)] = True
        return kept

    @property
    def _triangle(self) -> int:
        return self.length * (self.length + 1) // 2

    @functools.cached_property
    def pairs(self) -> int:
        """Visible ones, of one row and head: of a diagonal block the upper half is hidden."""
        hidden = self.length // self.block * (self.block * (self.block - 1) // 2)
        return int(self.kept().sum()) * self.block**2 - hidden

    @property
    def share(self) -> float:
        """Of the triangle's pairs, those that are visible."""
        return self.pairs / self._triangle

    def flops(self, gradient: bool) -> float:
        """4 Dh a visible pair, and 2.5 times as many for the gradient on top."""
        factor = 3.5 if gradient else 1.0
        return factor * 4 * self.head_dim * self.pairs * self.batch * self.heads

    def mask(self) -> masks.Mask:
        if self.density == 1:
            return masks.Causal()
        kept = self.kept()
        columns = np.full((1, 1, len(kept), kept.sum(1).max()), -1)
        for row, line in enumerate(kept):
            columns[0, 0, row, : line.sum()] = np.flatnonzero(line)
        return masks.Causal() & masks.BlockIndex(columns, self.block, self.block)

    def numbers(self) -> list[np.ndarray]:
        """q, k, v and d_out: standard normal bfloat16, [B, H, L, Dh]."""
        return _numbers((self.batch, self.heads, self.length, self.head_dim))


@functools.lru_cache(maxsize=2)  # a shape's and its check's: gigabytes at 128k tokens
def _numbers(shape: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape, np.float32).astype(jnp.bfloat16) for _ in range(4)]


@dataclasses.dataclass(frozen=True)
class Run:
    """A contender ready to go.

    Attributes:
      call: enqueues one computation: the output, and dq, dk and dv where they are asked for.
      wait: returns when what was enqueued last is computed.
      sample: some rows of each result, float32 [B, H, L, Dh] of few B, H and L.
    """

    call: Callable[[], Sequence[Any]]
    wait: Callable[[Sequence[Any]], object]
    sample: Callable[[Sequence[Any]], list[np.ndarray]]


Maker = Callable[[Case, bool], Run]


def some_rows(length: int) -> tuple[slice, ...]:
    """Of two heads: all of a short case's, of a long one's a few thousand at an odd stride."""
    return slice(1), slice(2), slice(None, None, length // WHOLE | 1)


def ours(backend: ModuleType, case: Case, gradient: bool) -> Run:
    """One backend of kernels.attention, and no other in its place."""
    mask = case.mask()

    def call(*arrays):
        arrays = [jnp.swapaxes(x, 1, 2) for x in arrays]
        settings = {"bias": None, "logits_soft_cap": None, "block_sizes": None}
        scale = case.head_dim**-0.5
        ready = flash.prepare(backend, *arrays, mask, scale=scale, **settings)
        reason = backend.refusal(ready.problem, ready.bias, ready.q, ready.k, ready.v)
        if reason is not None:
            raise Refusal(reason)
        return jnp.swapaxes(flash.run(backend, ready, case.length, interpret=False)[0], 1, 2)

    return jax_run(case, gradient, call, heads_first=True)


def reference(case: Case, gradient: bool) -> Run:
    """The definition, of a small case: a whole float32 product."""
    call = functools.partial(attention, mask=case.mask(), backend="reference")
    return jax_run(case, gradient, call)


def cudnn(case: Case, gradient: bool) -> Run:
    call = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return jax_run(case, gradient, call)


def dense_xla(case: Case, gradient: bool) -> Run:
    if case.length > LONGEST_DENSE:
        raise Refusal(f"asked up to {LONGEST_DENSE} tokens only, for the memory it takes")
    call = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    return jax_run(case, gradient, call)


def tokamax(case: Case, gradient: bool) -> Run:
    from tokamax import dot_product_attention

    # Its default ends with XLA's dense product, silently.
    kernels = ("mosaic", "triton")
    call = functools.partial(dot_product_attention, is_causal=True, implementation=kernels)
    return jax_run(case, gradient, call)


def jax_run(case: Case, gradient: bool, call: Callable, heads_first: bool = False) -> Run:
    numbers = case.numbers() if gradient else case.numbers()[:3]
    arrays = [jnp.asarray(x if heads_first else x.swapaxes(1, 2)) for x in numbers]

    def both(q, k, v, d_out):
        output, pull = jax.vjp(call, q, k, v)
        return output, *pull(d_out)

    compiled = jax.jit(both if gradient else lambda *arrays: [call(*arrays)])

    def sample(results):
        views = [x if heads_first else jnp.swapaxes(x, 1, 2) for x in results]
        return [np.asarray(x[some_rows(case.length)], np.float32) for x in views]

    return Run(lambda: compiled(*arrays), jax.block_until_ready, sample)


def flash_attention_2(case: Case, gradient: bool) -> Run:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return torch_run(case, gradient, call)


def flex_attention(case: Case, gradient: bool) -> Run:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    block_mask = flex_mask(case)
    return torch_run(case, gradient, lambda q, k, v: compiled(q, k, v, block_mask=block_mask))


def flex_mask(case: Case) -> Any:
    """The lists of blocks as they are, and nothing of size L * L.

    Compiled kernels ask `causal` in partial blocks alone, which are the diagonal's.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    def lists(blocks):
        """([1, 1, R] how many, [1, 1, R, R] which, those first)."""
        order = np.argsort(~blocks, axis=-1, kind="stable")
        arrays = blocks.sum(-1)[None, None], order[None, None]
        return [torch.from_numpy(x.astype(np.int32)).to(CUDA) for x in arrays]

    kept = case.kept()
    diagonal = np.eye(len(kept), dtype=bool)
    return BlockMask.from_kv_blocks(
        *lists(diagonal),
        *lists(kept & ~diagonal),
        BLOCK_SIZE=case.block,
        mask_mod=causal,
        seq_lengths=(case.length, case.length),
    )


def causal(b, h, q, k):
    return q >= k


def torch_run(case: Case, gradient: bool, call: Callable) -> Run:
    import torch

    def tensor(x):
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(CUDA)

    *numbers, d_out = case.numbers()
    arrays = [tensor(x).requires_grad_(gradient) for x in numbers]
    d_out = tensor(d_out) if gradient else None

    def run():
        output = call(*arrays)
        return (output, *torch.autograd.grad(output, arrays, d_out)) if gradient else (output,)

    def sample(results):
        return [x.detach()[some_rows(case.length)].float().cpu().numpy() for x in results]

    return Run(run, lambda results: torch.cuda.synchronize(), sample)


# The first that can serve is the one that speed-ups are over.
DENSE: dict[str, Maker] = {
    "cuDNN": cudnn,
    "FlashAttention-2": flash_attention_2,
    "tokamax": tokamax,
    "XLA, dense": dense_xla,
}
SPARSE: dict[str, Maker] = {"FlexAttention": flex_attention}


def our_backends() -> dict[str, Maker]:
    """Both GPU paths; on a CPU, where they would be interpreted, XLA's."""
    if jax.default_backend() != "gpu":
        from kernels.block_sparse_attention import xla

        return {"ours, XLA": functools.partial(ours, xla)}
    from kernels.block_sparse_attention import mosaic, triton

    return {
        "ours, Triton": functools.partial(ours, triton),
        "ours, Mosaic": functools.partial(ours, mosaic),
    }
