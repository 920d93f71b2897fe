"""Our train step beside PyTorch transformers', in turn, in one process on a CPU.

    make peers                              # PyTorch and transformers, in .venv-peers
    .venv-peers/bin/python -m benchmarks.train_step --out benchmarks/train_step.md   # minutes
    python -m benchmarks.train_step --cases BERT --rounds 2 --steps 1 --alone        # a check
    python -m benchmarks.train_step --hardware  # an accelerator: MFU, no peer needed

Float32, dropout 0, random tokens, AdamW without clipping. Ours is the step that a run compiles,
its state donated; it also computes the accuracy and the norms that a run logs. PyTorch's is the
fastest of five settings, timed beforehand: plain or SDPA attention, eager or torch.compile, unfused
or fused AdamW.

Nobody is timed unchecked: all start from our weights, and their losses before the first update and
before the second agree with ours to 1e-4, relative. ELECTRA's samples are then the likeliest
tokens; while timed, both sides sample.

BERT and ELECTRA ask for 15% of the tokens, and our losses compute logits for those alone, where
transformers computes them all: that part of the gain is algorithmic. The row "ours, all logits"
does without it.

T5X's network is no contender, for it cannot be installed: no package of it that an index has
imports, and its sources as stored are not of one commit.

A round is --steps updates of each contender, in turn; a figure is the median of the rounds, with
the lowest and the highest. A ratio is of tokens a second, ours over theirs, within a round. CPU
time is of all threads, and includes what waiting ones spin. PyTorch's threads wait for each other
at every operation, so that other work on the machine slows it down more than it does us: race on
an idle machine, or on one core (`taskset --cpu-list 0`) and look at CPU time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks import side_by_side
from benchmarks.side_by_side import Contender, Page, attempted, fastest, race, rows
from benchmarks.train_step_cases import CASES, Case, ours
from t5like.training.step import run_key

TOLERANCE = 1e-4
HEADS = ("model", "", "tokens/s", "lowest to highest", "CPU s a step", "ours over it", "losses")
Losses = tuple[float, float]


def our_contender(case: Case, all_logits: bool = False) -> tuple[Contender, Losses, dict]:
    """Ours, its losses before two updates, and the weights that it started from."""
    objective = case.bound
    if all_logits:
        objective = dataclasses.replace(objective, rate=1.0)
    # What is checked takes the likeliest samples, what is timed draws them.
    sure = {"temperature": 0.0} if case.name == "ELECTRA" else {}
    batch, key = jax.device_put(case.batch()), run_key(0, 1)
    checked = ours(case, dataclasses.replace(objective, **sure))
    params = jax.tree.map(np.array, jax.device_get(checked.state.params))
    losses = []
    for _ in range(2):
        losses.append(float(checked.loss(checked.state.params, batch, key)))
        checked.step(batch, key)
    timed = ours(case, objective, params) if sure else checked
    timed.step(batch, key)  # compiles

    def step() -> None:
        jax.block_until_ready(timed.step(batch, key))

    name = "ours, all logits" if all_logits else "ours"
    return Contender(name, step, shown(losses)), tuple(losses), params


def torch_contender(case: Case, params: dict, expected: Losses, options) -> Contender:
    """PyTorch at its best setting, checked; the speed of each is printed."""
    from benchmarks.train_step_torch import SETTINGS, Peer, tensors

    batch, found = tensors(case.batch()), []
    for setting in SETTINGS[2:3] if options.quick else SETTINGS:

        def first(setting=setting) -> tuple[Peer, Losses]:
            peer = Peer(case, params, setting)
            return peer, tuple(float(peer.step(batch, temperature=0.0)) for _ in range(2))

        served = attempted(f"{case.name}, PyTorch: {setting}", first)
        if served is None:
            continue
        peer, losses = served
        check(str(setting), losses, expected)
        peer.step(batch)

        def step(peer: Peer = peer) -> None:
            peer.step(batch)

        found.append(Contender(f"PyTorch: {setting}", step, shown(losses)))
    best = fastest(found, options.steps)
    for contender in found:
        print(f"{case.name}, {contender.name}: {case.tokens / min(contender.seconds):.0f} tokens/s")
    return best.reset()


def check(name: str, losses: Losses, expected: Losses) -> None:
    """Raises AssertionError unless both losses are the expected ones."""
    for updates, (found, wanted) in enumerate(zip(losses, expected, strict=True)):
        if not abs(found - wanted) <= TOLERANCE * abs(wanted):
            raise AssertionError(f"{name}: loss {found} after {updates} updates, ours is {wanted}")


def shown(losses: Sequence[float]) -> str:
    return " then ".join(f"{loss:.5f}" for loss in losses)


def contenders_of(case: Case, options: argparse.Namespace) -> list[Contender]:
    """Ours first, then who is there to race against, all checked."""
    first, losses, params = our_contender(case)
    found = [first]
    if hasattr(case.objective, "rate"):
        everywhere, its_losses, _ = our_contender(case, all_logits=True)
        check(everywhere.name, its_losses, losses)
        found.append(everywhere)
    if not options.alone:
        found.append(torch_contender(case, params, losses, options))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table as it comes; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--hardware" in arguments:
        from benchmarks import train_step_hardware

        arguments.remove("--hardware")
        return train_step_hardware.main(arguments)
    options = parse(arguments)
    command = f"python -m benchmarks.train_step --rounds {options.rounds} --steps {options.steps}"
    page = Page("Train steps side by side", command, HEADS, options.out)
    for name in options.cases:
        contenders = contenders_of(CASES[name], options)
        race(contenders, options.rounds, options.steps)
        for cells in rows(name, CASES[name].tokens, contenders):
            page.row(cells)
        del contenders
        gc.collect()
    page.add("", f"Load at the end: {os.getloadavg()[0]:.1f}.")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--steps", type=int, default=3, help="updates a contender and round")
    parser.add_argument("--alone", action="store_true", help="without PyTorch")
    parser.add_argument("--quick", action="store_true", help="one of PyTorch's settings alone")
    parser.add_argument("--hardware", action="store_true", help="see train_step_hardware.py")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
