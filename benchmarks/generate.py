"""Our cached greedy decoding beside PyTorch transformers' `generate`, in turn, on a CPU.

    .venv-peers/bin/python -m benchmarks.generate --out benchmarks/generate.md   # minutes
    python -m benchmarks.generate --alone --cases Llama --rounds 1               # a check

The T5 and the Llama of benchmarks/train_step.py, float32, random weights, ours copied into theirs;
8 rows, T5 reading 256 tokens and Llama a prompt of 64, each writing 64 more: nothing ends early.
Ours is `Generator.generate`, what a user calls, host work included. transformers' is the fastest of
four settings: plain or SDPA attention with its growing cache, its static cache, and that compiled.

Nobody is timed unchecked: the tokens of both are equal, all 512.

A figure is the median of the rounds, with the lowest and the highest; a ratio is of tokens a
second, ours over theirs, within a round.
"""

from __future__ import annotations

import argparse
import gc
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import side_by_side
from benchmarks.side_by_side import Contender, Page, attempted, fastest, race, rows
from benchmarks.train_step_cases import CASES, Case
from t5like.inference.compiled import Decoding
from t5like.inference.generate import Generator
from t5like.models.transformer import init_parameters

NAMES = ("T5", "Llama")
PROMPT = {"T5": 256, "Llama": 64}
HEADS = ("model", "", "tokens/s", "lowest to highest", "CPU s", "ours over it", "tokens")
# (attention, its static cache, compiled)
SETTINGS = (
    ("eager", False, False),
    ("sdpa", False, False),
    ("sdpa", True, False),
    ("sdpa", True, True),
)


def sharp_parameters(case: Case, seed: int = 0) -> dict[str, Any]:
    """Fresh parameters, the output layer's ten times as large: no near ties among logits."""
    params = jax.jit(lambda key: init_parameters(case.config, key))(jax.random.key(seed))
    params["head"]["kernel"] = 10 * params["head"]["kernel"]
    return jax.tree.map(np.array, jax.device_get(params))


def prompts(case: Case, rows: int, length: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return list(rng.integers(4, case.config.vocab_size, (rows, length), np.int32))


def our_generate(
    case: Case, params: dict[str, Any], inputs: list[np.ndarray], new_tokens: int
) -> Callable[[], np.ndarray]:
    """() -> int [B, T], through a vocabulary that ends nothing."""
    vocabulary = types.SimpleNamespace(
        size=case.config.vocab_size, pad_id=0, bos_id=0, eos_id=None, decode=lambda ids: ""
    )
    generator = Generator(case.config, jax.device_put(params), vocabulary)
    decoding = Decoding(max_new_tokens=new_tokens)

    def call() -> np.ndarray:
        return np.stack([found[0].tokens for found in generator.generate(inputs, decoding)])

    return call


def torch_generate(
    case: Case,
    params: dict[str, Any],
    inputs: list[np.ndarray],
    new_tokens: int,
    setting: tuple[str, bool, bool],
) -> Callable[[], np.ndarray]:
    """The same of transformers."""
    import torch

    from benchmarks.peer_models import peer_model

    attention, static, compiled = setting
    model = peer_model(case, {"model": params}, attention).eval()
    ids = np.stack(inputs).astype(np.int64)
    if case.name == "Llama":
        ids = np.pad(ids, ((0, 0), (1, 0)))  # our layout's BOS
    ids = torch.from_numpy(ids)
    options = dict(max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0)
    if static:
        options["cache_implementation"] = "static"
    if compiled:
        model.forward = torch.compile(model.forward)
    model.generation_config.eos_token_id = None

    def call() -> np.ndarray:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return found[:, -new_tokens:].numpy()

    return call


def best_of_torch(case: Case, make: Callable, expected: np.ndarray) -> Contender:
    """The fastest of SETTINGS whose tokens are ours; the speed of each is printed."""
    found = []
    for setting in SETTINGS:
        attention, static, compiled = setting
        name = "PyTorch: " + ("SDPA" if attention == "sdpa" else "plain attention")
        name += (", static cache" if static else "") + (", compiled" if compiled else "")

        def first(setting=setting) -> tuple[Callable, np.ndarray]:
            call = make(setting)
            return call, call()

        served = attempted(f"{case.name}, {name}", first)
        if served is None:
            continue
        call, tokens = served
        check(tokens, expected, name)
        found.append(Contender(name, call, f"{tokens.size} equal"))
    best = fastest(found, calls=1)
    for contender in found:
        rate = expected.size / min(contender.seconds)
        print(f"{case.name}, {contender.name}: {rate:.0f} tokens/s", flush=True)
    return best.reset()


def check(tokens: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Raises AssertionError unless the tokens are equal."""
    if not np.array_equal(tokens, expected):
        raise AssertionError(f"{name} writes {np.mean(tokens == expected):.1%} of our tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes the table; returns the exit status."""
    options = parse(arguments)
    command = f"python -m benchmarks.generate --rounds {options.rounds}"
    page = Page("Greedy decoding side by side", command, HEADS, options.out)
    for name in options.cases:
        case = CASES[name]
        params = sharp_parameters(case)
        work = case, params, prompts(case, options.rows, options.length or PROMPT[name])
        call = our_generate(*work, options.new_tokens)
        expected = call()
        contenders = [Contender("ours", call, f"{expected.size}")]
        if not options.alone:
            make = lambda setting, work=work: torch_generate(*work, options.new_tokens, setting)  # noqa: E731
            contenders.append(best_of_torch(case, make, expected))
        race(contenders, options.rounds, calls=1)
        for cells in rows(name, expected.size, contenders):
            page.row(cells)
        del contenders
        gc.collect()
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, help="of a prompt; 256 for T5 and 64 for Llama")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--alone", action="store_true", help="without PyTorch")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
