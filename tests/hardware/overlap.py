"""The options of gin_configs/overlap, and a step that has something to overlap."""

from __future__ import annotations

import ast
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PAGES = pathlib.Path(__file__).resolve().parents[2] / "gin_configs" / "overlap"


def options(page: str) -> dict[str, bool | int | str]:
    """What a page binds train.compiler_options to, read without gin; of a page that includes
    another, that one's."""
    text = (PAGES / f"{page}.gin").read_text()
    _, found, value = text.partition("train.compiler_options = ")
    if found:
        return ast.literal_eval(value)
    return options(pathlib.Path(text.partition("include '")[2].partition("'")[0]).stem)


def fully_sharded_step(mesh: Mesh) -> jax.stages.Lowered:
    """Layers whose kernels are split over the mesh's axis, gathered in a scan, and an update."""
    [axis] = mesh.axis_names

    def layer(hidden, kernel):
        kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, PartitionSpec()))
        return jnp.tanh(hidden @ kernel), None

    def loss(kernels, hidden):
        return jnp.sum(jax.lax.scan(layer, hidden, kernels)[0].astype(jnp.float32))

    def step(kernels, hidden):
        return kernels - jax.grad(loss)(kernels, hidden)

    def shape(dims, *parts):
        place = NamedSharding(mesh, PartitionSpec(*parts))
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=place)

    rows = shape((16 * 1024 * mesh.size, 1024), axis)
    with jax.set_mesh(mesh):
        step = jax.jit(step, donate_argnums=0)
        return step.lower(shape((4, 1024, 1024), None, axis), rows)
