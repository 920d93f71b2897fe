"""Block-sparse attention on one GPU beside its rivals, all in one process on one card.

    python -m benchmarks.attention --out attention_gpu.md       # everything: see "cost" below
    python -m benchmarks.attention --lengths 16384 --head_dims 128 --densities 1 0.125
    python -m benchmarks.attention --lengths 256 --head_dims 32 --densities 1 0.5  # a CPU: a check

No GPU has run it yet: the docs quote no figure of it. Its logic is tested at small sizes on a CPU.

Causal attention in bfloat16, forward (F) and forward with gradients of q, k and v for a random
bfloat16 d_out (F+B). A density is the share of the causal triangle's pairs that are visible: the
diagonal's blocks of 128 and as many others, at random, as come nearest to it. Ours is timed by
path, Triton's and Mosaic's, a row each. FlexAttention is given the same mask. Rivals without block
sparsity compute the whole triangle: cuDNN through jax.nn.dot_product_attention, FlashAttention-2
through PyTorch's scaled_dot_product_attention, tokamax's kernels, XLA (up to 8,192 tokens).
Everyone has its arrays in its native layout (attention_rivals.py), so that no one pays for a
transpose. What is not installed, refuses or fails has an empty cell and a reason at the end.

Nobody is timed unchecked. Output and gradients of two heads of up to 4,096 tokens, under a mask
of the same density, are held against the definition; at density 1 samples of the real case are held
against the first dense rival's. A mismatch, or an exception of ours that is no refusal, makes the
exit status 1; the race goes on.

A time is the wall time of a round of calls, enqueued one after another and waited for once, over
their number: the median of five rounds of at least --seconds each, after a warm-up. "TFLOP" is what
the mask asks for: 4 Dh a visible pair forward, 2.5 times as much for the gradient on top.
"efficiency" is the speed-up over the first dense rival that ran times density: 1 would be perfect
skipping at the rival's own speed. "over Flex" is the speed-up over FlexAttention on the same mask.

Cost: the whole table is 24 shapes and directions of 3 to 4 dense and 15 sparse programs each, about
440 compilations, and some 100 small ones of the checks. 140 of them are FlexAttention's, at perhaps
10 to 20 seconds each; the whole is an hour or more (an estimate, not measured). Where time on the
card is short, run it a length and a head size at a time.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence

# PyTorch needs a part of the card. JAX takes as it needs, and at most three quarters.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

import jax
import numpy as np

from benchmarks import attention_rivals as rivals
from benchmarks.attention_rivals import Case, Maker, Run

SMALL = rivals.WHOLE  # tokens of the case that is held against the definition
TOLERANCE = 0.05  # of a row's size: bfloat16's 0.4%, several times over
TOKENS, WIDTH = 16_384, 2048  # of a batch, longer rows alone; heads times head size
CPU_TOKENS, CPU_WIDTH = 256, 64
ROUNDS = 5
HEADS = ["length", "Dh", "density", "", "TFLOP", "ours", "ms", "TFLOP/s"]
HEADS += ["speed-up", "over", "efficiency", "over Flex"]


class Mismatch(Exception):
    """A contender's numbers are wrong."""


def compare(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray], whom: str) -> None:
    """Raises Mismatch unless every row of every result is near.

    Near: within TOLERANCE of its size, or of the usual row's where it is smaller.
    """
    for name, a, e in zip(("output", "dq", "dk", "dv"), actual, expected, strict=False):
        sizes = np.linalg.norm(e, axis=-1)
        errors = np.linalg.norm(a - e, axis=-1) / np.maximum(sizes, np.median(sizes))
        if not errors.max() <= TOLERANCE:  # NaN is wrong too
            raise Mismatch(f"{name} is off {whom} by {errors.max():.2g} of a row's size")


