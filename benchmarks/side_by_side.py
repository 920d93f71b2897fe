"""Contenders timed in turn in one process, and the markdown table of them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


@dataclasses.dataclass
class Contender:
    """Someone to be timed.

    Attributes:
      call: the work, waited for.
      shown: of its check, in the table's last column.
      seconds, cpu: of a call, one a round; CPU time is of all threads.
    """

    name: str
    call: Callable[[], object]
    shown: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def round(self, calls: int) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            self.call()
        self.seconds.append((time.perf_counter() - start) / calls)
        self.cpu.append((time.process_time() - cpu) / calls)

    def reset(self) -> Contender:
        """Itself, not yet timed."""
        return dataclasses.replace(self, seconds=[], cpu=[])


def parser(description: str | None) -> argparse.ArgumentParser:
    """A benchmark's command line, with the rounds of a race and the page to write."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--out", type=pathlib.Path, help="a file for the same markdown")
    return made


def race(contenders: Sequence[Contender], rounds: int, calls: int) -> None:
    """Rounds of calls in turn; who begins changes from round to round."""
    for r in range(rounds):
        shift = r % len(contenders)
        for contender in (*contenders[shift:], *contenders[:shift]):
            contender.round(calls)


def attempted(name: str, first: Callable[[], T]) -> T | None:
    """What a setting's first calls give; None, and said why, where they raise: a setting that does
    not serve must not end the race."""
    try:
        return first()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
        return None


def fastest(contenders: Sequence[Contender], calls: int) -> Contender:
    """The one with the fastest of two rounds."""
    for contender in contenders:
        contender.round(calls)
        contender.round(calls)
    return min(contenders, key=lambda contender: min(contender.seconds))


def rows(title: str, tokens: int, contenders: Sequence[Contender]) -> list[list[str]]:
    """A table's cells; the first contender is ours.

    Args:
      tokens: of a call.
    """
    ours, cells = contenders[0], []
    for contender in contenders:
        rates = [tokens / s for s in contender.seconds]
        ratios = [theirs / s for theirs, s in zip(contender.seconds, ours.seconds, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        cells.append([
            title,
            contender.name,
            f"{statistics.median(rates):.0f}",
            f"{min(rates):.0f} to {max(rates):.0f}",
            f"{statistics.median(contender.cpu):.2f}",
            "" if contender is ours else ratio,
            contender.shown,
        ])  # fmt: skip
    return cells


class Page:
    """A markdown page with one table, printed and written as it comes."""

    def __init__(self, title: str, command: str, heads: Sequence[str], out: pathlib.Path | None):
        self._out, self._lines = out, []
        if out is None:
            self.add(surroundings(), "")
        else:
            self.add(f"# {title}", "", f"Made by `{command}`; {surroundings()}.", "")
        self.row(heads)
        self.row(["---"] * 2 + ["---:"] * (len(heads) - 2))

    def row(self, cells: Sequence[str]) -> None:
        self.add(f"| {' | '.join(cells)} |")

    def add(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        self._lines += lines
        if self._out is not None:
            self._out.write_text("\n".join([*self._lines, ""]))


def surroundings() -> str:
    """Versions, cores and load: what a figure depends on."""
    names = ("jax", "torch", "transformers")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{', '.join(found)}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"
