"""What a run of several networks trains at a step, and what that leaves alone.

A run has one state, whose parameters are the union of those that its networks declare. An update
of one network must leave all others as they were, to the bit: no weight decay, no momentum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Track:
    """What one compiled update trains.

    Attributes:
      loss_fn: (params, frozen, batch, key, train) -> {name: Term}; traced.
      tokens_per_step: slots of a batch (batch size times row length, inputs plus targets).
      flops_per_step: model FLOPs of an update, forward and backward.
      declares: a nested dict with a leaf for each parameter of this track's network; None: all
        parameters of the run.
    """

    loss_fn: Callable[..., dict[str, Any]]
    tokens_per_step: int
    flops_per_step: float
    declares: Any = None

    @property
    def paths(self) -> frozenset[Path] | None:
        """Paths of the declared parameters, or None for all."""
        return None if self.declares is None else paths_of(self.declares)


def spent(tracks: Mapping[str, Track], counts: Mapping[str, int]) -> tuple[int, float]:
    """(tokens, FLOPs) of so many updates of each track."""
    tokens = sum(tracks[name].tokens_per_step * count for name, count in counts.items())
    flops = sum(tracks[name].flops_per_step * count for name, count in counts.items())
    return tokens, flops


def paths_of(params: Any) -> frozenset[Path]:
    """Paths of a nested dict's leaves."""
    return frozenset(traverse_util.flatten_dict(params))


def declared(params: Any, paths: frozenset[Path] | None) -> Any:
    """The part of a nested dict of parameters that lies at `paths`; all of it for None."""
    if paths is None:
        return params
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: flat[path] for path in flat if path in paths})


def filled(grads: Any, params: Any) -> Any:
    """Gradients like `params`, 0 where there is none."""
    flat = traverse_util.flatten_dict(grads)
    return traverse_util.unflatten_dict(
        {
            path: flat[path] if path in flat else jax.numpy.zeros_like(leaf)
            for path, leaf in traverse_util.flatten_dict(params).items()
        }
    )


def keep_undeclared(new: Any, old: Any, params: Any, paths: frozenset[Path] | None) -> Any:
    """`new` with the values of `old` at every leaf that belongs to an undeclared parameter.

    Args:
      new, old: two values of one pytree: parameters, or an optimiser's state, whose moments lie
        in trees shaped like the parameters (with holes, where an optimiser has but a part of
        them). A leaf belongs to the parameter whose path its own path ends in.
      params: nested dict, all parameters.
      paths: the declared ones; None: all.
    """
    if paths is None:
        return new
    known = paths_of(params)

    def choose(path, new_leaf, old_leaf):
        owner = owner_of(path, known)
        return new_leaf if owner is None or owner in paths else old_leaf

    return jax.tree_util.tree_map_with_path(choose, new, old)


def owner_of(path: Sequence[Any], known: Collection[Path]) -> Path | None:
    """The parameter that a leaf of an optimiser's state belongs to: its path ends in that one's.

    Args:
      path: of the leaf, as jax.tree_util gives it.
      known: paths of all parameters.
    """
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    ends = (names[start:] for start in range(len(names)))
    # The longest: "head/kernel" is also how the path of "model/head/kernel" ends.
    return next((end for end in ends if end in known), None)
