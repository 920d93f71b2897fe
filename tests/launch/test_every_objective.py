"""Every objective trains, packed and not, and goes on to the same bits."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from launch import config, training
from launch.registry import configurable_classes
from objectives.base import Objective
from objectives.distillation import Distillation

from .runs import write_text

# One page of each objective; teachers are in tests/objectives/test_distillation.py.
PAGES = (
    "bart", "biphasic", "causal_lm", "codegen2", "electra", "ernie_gram", "fim", "mixture", "mlm",
    "prefix_lm", "prop", "span_corruption", "ul2",
)  # fmt: skip
TINY = [
    "train.source = @TextSource()",
    "train.vocabulary = @ByteVocabulary()",
    "train.optimizer = @AdamW()",
    "AdamW.learning_rate = 1e-3",
    "train.evals = None",
    "train.batch_size = 2",
    "train.log_every = 1",
    "ModelConfig.num_layers = 1",
    "ModelConfig.d_model = 16",
    "ModelConfig.d_ff = 16",
    "ModelConfig.num_heads = 1",
    "ModelConfig.head_dim = 16",
    "ModelConfig.dropout_rate = 0.1",
    "ModelConfig.relative_bidirectional = True",
]
CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
# Phases that end at a step, so that a longer run does not move them.
OWN = {"biphasic": ["Phases.until = [1]"]}


def cases():
    """(page, architecture, whether rows are packed): each page packed and not."""
    classes = configurable_classes()
    for page in PAGES:
        objective = config.load(["runs/small.gin", f"objectives/{page}.gin"]).run.objective
        first = config.load(["runs/small.gin", f"objectives/{page}.gin"]).run.model.architecture
        allowed = classes[type(objective).__name__].architectures or (first,)
        yield page, first, True
        yield page, allowed[-1], False


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """(page, architecture, pack, steps, workdir name) -> parameters after so many updates."""
    folder = tmp_path_factory.mktemp("objectives")
    text = write_text(folder / "text.txt", 60)
    # A run that goes on compiles nothing anew: these tests are of what it computes.
    before = {name: getattr(jax.config, name) for name in CACHE}
    for name, value in zip(CACHE, (str(folder / "compiled"), 0.0), strict=True):
        jax.config.update(name, value)

    def run(page, architecture, pack, steps, name):
        bindings = [
            *TINY, *OWN.get(page, []), f"TextSource.paths = '{text}'",
            f"ModelConfig.architecture = '{architecture}'", f"train.pack = {pack}",
            f"train.steps = {steps}", f"train.cache_dir = '{folder / 'cache'}'",
        ]  # fmt: skip
        pages = ["runs/small.gin", f"objectives/{page}.gin"]
        workdir = folder / f"{page}-{architecture}-{pack}-{name}"
        resolved = config.load(pages, bindings)
        done = training.train_resolved(resolved, str(workdir), progress=False)
        return jax.device_get(done.result.state.params)

    yield run
    for name, value in before.items():
        jax.config.update(name, value)


def test_every_objective_is_among_them():
    configs = (config.load(["runs/small.gin", f"objectives/{page}.gin"]) for page in PAGES)
    found = {type(resolved.run.objective) for resolved in configs}
    known = {cls for cls in configurable_classes().values() if issubclass(cls, Objective)}
    assert known - found == {Distillation}


@pytest.mark.parametrize(("page", "architecture", "pack"), cases())
def test_an_objective_trains_and_goes_on_to_the_same_bits(train, page, architecture, pack):
    straight = train(page, architecture, pack, 2, "straight")
    if not pack:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(straight))
        return
    train(page, architecture, pack, 1, "stopped")
    resumed = train(page, architecture, pack, 2, "stopped")
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
