"""Block-sparse attention on one GPU beside its rivals, all in one process on one card.

    python benchmarks/attention.py                              # what the docs quote; minutes
    python benchmarks/attention.py --lengths 16384 --head_dims 128 --densities 1 0.125
    python benchmarks/attention.py --lengths 256 --head_dims 32 --densities 1 0.5   # a CPU: a check

Causal attention in bfloat16, forward (F) and forward with gradients (F+B). A density is the share
of the causal triangle's blocks that are kept, at random, the diagonal always. Rivals without block
sparsity compute the whole triangle: cuDNN through jax.nn.dot_product_attention, FlashAttention-2
through PyTorch's scaled_dot_product_attention, tokamax. FlexAttention is given the same mask.
Those that are not installed are left out, and the table says which.

"efficiency" is speed-up over cuDNN's dense kernel (or the first dense rival there is) times
density: 1 would be perfect skipping at the rival's own speed. TFLOP/s count what the mask asks for:
4 Dh a visible pair forward, 2.5 times as much for the gradient on top.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention, masks

BLOCK = 128
TOKENS = 16_384  # of a batch; rows longer than that are alone
WIDTH = 2048  # heads times head size


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and mask."""

    length: int
    head_dim: int
    density: float

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.length)

    @property
    def heads(self) -> int:
        return max(1, WIDTH // self.head_dim)

    @property
    def block(self) -> int:
        return min(BLOCK, self.length // 4)

    def kept(self) -> np.ndarray:
        """bool [R, R]: blocks of the lower triangle, the diagonal always."""
        rows = self.length // self.block
        draws = np.random.default_rng(0).random((rows, rows))
        return np.tril((draws < self.density) | np.eye(rows, dtype=bool))

    def true_density(self) -> float:
        kept = self.kept()
        return float(kept.sum() / np.tril(np.ones_like(kept)).sum())

    def mask(self) -> masks.Mask:
        if self.density == 1:
            return masks.Causal()
        kept = self.kept()
        width = kept.sum(1).max()
        columns = np.full((1, 1, kept.shape[0], width), -1)
        for row, line in enumerate(kept):
            columns[0, 0, row, : line.sum()] = np.flatnonzero(line)
        return masks.Causal() & masks.BlockIndex(columns, self.block, self.block)

    def flops(self, gradient: bool) -> float:
        pairs = self.length**2 / 2 * self.true_density()
        return (3.5 if gradient else 1.0) * 4 * self.head_dim * pairs * self.batch * self.heads


Runner = Callable[[], object]


def ours(case: Case, gradient: bool, backend: str | None) -> Runner:
    """kernels.attention."""
    call = functools.partial(attention, mask=case.mask(), backend=backend)
    return jax_runner(case, gradient, call)


def cudnn(case: Case, gradient: bool) -> Runner:
    call = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return jax_runner(case, gradient, call)


def dense_xla(case: Case, gradient: bool) -> Runner:
    call = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    return jax_runner(case, gradient, call)


def tokamax(case: Case, gradient: bool) -> Runner:
    from tokamax import dot_product_attention

    return jax_runner(case, gradient, functools.partial(dot_product_attention, is_causal=True))


def jax_runner(case: Case, gradient: bool, call: Callable) -> Runner:
    shape = (case.batch, case.length, case.heads, case.head_dim)
    arrays = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3)]

    def scalar(*arrays):
        return call(*arrays).astype(jnp.float32).sum()

    compiled = jax.jit(jax.value_and_grad(scalar, (0, 1, 2)) if gradient else call)
    return lambda: jax.block_until_ready(compiled(*arrays))


def flash_attention_2(case: Case, gradient: bool) -> Runner:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return torch_runner(case, gradient, call)


def flex_attention(case: Case, gradient: bool) -> Runner:
    import torch
    from torch.nn.attention import flex_attention as flex

    kept = torch.from_numpy(case.kept()).cuda()

    def visible(b, h, q, k):
        return (q >= k) & kept[q // case.block, k // case.block]

    block_mask = flex.create_block_mask(visible, None, None, case.length, case.length)
    compiled = torch.compile(flex.flex_attention)
    return torch_runner(case, gradient, lambda q, k, v: compiled(q, k, v, block_mask=block_mask))


def torch_runner(case: Case, gradient: bool, call: Callable) -> Runner:
    import torch

    shape = (case.batch, case.heads, case.length, case.head_dim)
    arrays = [
        torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=gradient)
        for _ in range(3)
    ]

    def run():
        output = call(*arrays)
        if gradient:
            torch.autograd.grad(output.float().sum(), arrays)
        torch.cuda.synchronize()

    return run


SPARSE = {
    "ours": lambda case, gradient: ours(case, gradient, None),
    "FlexAttention": flex_attention,
}
DENSE = {
    "cuDNN": cudnn,
    "FlashAttention-2": flash_attention_2,
    "tokamax": tokamax,
    "XLA": dense_xla,
}


def seconds(run: Runner, at_least: float, rounds: int = 5) -> float:
    """Median over rounds of a call's wall time; a round lasts at least so many seconds."""
    run()
    start = time.perf_counter()
    run()
    calls = max(1, round(at_least / max(time.perf_counter() - start, 1e-6)))
    measured = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        measured.append((time.perf_counter() - start) / calls)
    return statistics.median(measured)


def table(
    lengths: Sequence[int], head_dims: Sequence[int], densities: Sequence[float], at_least: float
) -> str:
    """Markdown: a row a length, head size, density and direction."""
    absent: dict[str, str] = {}

    def time_of(name: str, make: Callable, case: Case, gradient: bool) -> float | None:
        try:
            return seconds(make(case, gradient), at_least)
        except Exception as error:  # a rival that is not there, or refuses, must not end the race
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            return None

    lines = []
    for head_dim in head_dims:
        for length in lengths:
            for gradient in (False, True):
                whole = Case(length, head_dim, 1.0)
                dense = {n: time_of(n, make, whole, gradient) for n, make in DENSE.items()}
                for density in densities:
                    case = Case(length, head_dim, density)
                    sparse = {n: time_of(n, make, case, gradient) for n, make in SPARSE.items()}
                    lines.append(row(case, gradient, dense, sparse))
    names = [*DENSE, *SPARSE]
    head = ["length", "Dh", "density", "", *(f"{name}, ms" for name in names)]
    head += ["ours, TFLOP/s", "speed-up", "over", "efficiency"]
    rule = ["---:"] * len(head)
    notes = [f"{name}: not measured everywhere ({why})" for name, why in absent.items()]
    table_lines = [f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)]
    return "\n".join([*table_lines, "", *notes])


def row(case: Case, gradient: bool, dense: dict, sparse: dict) -> list[str]:
    times = {**dense, **sparse}
    cells = [str(case.length), str(case.head_dim), f"{case.true_density():.3f}"]
    cells.append("F+B" if gradient else "F")
    cells += ["" if t is None else f"{t * 1e3:.3f}" for t in times.values()]
    rival = next((name for name, t in dense.items() if t is not None), None)
    if times["ours"] is None or rival is None:
        return [*cells, "", "", "", ""]
    gain = dense[rival] / times["ours"]
    rate = case.flops(gradient) / times["ours"] / 1e12
    return [*cells, f"{rate:.1f}", f"{gain:.2f}", rival, f"{gain * case.true_density():.2f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072]
    )
    parser.add_argument("--head_dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument(
        "--densities", type=float, nargs="+", default=[1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="least length of a round")
    options = parser.parse_args(arguments)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print(table(options.lengths, options.head_dims, options.densities, options.seconds))


if __name__ == "__main__":
    main()
