"""Prefetching of batches. grain is the executor only; the step is the only state."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
from collections.abc import Iterator

import numpy as np
from absl import flags

from t5like.data.pipeline import Pipeline
from t5like.data.processes import die_with_parent

_ENDLESS = 1 << 48


@dataclasses.dataclass(frozen=True)
class _Steps:
    """A random-access source whose i-th element is the batch of step start + i."""

    pipeline: Pipeline
    start: int
    rows: tuple[range, ...] | None

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i) -> tuple[int, dict[str, np.ndarray]]:
        _watch_parent()
        step = self.start + int(i)
        return step, self.pipeline.batch(step, self.rows)


@functools.cache
def _watch_parent() -> None:
    """Has a worker end with its parent, which may be killed; grain's would wait for ever."""
    if multiprocessing.parent_process() is not None:
        die_with_parent()


def load(
    pipeline: Pipeline,
    start_step: int = 0,
    *,
    workers: int = 0,
    prefetch: int = 2,
    rows: tuple[range, ...] | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Batches from `start_step` on, in order and without end, whatever the number of workers.

    Args:
      pipeline: where batches come from.
      start_step: the first step.
      workers: processes that make batches; 0 makes them in a thread of this one.
      prefetch: batches kept ready (by each worker).
      rows: ranges of rows of each global batch that this process reads; None: all.

    Yields:
      (step, {feature: [B, L]}), B the number of those rows.
    """
    import grain  # takes seconds, and imports jax: not for who only wants batch(step)

    # The first batch is made here: worker processes take seconds to start.
    steps = _Steps(pipeline, start_step + 1, rows)
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    batches = grain.MapDataset.source(steps).to_iter_dataset(read)
    if workers:
        # grain reads absl flags when it starts processes; outside absl's app nobody parses them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
        )
    iterator = iter(batches)
    iterator.start_prefetch()
    try:
        yield start_step, pipeline.batch(start_step, rows)
        for step, batch in iterator:
            # Workers hand over shared memory that must be given back: copy it at once.
            yield step, {name: np.array(array) for name, array in batch.items()}
    finally:
        iterator.close()
