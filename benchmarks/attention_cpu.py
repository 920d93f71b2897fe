"""Attention's XLA path on one core beside the dense masked product of the same mask.

    python benchmarks/attention_cpu.py                       # what the docs quote; minutes
    python benchmarks/attention_cpu.py --lengths 4096 --masks bigbird causal
    python benchmarks/attention_cpu.py --quick               # a check

Float32, one row, 4 heads of size 64; forward (F) and forward with gradients (F+B). Both run in
one process, in turn, and time is the process's own, of the fastest round: other work on the
machine counts as little as it can. The dense product writes all logits out, masks and normalises
them, and lets JAX differentiate it. Density is the share of computed blocks, which the mask's own
block size or the backend's choice decides; efficiency is speed-up times density: 1 would be
perfect skipping at the dense product's speed; logits that stay in the cache may give more.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels import attention, masks
from kernels.block_sparse_attention import flash, xla

HEADS, HEAD_DIM = 4, 64
LENGTHS = (1024, 2048, 4096, 8192)
SECONDS = 6.0  # of rounds a row, at least three of them

Call = Callable[..., jax.Array]


def random_blocks(length: int, density: float, block: int) -> masks.Mask:
    """Each row of blocks sees as many others, drawn at random."""
    rows = length // block
    width = max(1, round(rows * density))
    rng = np.random.default_rng(0)
    columns = np.stack([np.sort(rng.choice(rows, width, replace=False)) for _ in range(rows)])
    return masks.BlockIndex(columns[None, None], block, block)


def at_run_time(length: int, density: float, block: int) -> masks.Mask:
    mask = random_blocks(length, density, block)
    return masks.BlockIndex(jnp.asarray(mask.columns), block, block)


# By name, for a length. Window and globals: rows of very different width.
MASKS: dict[str, Callable[[int], masks.Mask]] = {
    "full": lambda length: masks.Full(),
    "causal": lambda length: masks.Causal(),
    "1/2": lambda length: random_blocks(length, 1 / 2, 128),
    "1/4": lambda length: random_blocks(length, 1 / 4, 128),
    "1/8": lambda length: random_blocks(length, 1 / 8, 128),
    "1/8 of 64": lambda length: random_blocks(length, 1 / 8, 64),
    "1/8 at run time": lambda length: at_run_time(length, 1 / 8, 128),
    "bigbird": lambda length: masks.BigBird(64),
    "window": lambda length: masks.SlidingWindow(128, 128),
    "window, globals": lambda length: masks.SlidingWindow(128, 128) | masks.GlobalTokens(count=64),
}


def dense(q: jax.Array, k: jax.Array, v: jax.Array, mask: masks.Mask) -> jax.Array:
    """The whole product, heads first: on a CPU the faster order."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k) * HEAD_DIM**-0.5
    visible = None if isinstance(mask, masks.Full) else mask.dense(q.shape[2], k.shape[2])
    if visible is not None:
        logits = jnp.where(visible, logits, -1e30)
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.swapaxes(jnp.einsum("bhqk,bhkd->bhqd", weights, v), 1, 2)


def sparse(q: jax.Array, k: jax.Array, v: jax.Array, mask: masks.Mask) -> jax.Array:
    return attention(q, k, v, mask, backend="xla")


def with_gradients(call: Call) -> Call:
    def scalar(q, k, v):
        return jnp.sum(jnp.sin(call(q, k, v)))

    return jax.value_and_grad(scalar, argnums=(0, 1, 2))


def computed_share(mask: masks.Mask, length: int) -> float:
    """Of all blocks."""
    sizes = xla.block_sizes(length, length, HEAD_DIM, jnp.float32)
    problem = flash.make_problem(mask, length, length, sizes, scale=1.0, soft_cap=None)
    blocks = int(problem.by_row.offsets[..., -1].mean())
    return blocks * problem.block_q * problem.block_kv / problem.q_len / problem.kv_len


def fastest(calls: Sequence[Call], arguments: Sequence[jax.Array], seconds: float) -> list[float]:
    """Seconds of each call, run in turn."""
    for call in calls:
        jax.block_until_ready(call(*arguments))
    rounds, start = [], time.perf_counter()
    while len(rounds) < 3 or time.perf_counter() - start < seconds:
        rounds.append([_seconds(call, arguments) for call in calls])
    return [min(times) for times in zip(*rounds, strict=True)]


def _seconds(call: Call, arguments: Sequence[jax.Array]) -> float:
    start = time.process_time()
    jax.block_until_ready(call(*arguments))
    return time.process_time() - start


def row(length: int, name: str, seconds: float) -> str:
    """One line of the table."""
    mask = MASKS[name](length)
    rng = np.random.default_rng(0)
    shape = 1, length, HEADS, HEAD_DIM
    arguments = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3)]
    calls = [functools.partial(call, mask=mask) for call in (dense, sparse)]
    forward = fastest([jax.jit(call) for call in calls], arguments, seconds)
    both = fastest([jax.jit(with_gradients(call)) for call in calls], arguments, seconds)
    density = computed_share(mask, length)
    cells = [str(length), name, f"{density:.3f}"]
    for slow, fast in (forward, both):
        times = f"{slow * 1e3:.1f} / {fast * 1e3:.1f}"
        cells += [times, f"{slow / fast:.2f}", f"{slow / fast * density:.2f}"]
    return f"| {' | '.join(cells)} |"


def table(lengths: Sequence[int], names: Sequence[str], seconds: float) -> list[str]:
    """Markdown lines, printed as they come."""
    heads = ["F ms, dense / sparse", "F speed-up", "F efficiency"]
    heads = ["length", "mask", "density", *heads, *(h.replace("F", "F+B") for h in heads)]
    lines = [f"| {' | '.join(heads)} |", "| ---: | --- |" + " ---: |" * (len(heads) - 2)]
    print("\n".join(lines), flush=True)
    for length in lengths:
        for name in names:
            lines.append(row(length, name, seconds))
            print(lines[-1], flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    parser.add_argument("--quick", action="store_true", help="one length, three masks, few rounds")
    options = parser.parse_args(arguments)
    if options.quick:
        return table([512], ["full", "window, globals", "1/8 at run time"], seconds=0.0)
    return table(options.lengths, options.masks, SECONDS)


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    main()
