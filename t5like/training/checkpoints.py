"""Checkpoints of a run: saved in the background, whole or not at all, verified before use.

The only module that imports orbax. A checkpoint is a directory `<step>` holding orbax's arrays,
`config.gin` and `checkpoint.json` (see manifest.py). Orbax writes it under a temporary name and
renames it when all is in place; in an object store, where that is no single step, it writes it
where it will be and adds `commit_success.txt` in the end, without which it does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from t5like.data.atomic import is_remote
from t5like.errors import UserError
from t5like.training import distributed, manifest, signature
from t5like.training.state import TrainState

_ASIDE = ".damaged"
_LEAVING = ".deleted"
_MARK = ".seen-by-all-"
# Seconds that a save may take in the background, and a file to be seen from another machine.
_SAVE_SECONDS, _SEEN_SECONDS = 3600, 60


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      directory: usually WORKDIR/checkpoints; made when missing.
      keep: how many of the newest to keep.
      best_metric: name in the metrics given to `save` whose lowest value marks a checkpoint that
        is kept as well; None keeps the newest only.
      points: steps whose checkpoints are kept as well.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int = 3,
        best_metric: str | None = None,
        points: frozenset[int] = frozenset(),
    ):
        if keep < 1:
            raise UserError(f"keep={keep}: at least the newest checkpoint has to be kept")
        self.directory = absolute(directory)
        self._keep, self._best_metric, self._points = keep, best_metric, points
        self._is_first = distributed.process_index() == 0
        self._handler = _Handler()
        self._writer = ocp.AsyncCheckpointer(self._handler, timeout_secs=_SAVE_SECONDS)
        self._pending: int | None = None
        with _naming(self.directory), distributed.first_alone("checkpoints"):
            self.directory.mkdir(parents=True, exist_ok=True)
            if self._is_first:
                self._sweep()
        self._check_shared()

    def steps(self) -> list[int]:
        """Steps of all finished checkpoints, rising; finished is not yet verified."""
        return steps_in(self.directory)

    def save(self, state: Any, info: dict[str, Any], config_text: str) -> None:
        """Starts a save of `state` at `state.step`; returns when the device arrays are copied.

        Args:
          state: a TrainState with finite parameters.
          info: JSON-like, kept in checkpoint.json; "step" and, where known, "metrics" are read
            by this class.
          config_text: the resolved configuration, kept as config.gin.

        Raises:
          UserError: this save or the one before it failed (a full disk); earlier checkpoints
            are untouched.
        """
        self.wait()
        step = int(info["step"])
        self._handler.manifest = {**info, "arrays": signature.of(_tree(state))}, config_text
        with _naming(self.directory):
            self._writer.save(self.directory / str(step), args=_SaveArgs(_tree(state)))
        self._pending = step

    def wait(self) -> None:
        """Blocks until the save under way, if any, is finished; deletes what need not be kept."""
        if self._pending is None:
            return
        self._pending = None
        with _naming(self.directory):
            self._writer.wait_until_finished()
            if self._is_first:
                self._delete_old()

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics that were found later to the info of a finished checkpoint."""
        self.wait()
        if self._is_first:
            with _naming(self.directory):
                manifest.add_metrics(self.directory / str(step), metrics)

    def close(self) -> None:
        """Waits for the save under way and ends the background threads."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def restore_latest(
        self, template: Any, check: Callable[[dict[str, Any]], None] = lambda info: None
    ) -> tuple[Any, dict[str, Any]] | None:
        """The newest good checkpoint, or None where no checkpoint was ever finished.

        Damaged ones are warned about and put aside (renamed, never deleted or overwritten). All
        processes take the same one, each reads its own shards of it, whoever wrote them.

        Args:
          template: a tree of jax.ShapeDtypeStruct with shardings, shaped like the state.
          check: called with a checkpoint's info before its arrays are read; may raise.

        Returns:
          (state, info).

        Raises:
          UserError: the parameters differ from the template's; or every checkpoint is damaged.
        """
        self.wait()
        damaged = []
        for step in reversed(distributed.gather("steps", self.steps())[0]):
            path = self.directory / str(step)
            try:
                info = manifest.verify(path)
                check(info)
                signature.compare(info["arrays"], signature.of(_tree(template)), path)
                state = _read(self._writer, path, template)
            except manifest.Damaged as problem:
                if self._is_first:
                    logging.warning("checkpoint %s is damaged and is not used: %s", path, problem)
                damaged.append(path)
                continue
            self._put_aside(damaged)
            return state, info
        if damaged:
            raise UserError(
                f"no checkpoint in {self.directory} can be used: all of {len(damaged)} are "
                "damaged (see the warnings above); put one back from a copy, or start afresh in "
                "another workdir"
            )
        return None

    def _put_aside(self, damaged: list[epath.Path]) -> None:
        for path in damaged if self._is_first else ():
            target, count = path.parent / f"{path.name}{_ASIDE}", 1
            while target.exists():
                target, count = path.parent / f"{path.name}{_ASIDE}{count}", count + 1
            with _naming(path):
                path.rename(target)

    def _delete_old(self) -> None:
        steps = self.steps()
        kept = set(steps[-self._keep :]) | self._best(steps) | self._points
        for step in steps:
            if step not in kept:
                _delete(self.directory / str(step))

    def _best(self, steps: list[int]) -> set[int]:
        if self._best_metric is None:
            return set()
        values = {}
        for step in steps:
            try:
                metrics = manifest.read(self.directory / str(step)).get("metrics") or {}
            except manifest.Damaged:
                continue
            value = metrics.get(self._best_metric, math.nan)
            if math.isfinite(value):
                values[step] = value
        return {min(values, key=values.__getitem__)} if values else set()

    def _sweep(self) -> None:
        """Removes what a killed process left: unfinished saves and half deletions."""
        # In an object store a folder of nothing is none.
        for path in list(self.directory.iterdir()) if self.directory.is_dir() else ():
            half = path.name.isdigit() and not _is_committed(path)
            if half or path.name.endswith(_LEAVING) or ".orbax-checkpoint-tmp" in path.name:
                path.rmtree()
            elif path.name.startswith(_MARK):
                path.unlink()

    def _check_shared(self) -> None:
        """Raises UserError where processes write to different folders of one name."""
        if distributed.process_count() == 1:
            return
        mark = self.directory / f"{_MARK}{secrets.token_hex(4)}"
        if self._is_first:
            with _naming(mark):
                mark.write_text("")
        mark = self.directory / distributed.gather("mark", mark.name)[0]
        until = time.monotonic() + _SEEN_SECONDS
        while not mark.exists():
            if time.monotonic() > until:
                raise UserError(
                    f"{self.directory} of process {distributed.process_index()} (on "
                    f"{socket.gethostname()}) is not process 0's: give all processes a --workdir "
                    "on one shared file system, or on gs://"
                )
            time.sleep(0.5)
        distributed.barrier("mark seen")
        if self._is_first:
            mark.unlink()


class _Handler(ocp.PyTreeCheckpointHandler):
    """Puts the manifest beside the arrays once they are all written, before the rename."""

    manifest: tuple[dict[str, Any], str] | None = None

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        if jax.process_index() == 0:
            manifest.write(directory, *self.manifest)


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclasses.dataclass
class _SaveArgs(ocp.args.PyTreeSave):
    """Orbax chooses the handler by the type of its arguments."""


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclasses.dataclass
class _RestoreArgs(ocp.args.PyTreeRestore):
    """See _SaveArgs."""


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
    """Turns a failed write into a UserError that names the path.

    Where another process was lost, orbax's wait for it fails, in an OSError too.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Orbax reports a full disk as a ValueError with the system's words in it.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UserError(
                f"the disk is full: no checkpoint could be written to {path}; earlier "
                "checkpoints are intact: free some space and run the same command again"
            ) from error
        distributed.wait_for_the_reason(error)
        if isinstance(error, OSError):
            raise UserError(f"cannot write checkpoints to {path}: {error}") from error
        raise


