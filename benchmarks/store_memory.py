"""Resident memory while a store is built and read: flat, whatever the size of the text.

    python benchmarks/store_memory.py --megabytes=1000

Generates text, builds a store from it, then reads every token in order and many windows at
random, each in a process of its own, and prints the peak resident memory of each as JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable

import numpy as np

from t5like.data.corpus import Corpus, build_corpus
from t5like.data.sources import TextSource
from t5like.data.vocabularies import ByteVocabulary, SentencePieceVocabulary


def generate(path: pathlib.Path, megabytes: int) -> None:
    """Lines of words drawn from a fixed list, about a hundred words a line."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlu", np.uint8)
    words = [bytes(rng.choice(letters, rng.integers(2, 9))).decode() for _ in range(20_000)]
    with open(path, "w") as stream:
        while stream.tell() < megabytes << 20:
            draws = rng.integers(0, len(words), (500, 100))
            stream.writelines(" ".join(words[i] for i in row) + "\n" for row in draws)


def build(path: str, model: str | None, directory: str, workers: int) -> dict[str, float]:
    """Builds the store and says how fast."""
    vocabulary = SentencePieceVocabulary(model) if model else ByteVocabulary()
    start = time.perf_counter()
    corpus = build_corpus(TextSource(path, "line"), vocabulary, directory, workers=workers)
    seconds = time.perf_counter() - start
    return {"tokens": corpus.num_tokens, "tokens_per_second": corpus.num_tokens / seconds}


def read(directory: str) -> dict[str, float]:
    """Reads all tokens in order, then a hundred thousand windows of 512 at random."""
    corpus = Corpus.open(directory)
    start, total = time.perf_counter(), 0
    for begin in range(0, corpus.num_tokens, 1 << 16):
        total += len(corpus.tokens(begin, min(begin + (1 << 16), corpus.num_tokens)))
    for begin in np.random.default_rng(0).integers(0, corpus.num_tokens - 512, 100_000):
        total += len(corpus.tokens(int(begin), int(begin) + 512))
    return {"tokens_per_second": total / (time.perf_counter() - start)}


def _measured(function: Callable, arguments: tuple, connection) -> None:
    result = function(*arguments)
    peaks = [
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    connection.send({**result, "peak_resident_mb": max(peaks) / 1024})


def in_own_process(function: Callable, *arguments) -> dict[str, float]:
    """The function's result, and the peak memory of the largest of its processes."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(function, arguments, send))
    process.start()
    send.close()
    result = receive.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the text")
    parser.add_argument("--model", help="a SentencePiece model; bytes if not given")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text, store = pathlib.Path(folder, "text.txt"), str(pathlib.Path(folder, "store"))
        generate(text, options.megabytes)
        built = in_own_process(build, str(text), options.model, store, options.workers)
        print(json.dumps({"build": built, "read": in_own_process(read, store)}, indent=1))


if __name__ == "__main__":
    main()