def seconds(run: Run, at_least: float) -> float:
    """Of a call; the convention is the docstring's."""

    def a_round(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            results = run.call()
        run.wait(results)
        return (time.perf_counter() - start) / calls

    calls = max(1, math.ceil(at_least / max(a_round(3), 1e-6)))
    return statistics.median(a_round(calls) for _ in range(ROUNDS))


class Race:
    """Times contenders, and keeps the reasons of those that cannot be timed."""

    def __init__(self, at_least: float, tokens: int, width: int):
        self.at_least, self.tokens, self.width = at_least, tokens, width
        self.ours = rivals.our_backends()
        self.reasons: dict[tuple[str, str], list[str]] = {}  # (contender, why): cases
        self.failed = False
        self._expected: dict[tuple[Case, bool], list[np.ndarray]] = {}
        self._checked: set[tuple[str, Case, bool]] = set()
        self._dense: tuple[str, list[np.ndarray]] | None = None

    @property
    def columns(self) -> list[str]:
        names = [*rivals.DENSE, *rivals.SPARSE]
        return [*HEADS, *(f"{name}, ms" for name in names)]

    def case(self, length: int, head_dim: int, density: float) -> Case:
        batch, heads = max(1, self.tokens // length), max(1, self.width // head_dim)
        return Case(length, head_dim, density, batch, heads)

    def rows(self, length: int, head_dim: int, gradient: bool, densities: Sequence[float]):
        """Yields cells: a row a density and path of ours."""
        self._dense = None
        whole = self.case(length, head_dim, 1.0)
        dense = {n: self.time(n, make, whole, gradient) for n, make in rivals.DENSE.items()}
        for density in densities:
            case = self.case(length, head_dim, density)
            makers = {**self.ours, **rivals.SPARSE}
            sparse = {n: self.time(n, make, case, gradient) for n, make in makers.items()}
            for name in self.ours:
                yield row(case, gradient, name, dense, sparse)

    def time(self, name: str, make: Maker, case: Case, gradient: bool) -> float | None:
        """Seconds; None, and a reason kept, if it cannot be had."""
        try:
            return self._timed(name, make, case, gradient)
        except Exception as error:  # a rival that is not there, or fails, must not end the race
            self._note(name, case, gradient, error)
            return None
        finally:
            release()

    def _timed(self, name: str, make: Maker, case: Case, gradient: bool) -> float:
        small = Case(min(case.length, SMALL), case.head_dim, case.density, 1, 2)
        if small != case and (name, small, gradient) not in self._checked:
            self._check(name, small, gradient, results_of(make(small, gradient)))
        run = make(case, gradient)
        results = run.call()
        run.wait(results)
        if small == case:
            self._check(name, case, gradient, run.sample(results))
        if case.density == 1:
            self._check_beside_dense(name, run.sample(results))
        del results
        return seconds(run, self.at_least)

    def _check(self, name: str, small: Case, gradient: bool, found: list[np.ndarray]) -> None:
        """Against the definition; once for all lengths."""
        if (small, gradient) not in self._expected:
            self._expected[small, gradient] = results_of(rivals.reference(small, gradient))
        compare(found, self._expected[small, gradient], f"the definition at {small.length} tokens")
        self._checked.add((name, small, gradient))

    def _check_beside_dense(self, name: str, sample: list[np.ndarray]) -> None:
        if self._dense is not None:
            first, expected = self._dense
            compare(sample, expected, first)
        elif name in rivals.DENSE:
            self._dense = name, sample

    def _note(self, name: str, case: Case, gradient: bool, error: Exception) -> None:
        if name in self.ours and not isinstance(error, rivals.Refusal):
            self.failed = True
        first_line = (str(error).splitlines() or [""])[0]
        why = f"{type(error).__name__}: {first_line[:160]}"
        where = f"{case.length}/{case.head_dim}/{case.share:.3f}/{direction(gradient)}"
        self.reasons.setdefault((name, why), []).append(where)

    def notes(self) -> list[str]:
        """A line a contender and reason, with the cases length/Dh/density/direction."""
        return [f"- {n}: {why} ({', '.join(at)})" for (n, why), at in self.reasons.items()]


def results_of(run: Run) -> list[np.ndarray]:
    return run.sample(run.call())


def release() -> None:
    """Gives a case's memory back to the card, or to JAX's pool."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def direction(gradient: bool) -> str:
    return "F+B" if gradient else "F"


def row(
    case: Case,
    gradient: bool,
    name: str,
    dense: dict[str, float | None],
    sparse: dict[str, float | None],
) -> list[str]:
    """Cells under Race.columns, for one path of ours."""
    took, flops = sparse[name], case.flops(gradient)
    over = next((rival for rival, t in dense.items() if t is not None), None)
    gain = dense[over] / took if took and over else None
    flex = sparse["FlexAttention"]
    cells = [str(case.length), str(case.head_dim), f"{case.share:.3f}", direction(gradient)]
    cells += [f"{flops / 1e12:.3g}", name, ms(took), f"{flops / took / 1e12:.4g}" if took else ""]
    cells += [f"{gain:.2f}", over, f"{gain * case.share:.2f}"] if gain else ["", "", ""]
    cells.append(f"{flex / took:.2f}" if took and flex else "")
    times = [*dense.values(), *(sparse[rival] for rival in rivals.SPARSE)]
    return [*cells, *map(ms, times)]


def ms(time: float | None) -> str:
    return "" if time is None else f"{time * 1e3:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table as it comes; returns the exit status."""
    options = parse(arguments)
    race = Race(options.seconds, options.tokens, options.width)
    written: list[str] = []

    def write(*lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        written.extend(lines)
        if options.out:
            options.out.write_text("\n".join([*written, ""]))

    def table_line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    write(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", "")
    write(table_line(race.columns), table_line(["---:"] * len(race.columns)))
    for head_dim in options.head_dims:
        for length in options.lengths:
            for gradient in (False, True):
                for cells in race.rows(length, head_dim, gradient, options.densities):
                    write(table_line(cells))
    torch = sys.modules.get("torch")
    versions = [f"PyTorch {torch.__version__}", ""] if torch is not None else []
    write("", *versions, *race.notes())
    return int(race.failed)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = jax.default_backend() == "gpu"
    numbers = {"type": int, "nargs": "+"}
    lengths = [2**n for n in range(12, 18)]
    densities = [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    parser.add_argument(
        "--lengths", default=lengths, **numbers, help="multiples of 128, or of 4 up to 512"
    )
    parser.add_argument("--head_dims", default=[64, 128], **numbers)
    parser.add_argument("--densities", default=densities, type=float, nargs="+")
    parser.add_argument("--seconds", type=float, default=0.1, help="least length of a round")
    parser.add_argument("--tokens", type=int, default=TOKENS if on_gpu else CPU_TOKENS)
    parser.add_argument("--width", type=int, default=WIDTH if on_gpu else CPU_WIDTH)
    parser.add_argument("--out", type=pathlib.Path, help="a file for the same markdown")
    options = parser.parse_args(arguments)
    for length in options.lengths:
        if length % (4 if length < 4 * rivals.BLOCK else rivals.BLOCK):
            parser.error(f"{length} tokens are no whole blocks")
    return options


if __name__ == "__main__":
    sys.exit(main())
