"""Model FLOPs utilisation of our train step on one accelerator.

    python -m benchmarks.train_step --hardware --out train_step_gpu.md       # the whole scan
    python -m benchmarks.train_step --hardware --models decoder --rows 8 --remat none dots
    python -m benchmarks.train_step --hardware --tiny                        # a CPU: a check

No GPU has run it yet: the docs quote no figure of it. It needs jax, flax, optax, grain, gin-config
and absl-py, no peer and no data. A T5 1.1 base on 512 and 114 tokens and a decoder of 350 M
parameters (24 layers of width 1024, Llama's) on 4,096 train in bfloat16, parameters and AdamW in
float32, for each number of rows and each setting of remat that fit the memory.

MFU is model FLOPs a second over the device's peak (t5like/training/peaks.py). Model FLOPs are those
of t5like/models/flops.py: forward and twice that backward, causal self-attention by half of its
square, recomputation not counted; figures that count the whole square are higher at long rows.

Nothing is timed unchecked: on one row, the loss in bfloat16 as timed agrees with that in float32
through the plain XLA attention to a hundredth. A time is the median of --rounds rounds of --steps
steps, enqueued one after another and waited for once.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Iterator, Sequence

import jax

from benchmarks import side_by_side
from benchmarks.side_by_side import Page
from benchmarks.train_step_cases import LLAMA, T5, Case, ours
from objectives.causal_lm import CausalLM
from objectives.span_corruption import SpanCorruption
from t5like.models.flops import parameter_count
from t5like.training.peaks import peak_flops
from t5like.training.step import run_key

TOLERANCE = 0.01
HEADS = ("model", "rows x tokens, remat", "ms a step", "lowest to highest", "tokens/s")
HEADS += ("TFLOP/s", "MFU", "memory, GB")

BASE = dataclasses.replace(T5, num_layers=12, d_model=768, d_ff=2048, num_heads=12)
DECODER = dataclasses.replace(
    LLAMA, num_layers=24, d_model=1024, d_ff=2816, num_heads=16, num_kv_heads=None
)
CASES = {
    "T5 base": Case("T5 base", BASE, SpanCorruption(z_loss=0.0), length=512, targets=114),
    "decoder": Case("decoder", DECODER, CausalLM(z_loss=0.0), length=4096),
}
ROWS = {"T5 base": (32, 64, 128), "decoder": (4, 8, 16)}


def scan(options: argparse.Namespace) -> Iterator[Case]:
    """Cases in bfloat16, of each number of rows and setting of remat."""
    for name in options.models:
        case = tiny(CASES[name]) if options.tiny else CASES[name]
        for remat in options.remat:
            config = dataclasses.replace(case.config, dtype="bfloat16", remat=remat)
            for rows in options.rows or ROWS[name]:
                yield dataclasses.replace(case, config=config, rows=rows)


def tiny(case: Case) -> Case:
    """The same on a laptop."""
    small = dict(num_layers=1, d_model=64, d_ff=128, num_heads=2, num_kv_heads=None, head_dim=32)
    config = dataclasses.replace(case.config, vocab_size=512, **small)
    targets = None if case.targets is None else 16
    return dataclasses.replace(case, config=config, length=64, targets=targets)


def check(case: Case) -> float:
    """The loss of one row; AssertionError unless it agrees with float32's."""
    one = dataclasses.replace(case, rows=1)
    plain = dataclasses.replace(
        one.config, dtype="float32", attention_backend="xla", remat="none"
    )
    runner, key = ours(one), run_key(0, 1)
    params, batch = runner.state.params, jax.device_put(one.batch())
    found = float(runner.loss(params, batch, key))
    with jax.default_matmul_precision("highest"):
        reference = ours(dataclasses.replace(one, config=plain), params=params)
        wanted = float(reference.loss(params, batch, key))
    if not abs(found - wanted) <= TOLERANCE * wanted:
        raise AssertionError(f"{case.name}: loss {found} in bfloat16, {wanted} in float32")
    return found


def seconds(case: Case, rounds: int, steps: int) -> list[float]:
    """Of a step, a round each, sorted."""
    runner, key = ours(case), run_key(0, 1)
    batch = jax.device_put(case.batch())

    def a_round() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            metrics = runner.step(batch, key)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / steps

    a_round()  # compiles
    return sorted(a_round() for _ in range(rounds))


def cells(case: Case, times: list[float]) -> list[str]:
    """Under HEADS."""
    took, device = statistics.median(times), jax.devices()[0]
    rate = case.bound.train_flops(case.config, case.batch()) / took
    peak, used = peak_flops(device), (device.memory_stats() or {}).get("peak_bytes_in_use")
    length = f"{case.length}" + (f"/{case.targets}" if case.targets else "")
    return [
        f"{case.name}, {parameter_count(case.config) / 1e6:.0f} M",
        f"{case.rows} x {length}, {case.config.remat}",
        f"{took * 1e3:.1f}",
        f"{times[0] * 1e3:.1f} to {times[-1] * 1e3:.1f}",
        f"{case.tokens / took:.0f}",
        f"{rate / 1e12:.3g}",
        f"{rate / peak:.1%}" if peak else "",
        f"{used / 1e9:.1f}" if used else "",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table as it comes; returns the exit status."""
    options = parse(arguments)
    title = f"Train steps on {jax.devices()[0].device_kind}"
    page = Page(title, "python -m benchmarks.train_step --hardware", HEADS, options.out)
    checked = set()
    for case in scan(options):
        try:
            if (case.name, case.config) not in checked:
                check(case)
                checked.add((case.name, case.config))
            page.row(cells(case, seconds(case, options.rounds, options.steps)))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            page.row([case.name, f"{case.rows} rows, {case.config.remat}", "out of memory"])
        gc.collect()
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rows", nargs="+", type=int, help="of a batch")
    parser.add_argument(
        "--remat", nargs="+", default=["none", "dots", "full"], choices=["none", "dots", "full"]
    )
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to check the script")
    return parser.parse_args(arguments)
