"""Text to tokens on disk, once: parallel, restartable, flat in memory.

build_corpus(source, vocabulary, directory) -> Corpus
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import logging
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from t5like.data import parts
from t5like.data.atomic import local, writing
from t5like.data.processes import die_with_parent
from t5like.data.sources.base import Source
from t5like.data.store import FORMAT, INDEX, Corpus
from t5like.errors import UserError

_logger = logging.getLogger(__name__)

__all__ = ["Corpus", "build_corpus", "corpus_fingerprint"]


def corpus_fingerprint(source: Source, vocabulary: Any) -> str:
    """The fingerprint of the store that `source` and `vocabulary` give; a name for it too."""
    key = f"{FORMAT}/{source.fingerprint()}/{vocabulary.fingerprint()}"
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def build_corpus(
    source: Source,
    vocabulary: Any,
    directory: str | os.PathLike,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Corpus:
    """Tokenises `source` into a store in `directory`, or opens the one that is there.

    The bytes of the store depend on source and vocabulary alone. A build that was killed goes on
    where it stopped: finished shards are kept. A second process waits for the first, if the file
    system knows locks.

    Args:
      source: where the documents come from.
      vocabulary: makes the tokens.
      directory: a local directory of this store's own.
      workers: processes; None is one a core. A source of one shard is built in this process.
      progress: whether to show a progress bar (only where the output is a terminal).

    Raises:
      UserError: the source cannot be read or has no token, the disk is full, or the directory
        holds a store of another source or vocabulary.
    """
    directory = local(directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        if not (directory / INDEX).exists():
            _build(source, vocabulary, directory, workers or os.cpu_count() or 1, progress)
    corpus = Corpus.open(directory, vocabulary)
    if corpus.index["source_fingerprint"] != source.fingerprint():
        raise UserError(
            f"the store {directory} was built from {corpus.index['source']}, not from {source} "
            "(or the files have changed since): use another directory, or delete this one"
        )
    return corpus


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    with writing(directory):
        (directory / ".lock").touch()
    with open(directory / ".lock", "wb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as e:
            # Some shared file systems have no locks. Processes of one run take turns anyway.
            _logger.info("%s cannot be locked (%s)", directory, e.strerror)
        yield


def _build(source: Source, vocabulary: Any, directory: pathlib.Path, workers: int, show: bool):
    fingerprint = corpus_fingerprint(source, vocabulary)
    num_shards = source.num_shards()
    folder = directory / f"parts-{fingerprint}-of-{num_shards}"
    with writing(folder):
        folder.mkdir(exist_ok=True)
    summaries = _write_parts(source, vocabulary, folder, num_shards, workers, show)
    broken = sum(sum(summary["skipped"].values()) for summary in summaries)
    if broken:
        _logger.warning("%s: %d broken records skipped", source, broken)
    if not any(summary["num_tokens"] for summary in summaries):
        empty = sum(summary["empty"] for summary in summaries)
        raise UserError(
            f"{source} has no text: the corpus would be empty ({empty} empty documents, {broken} "
            "broken ones skipped)"
        )
    stems = [folder / f"{shard:06d}" for shard in range(num_shards)]
    index = {
        "fingerprint": fingerprint,
        "source": str(source),
        "source_fingerprint": source.fingerprint(),
        "vocabulary": str(vocabulary),
        "vocabulary_fingerprint": vocabulary.fingerprint(),
        "dtype": parts.token_dtype(vocabulary).name,
    }
    parts.merge(list(zip(stems, summaries, strict=True)), directory, index)
    for left_over in directory.glob("parts-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    for left_over in directory.glob("*.tmp"):
        left_over.unlink(missing_ok=True)


def _write_parts(source, vocabulary, folder, num_shards, workers, show) -> list[dict[str, Any]]:
    write = functools.partial(parts.write_part, source, vocabulary)
    with _progress_bar(num_shards, show) as (advance, finish):
        if min(workers, num_shards) == 1:
            summaries = []
            for shard in range(num_shards):
                summaries.append(write(shard, num_shards, folder, advance))
                finish()
            return summaries
        return _in_processes(write, num_shards, folder, min(workers, num_shards), advance, finish)


def _in_processes(write, num_shards, folder, workers, advance, finish) -> list[dict[str, Any]]:
    # spawn: forking a process that runs JAX or TensorFlow threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, die_with_parent) as pool:
        futures = [pool.submit(write, shard, num_shards, folder) for shard in range(num_shards)]
        try:
            for future in concurrent.futures.as_completed(futures):
                advance(future.result()["num_tokens"])
                finish()
        except concurrent.futures.process.BrokenProcessPool as e:
            raise UserError(
                "a tokenising process was killed (out of memory?): run again with fewer workers; "
                "finished parts are kept"
            ) from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures]


@contextlib.contextmanager
def _progress_bar(num_shards: int, show: bool) -> Iterator[tuple[Callable, Callable]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("tokenising"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} shards, {task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
        console=console,
        disable=not (show and console.is_terminal),
    )
    with bar:
        task = bar.add_task("tokenising", total=num_shards, tokens=0)

        def advance(tokens: int) -> None:
            bar.update(task, tokens=bar.tasks[0].fields["tokens"] + tokens)

        yield advance, lambda: bar.advance(task)
