"""Compiled programs outlive a process: hits are counted as jax reports them."""

import pathlib
import shutil

import jax
import pytest
from jax._src import monitoring

from launch import compilations, config, training
from tests.launch.runs import tiny, write_text

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture
def counts(monkeypatch):
    """{event: times} since the test began."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    found = {HIT: 0, MISS: 0}

    def count(event, **_):
        if event in found:
            found[event] += 1

    monitoring.register_event_listener(count)
    yield found
    monitoring.unregister_event_listener(count)


def start(text: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """Trains two updates, or the last of them, as a fresh process would; the cache's folder."""
    jax.clear_caches()
    pages = [a.partition("=")[2] for a in tiny(text) if a.startswith("--gin_file")]
    flags = [a[len("--gin.") :].replace("=", " = ", 1) for a in tiny(text) if "--gin." in a]
    flags += ["train.steps = 2", "train.checkpoint_every_steps = 1", "train.optimizer = @AdamW()"]
    before = jax.config.jax_compilation_cache_dir
    training.train_resolved(config.load(pages, flags), str(workdir), progress=False)
    assert jax.config.jax_compilation_cache_dir == before
    shutil.rmtree(workdir / "checkpoints" / "2")  # As if it had been killed before.
    return workdir / "cache" / "compiled"


def test_a_second_start_compiles_nothing_but_what_a_kill_left_in_half(counts, tmp_path, recwarn):
    text = write_text(tmp_path / "text.txt", 60)
    folder = start(text, tmp_path / "run")
    assert counts[MISS] > 0

    # As a kill in the middle of a write leaves it.
    [step] = folder.glob("jit_train_step*")
    step.write_bytes(step.read_bytes()[:1000])
    counts.update({HIT: 0, MISS: 0})
    start(text, tmp_path / "run")
    assert counts[HIT] > 0 and counts[MISS] == 1 and len(step.read_bytes()) > 1000
    assert not [w for w in recwarn if "compilation cache" in str(w.message)]


def test_a_folder_that_cannot_be_made_is_warned_about(counts, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    before = jax.config.jax_compilation_cache_dir
    compilations.keep_compilations(tmp_path / "cache")
    assert "compiled programs are not kept" in caplog.text
    assert jax.config.jax_compilation_cache_dir == before


def test_the_environment_has_precedence(counts, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    before = jax.config.jax_compilation_cache_dir
    compilations.keep_compilations(tmp_path / "cache")
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "cache").exists()
