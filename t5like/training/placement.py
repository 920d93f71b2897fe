"""Where the whole state of a run lies on its mesh, before any of it exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax
from flax import traverse_util
from jax.sharding import Mesh

from t5like.models.partitioning import names_of
from t5like.training import state as state_lib, step as step_lib, tracks
from t5like.training.sharding import Sharding, replicated
from t5like.training.state import Frozen, TrainState


def fresh_state(
    init_fn: Callable[[jax.Array], Any], transform: optax.GradientTransformation
) -> Callable[[jax.Array], TrainState]:
    """key -> a state at step 0 without frozen trees.

    Args:
      init_fn: key -> parameters, in boxes that name their axes or not.
    """
    return lambda key: state_lib.create(nn.unbox(init_fn(key)), transform)


def template(
    init_fn: Callable[[jax.Array], Any],
    transform: optax.GradientTransformation,
    sharding: Sharding,
    mesh: Mesh,
    frozen: Frozen | None = None,
) -> TrainState:
    """The state of a run as jax.ShapeDtypeStruct leaves with shardings; nothing is allocated.

    What an optimiser keeps of a parameter, in that parameter's shape, lies as the parameter does;
    the rest (counts, Adafactor's factored moments) is small and every device has it.

    Args:
      init_fn: see fresh_state.

    Raises:
      UserError: see Sharding.of_parameters.
    """
    # Traced: the mesh's devices may be absent.
    key = jax.eval_shape(lambda: step_lib.run_key(0, step_lib.INIT_STREAM))
    shapes = jax.eval_shape(fresh_state(init_fn, transform), key)
    places = sharding.of_parameters(
        mesh, names_of(jax.eval_shape(init_fn, key)), shapes.params
    )
    by_path = traverse_util.flatten_dict(places)
    like = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes.params).items()}

    def of_optimizer(path, leaf):
        owner = tracks.owner_of(path, by_path)
        mine = owner is not None and like[owner] == leaf.shape
        return _placed(leaf, by_path[owner] if mine else replicated(mesh))

    return TrainState(
        step=_placed(shapes.step, replicated(mesh)),
        params=jax.tree.map(_placed, shapes.params, places),
        opt_state=jax.tree_util.tree_map_with_path(of_optimizer, shapes.opt_state),
        frozen=None if frozen is None else _frozen(frozen, sharding, mesh),
    )


def _frozen(frozen: Frozen, sharding: Sharding, mesh: Mesh) -> Any:
    shapes = nn.unbox(frozen.shapes)
    places = sharding.of_parameters(mesh, names_of(frozen.shapes), shapes)
    return jax.tree.map(_placed, shapes, places)


def _placed(leaf: Any, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def shardings(tree: Any) -> Any:
    """The shardings of a tree of arrays or of a template."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
