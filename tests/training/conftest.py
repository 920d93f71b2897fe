"""A toy run: linear regression on batches that are a function of the step, with two terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.data.plans import Always
from t5like.training import loop, optimizers, schedules, tracks
from t5like.training.evaluation import HeldOut
from t5like.training.terms import Term

TARGET = np.arange(12, dtype=np.float32).reshape(4, 3) / 6


def batch_of(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    y = x @ TARGET + 0.1 * rng.normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": y, "weights": rng.random((8, 1)).astype(np.float32)}


def batches(start: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    step = start
    while True:
        yield step, batch_of(step)
        step += 1


def init(key: jax.Array) -> Any:
    return {"layer": {"kernel": jax.random.normal(key, (4, 3)), "bias": jnp.zeros(3)}}


def loss_fn(params, frozen, batch, key, train) -> dict[str, Term]:
    """Squared error under dropout, and a size penalty whose weights are of another scale."""
    x = batch["x"]
    if train:
        x = x * jax.random.bernoulli(key, 0.9, x.shape)
    y = x @ params["layer"]["kernel"] + params["layer"]["bias"]
    weights = batch["weights"]
    error = jnp.sum(jnp.square(y - batch["y"]) * weights)
    return {
        "error": Term(error, jnp.sum(weights)),
        "size": Term(jnp.sum(jnp.abs(y) * weights**2), jnp.sum(weights**2), 0.01),
        "size_unscaled": Term(jnp.sum(jnp.abs(y)), jnp.float32(y.size), 0.0),
    }


@dataclasses.dataclass
class Toy:
    """Runs of the toy in one workdir; keywords go to `fit`."""

    workdir: Any
    optimizer: optimizers.Optimizer = optimizers.AdamW(learning_rate=schedules.Constant(0.05))

    def fit(self, total_steps: int, **kwargs) -> loop.FitResult:
        """`loss_fn` and functions among `evals` (giving batches) are those of one track."""
        track = tracks.Track(kwargs.pop("loss_fn", loss_fn), tokens_per_step=8, flops_per_step=1e3)
        evals = {
            name: held_out if isinstance(held_out, HeldOut) else HeldOut("toy", held_out)
            for name, held_out in kwargs.pop("evals", {}).items()
        }
        defaults = dict(
            init_fn=init,
            tracks={"toy": track},
            plan=lambda total_steps: Always("toy"),
            evals=evals,
            optimizer=self.optimizer,
            batches=batches,
            seed=3,
            workdir=self.workdir,
            log_every=2,
            checkpoint_every_steps=3,
            hash_fn=lambda batch: batch["x"].sum(),
            progress=False,
            tensorboard=False,
        )
        return loop.fit(total_steps=total_steps, **{**defaults, **kwargs})


@pytest.fixture(scope="session")
def toy_in():
    """workdir -> a toy."""
    return Toy


@pytest.fixture
def toy(tmp_path) -> Toy:
    return Toy(tmp_path / "run")


@pytest.fixture
def make_toy(tmp_path):
    """name -> a toy in its own workdir."""
    return lambda name: Toy(tmp_path / name)


@pytest.fixture
def toy_parts():
    """The toy's init, loss_fn, batch_of and batches."""
    names = dict(init=init, loss_fn=loss_fn, batch_of=batch_of, batches=batches)
    return type("Parts", (), {name: staticmethod(value) for name, value in names.items()})


def _same_bits(left: Any, right: Any) -> None:
    left_leaves, left_tree = jax.tree.flatten(left)
    right_leaves, right_tree = jax.tree.flatten(right)
    assert left_tree == right_tree
    for a, b in zip(left_leaves, right_leaves, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes()


@pytest.fixture
def assert_same_bits():
    """(tree, tree) -> asserts equality of structure, dtypes, shapes and bits."""
    return _same_bits
