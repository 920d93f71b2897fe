"""How fast each objective makes examples, on one core: raw tokens a second, at rows of 512 tokens.

    python benchmarks/corruption.py                # every page of gin_configs/objectives
    python benchmarks/corruption.py ul2 electra    # some of them

A page is measured on every architecture that its objective trains, from the store to the example
(reading and corruption, no layout). Statistics that an objective keeps of the corpus are built
before the clock starts; their own speed is printed beside.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from launch import config as config_lib
from launch.pages import PAGES
from objectives.base import Objective, Setting
from t5like.data.corpus import Corpus, build_corpus
from t5like.data.pipeline import Component
from t5like.data.sources.python_stdlib import PythonSource
from t5like.data.stream import ExampleStream
from t5like.data.vocabularies.trained import TrainedVocabulary

LENGTH, SECONDS = 512, 1.5
QUICKSTART = "gin_configs/runs/quickstart.gin"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="pages of gin_configs/objectives, without .gin")
    names = parser.parse_args().names
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(measured(names))


def measured(names: list[str] | None = None) -> str:
    """The table of these pages; of all without names, but those that need a teacher's run."""
    pages = (p.stem for p in (PAGES / "objectives").glob("*.gin"))
    names = names or sorted(name for name in pages if not name.startswith("distillation"))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        source = PythonSource(content="prose")
        vocabulary = TrainedVocabulary(8000, extra_ids=300).resolve(source, folder)
        corpus = build_corpus(source, vocabulary, folder / "store", workers=1, progress=False)
        about = f"{corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens; one core"
        return f"{about}\n\n{table(names, corpus, vocabulary, folder)}"


def table(names: list[str], corpus: Corpus, vocabulary, cache: pathlib.Path) -> str:
    """A markdown row for each page and architecture."""
    lines = ["| objective | trains | M tokens/s | corpus statistics, M tokens/s |"]
    lines.append("| --- | --- | ---: | ---: |")
    for page in names:
        pages = [QUICKSTART, f"gin_configs/objectives/{page}.gin"]
        objective = config_lib.load(pages).run.objective
        for architecture in objective.architectures:
            setting = Setting(architecture, vocabulary, LENGTH, corpus=corpus, cache_dir=cache)
            start = time.perf_counter()
            bound = objective.bind(setting)
            made, built = tokens_per_second(bound, corpus, start)
            cells = page, architecture, f"{made / 1e6:.2f}", statistics(built)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tokens_per_second(bound: Objective, corpus: Corpus, start: float) -> tuple[float, float]:
    """(Of making examples, of whatever was built before the first one)."""
    components = [
        Component(f"{track}/{name}", corpus, part, rate)
        for track, objective in bound.tracks().items()
        for name, (part, rate) in objective.components().items()
    ]
    read = ExampleStream(components, 0, shuffle=True).reader()
    read(0)
    built = time.perf_counter() - start
    tokens, index, began = 0, 1, time.perf_counter()
    while (now := time.perf_counter()) - began < SECONDS:
        tokens += sum(len(read(i).record.tokens) for i in range(index, index + 50))
        index += 50
    return tokens / (now - began), corpus.num_tokens / built


def statistics(built: float) -> str:
    """Tokens a second of the statistics, where there are any (binding alone is far faster)."""
    return f"{built / 1e6:.2f}" if built < 20e6 else ""


if __name__ == "__main__":
    main()
