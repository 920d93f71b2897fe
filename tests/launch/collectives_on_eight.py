"""What a train step sends between eight devices; test_collectives.py runs these with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import config
from launch.compiling import counts as counts_lib, hlo, program
from launch.compiling.collectives import Collective
from t5like.training.sharding import Sharding

ROWS, LENGTH, D, F, VOCABULARY, HEADS = 32, 128, 48, 80, 512, 4
# Sizes that tell apart what is sent: no parameter is as large as an activation of all rows.
ACTIVATION = ROWS * 64 * D
SIZES = (
    "train.vocabulary = @SizedVocabulary()", f"SizedVocabulary.tokens = {VOCABULARY - 100}",
    "train.optimizer = @AdamW()", "AdamW.learning_rate = 1e-3", f"train.batch_size = {ROWS}",
    f"train.length = {LENGTH}", "train.targets_length = None", "train.pack = True",
    "ModelConfig.num_layers = 2", f"ModelConfig.d_model = {D}", f"ModelConfig.d_ff = {F}",
    f"ModelConfig.num_heads = {HEADS}", "ModelConfig.head_dim = 16",
    "ModelConfig.scan_layers = True",
)  # fmt: skip
# Page -> what it sets. MLM and ELECTRA gather the positions that they predict.
OBJECTIVES = {
    "span_corruption": ("train.targets_length = 64", "ModelConfig.tie_embeddings = False"),
    "mlm": ("ModelConfig.head_transform = True", "ModelConfig.logits_bias = True"),
    "electra": ("ModelConfig.position = 'learned'", "Electra.generator_width = 0.5"),
    "causal_lm": ("ModelConfig.num_kv_heads = 2", "ModelConfig.remat = 'dots'"),
}
PRESETS = {
    "fsdp": Sharding(data=1, fsdp=8),
    "tensor_fsdp": Sharding(data=2, fsdp=2, tensor=2),
}
PUT_TOGETHER = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast")


def collectives(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh) -> list[Collective]:
    return counts_lib.count(hlo.parse(compiled.as_text()), dict(mesh.shape)).collectives


def whole_activations(found: list[Collective]) -> Iterator[str]:
    """Collectives that put together, along axes that split the batch, as much as the activations
    or the logits of all rows."""
    for collective in found:
        over_rows = {"replica", "data", "fsdp"}.intersection(collective.axes) or not collective.axes
        # An all-reduce of zeros but for one's own rows is a gather too.
        if collective.kind in PUT_TOGETHER and over_rows:
            for array in collective.arrays:
                if math.prod(array.dims) >= ACTIVATION:
                    where = f"{array} over {collective.axes}: {collective.source}"
                    yield f"{collective.kind} of {where}"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_activation_is_gathered_over_the_batch(objective, preset):
    bindings = [*SIZES, *OBJECTIVES[objective]]
    resolved = config.load(["runs/small.gin", f"objectives/{objective}.gin"], bindings).run
    planned = program.plan(
        dataclasses.replace(resolved, sharding=PRESETS[preset]), jax.devices()
    )
    largest = max(leaf.size for leaf in jax.tree.leaves(planned.state.params))
    assert largest < ACTIVATION
    [made] = program.train_programs(planned)
    found = collectives(made.compiled, planned.mesh)
    assert any(c.kind == "all-gather" and "fsdp" in c.axes for c in found)
    assert not list(whole_activations(found))


def test_a_gathered_activation_is_found():
    mesh = PRESETS["fsdp"].mesh()
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("fsdp",)))
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, D), jnp.float32, sharding=rows)
    compiled = jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile()
    assert len(list(whole_activations(collectives(compiled, mesh)))) == 1