def absolute(path: epath.PathLike) -> epath.Path:
    """The path as orbax wants it: from the root, or with its scheme (gs://)."""
    path = epath.Path(path)
    return path if is_remote(path) else epath.Path(os.path.abspath(path))


def steps_in(directory: epath.PathLike) -> list[int]:
    """Steps of the finished checkpoints in a directory, rising."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in found if _is_committed(path))


def _is_committed(path: epath.Path) -> bool:
    """Whether a directory that is called as a checkpoint was finished."""
    return not is_remote(path) or (path / manifest.COMMITTED).exists()


def _delete(path: epath.Path) -> None:
    """Deletes a checkpoint; a kill on the way leaves none that seems finished."""
    if is_remote(path):
        (path / manifest.COMMITTED).unlink()
    else:
        path = path.rename(path.parent / f"{path.name}{_LEAVING}")
    path.rmtree()


def _tree(state: Any) -> Any:
    """A state as the plain dict that is stored; absent parts are left out."""
    if isinstance(state, TrainState):
        parts = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
        return parts if state.frozen is None else {**parts, "frozen": state.frozen}
    return state


def _read(reader: Any, path: epath.Path, template: Any) -> Any:
    """Arrays of a checkpoint in the shape of `template`, whose tree may be a part of it."""
    tree = _tree(template)
    args = _RestoreArgs(
        item=tree,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True,
    )
    restored = reader.restore(path, args=args)
    return template.replace(**restored) if isinstance(template, TrainState) else restored


def read_part(path: epath.Path, template: Any) -> Any:
    """Reads a part of the checkpoint at `path`, e.g. {"params": {...}}.

    Args:
      template: a tree of jax.ShapeDtypeStruct, with shardings where arrays should be placed.

    Raises:
      manifest.Damaged: the checkpoint fails its manifest.
    """
    manifest.verify(path)
    with ocp.Checkpointer(_Handler()) as reader:
        return _read(reader, path, template)
