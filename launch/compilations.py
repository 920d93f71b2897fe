"""Compiled programs, kept in the cache folder: a run that goes on does not compile again."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from t5like.data.atomic import is_remote
from t5like.training import distributed

FOLDER = "compiled"
SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
_CHECKED = "checked"


def keep_compilations(cache: epath.PathLike) -> None:
    """Has jax look in `cache`/compiled before it compiles, and keep there what it compiles.

    An entry serves the same program, compiler, options and kind of device only (a CPU's features
    among them), so machines may share a folder, and programs that change leave nothing behind but
    their files. Of several processes the first one writes. What cannot be read or written is
    warned about and compiled as ever.

    jax's own environment variables have precedence: JAX_COMPILATION_CACHE_DIR names another
    folder, JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = epath.Path(cache) / FOLDER
    if jax.config.jax_compilation_cache_dir == str(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_remote(folder) and distributed.process_index() == 0:
            _drop_halves(folder)
    except OSError as error:
        logging.warning("compiled programs are not kept in %s: %s", folder, error)
        return
    # On a disk small programs as well: each costs more to compile than to read.
    least = 1.0 if is_remote(folder) else 0.0
    for name, value in zip(SETTINGS, (str(folder), least), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # What this process used before, if anything.


@contextlib.contextmanager
def compilations_kept(cache: epath.PathLike) -> Iterator[None]:
    """As `keep_compilations` while the block runs; then jax's settings are what they were."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    keep_compilations(cache)
    try:
        yield
    finally:
        if jax.config.jax_compilation_cache_dir != before[SETTINGS[0]]:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def _drop_halves(folder: epath.Path) -> None:
    """Removes entries that a kill or a full disk cut short: jax would never replace them.

    Object stores have none: there a file appears whole. Entries older than the last check are
    known to be whole.
    """
    mark = folder / _CHECKED
    before = mark.stat().mtime if mark.exists() else 0
    for path in folder.glob("*-cache"):
        if path.stat().mtime >= before and not _is_whole(path):
            path.unlink(missing_ok=True)
    mark.write_text("")


def _is_whole(path: epath.Path) -> bool:
    """Whether an entry can be unpacked to its end; one that zlib did not pack is trusted."""
    content = path.read_bytes()
    if not content:
        return False
    if content[0] != 0x78:
        return True
    unpacking = zlib.decompressobj()
    try:
        while content and not unpacking.eof:
            unpacking.decompress(content, 1 << 24)
            content = unpacking.unconsumed_tail
    except zlib.error:
        return False
    return unpacking.eof
