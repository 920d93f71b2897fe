"""Parameters from another run or model, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath
from flax import traverse_util

from t5like.errors import UserError
from t5like.training import checkpoints, distributed, manifest, signature
from t5like.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class InitFrom:
    """Where a fresh run's parameters come from.

    Attributes:
      path: a workdir, its `checkpoints` folder, or one checkpoint in it.
      prefixes: only parameters whose name starts with one of these ("model/encoder") are taken,
        the others keep their fresh values; empty: all are taken, and the names must be the same
        on both sides.
      keep_optimizer: also takes the optimiser's state and the step (needs empty prefixes).
    """

    path: str
    prefixes: tuple[str, ...] = ()
    keep_optimizer: bool = False

    def apply(self, state: TrainState, template: TrainState, vocabulary: str = "") -> TrainState:
        """Returns `state` with what this asks for filled in.

        Args:
          state: a fresh state.
          template: the same as a tree of jax.ShapeDtypeStruct with shardings.
          vocabulary: fingerprint of this run's; "" is not compared.

        Raises:
          UserError: nothing usable there; missing or mismatching parameters, by name; another
            vocabulary, unless prefixes choose what is taken.
        """
        if self.prefixes and self.keep_optimizer:
            raise UserError(
                "train.init_reset=False takes the whole state: leave train.init_prefixes unset"
            )
        path, info = find(self.path)
        theirs = info.get("vocabulary", "")
        if not self.prefixes and theirs and vocabulary and theirs != vocabulary:
            raise UserError(
                f"train.init_from: {path} was trained with another vocabulary (fingerprint "
                f"{theirs}, now {vocabulary}): bind train.vocabulary to that one, or list "
                "what to take in train.init_prefixes"
            )
        if not self.keep_optimizer:
            params = _take(path, info, template.params, self.prefixes, state.params)
            return state.replace(params=params)
        tree = {"step": template.step, "params": template.params, "opt_state": template.opt_state}
        stored = {n: a for n, a in info["arrays"].items() if not n.startswith("frozen/")}
        signature.compare(stored, signature.of(tree), path)
        return state.replace(**_checked(path, tree))


def restore_params(
    path: epath.PathLike,
    template: Any,
    prefixes: tuple[str, ...] = (),
    fresh: Any | None = None,
) -> Any:
    """Parameters of the checkpoint at `path`, by name.

    Args:
      path: a workdir, its `checkpoints` folder, or one checkpoint.
      template: nested dict of jax.ShapeDtypeStruct: the parameters wanted.
      prefixes: take only names that start with one of these; empty takes all, strictly.
      fresh: nested dict like the template with values for the names that are not taken; needed
        with prefixes.

    Returns:
      A nested dict like the template.

    Raises:
      UserError: no usable checkpoint; or a parameter that is missing or of another shape; or
        prefixes that match nothing.
    """
    return _take(*find(path), template, prefixes, fresh)


def _take(
    path: epath.Path,
    info: Mapping[str, Any],
    template: Any,
    prefixes: tuple[str, ...],
    fresh: Any | None,
) -> Any:
    """As restore_params, of a checkpoint that was found."""
    wanted = traverse_util.flatten_dict(template, sep="/")
    taken = {
        name: leaf
        for name, leaf in wanted.items()
        if not prefixes or name.startswith(tuple(prefixes))
    }
    unused = [p for p in prefixes if not any(name.startswith(p) for name in taken)]
    if unused:
        raise UserError(f"no parameter's name starts with {unused[0]!r}, such as {min(wanted)!r}")
    _compare(info["arrays"], taken, path, strict=not prefixes)
    tree = traverse_util.unflatten_dict(taken, sep="/")
    found = traverse_util.flatten_dict(_checked(path, {"params": tree})["params"], sep="/")
    if prefixes:
        found = {**traverse_util.flatten_dict(fresh, sep="/"), **found}
    return traverse_util.unflatten_dict({name: found[name] for name in wanted}, sep="/")


def find(path: epath.PathLike) -> tuple[epath.Path, dict[str, Any]]:
    """The newest readable checkpoint at or under `path`, and its info.

    All processes take the same one: of those that the first process sees.

    Raises:
      UserError: there is none.
    """
    path = checkpoints.absolute(path)
    if (path / manifest.NAME).exists():
        candidates = [path]
    else:
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        candidates = [folder / str(step) for step in reversed(checkpoints.steps_in(folder))]
    # A run that is still writing there may have finished one more where another process looks.
    candidates = [epath.Path(c) for c in distributed.gather("found", list(map(str, candidates)))[0]]
    for candidate in candidates:
        try:
            return candidate, manifest.verify(candidate)
        except manifest.Damaged as problem:
            if distributed.process_index() == 0:
                logging.warning("checkpoint %s is damaged and is not used: %s", candidate, problem)
    what = "every checkpoint is damaged" if candidates else "there is no finished checkpoint"
    raise UserError(f"{what} in {path}: name a workdir of a run that has saved one")


def _checked(path: epath.Path, tree: Any) -> Any:
    try:
        return checkpoints.read_part(path, tree)
    except manifest.Damaged as problem:
        raise UserError(f"checkpoint {path} cannot be read: {problem}") from problem


def _compare(stored: Mapping[str, Any], wanted: Mapping[str, Any], path, strict: bool) -> None:
    start = "params/"
    old = {n.removeprefix(start): v for n, v in stored.items() if n.startswith(start)}
    new = signature.of(dict(wanted))
    if not strict:
        old = {name: value for name, value in old.items() if name in new}
    try:
        signature.compare(old, new, path)
    except UserError as error:
        raise UserError(
            f"{error}: to start from a part of it, list names in train.init_prefixes, such as "
            "['model/'], the model without the heads of its objective"
        ) from error
