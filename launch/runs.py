"""A finished or running run, loaded from its workdir: newest checkpoint, its configuration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
from etils import epath

from launch import assemble, config as config_lib
from launch.run_config import RunConfig
from objectives.base import Objective
from t5like.errors import UserError
from t5like.evaluation.model import TrainedModel
from t5like.inference.infill_formats import InfillFormat
from t5like.models.config import ModelConfig
from t5like.models.transformer import init_parameters
from t5like.training import init_from, manifest


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What a checkpoint needs in order to be used.

    Attributes:
      config: as it was saved with the checkpoint, later pages and bindings applied.
      vocabulary: resolved, and known to be the one the model was trained with.
      model: the ModelConfig with its vocab_size filled in.
      params: the backbone's parameters.
      step: of the checkpoint.
      cache: the run's cache folder, if it has one.
    """

    config: RunConfig
    vocabulary: Any
    model: ModelConfig
    params: Any
    step: int
    cache: epath.PathLike | None = None

    @functools.cached_property
    def bound(self) -> tuple[Objective, ...]:
        """What the run was trained with, bound but without a corpus: tracks, then components."""
        tracks = assemble.bind(self.config, self.vocabulary, None).tracks().values()
        parts = [part for track in tracks for part, _ in track.components().values()]
        return (*tracks, *parts)

    @property
    def bidirectional_inputs(self) -> bool:
        """Whether a decoder was trained with inputs that see each other in both directions."""
        return any(part.reads_both_ways for part in self.bound)

    def infilling(self) -> InfillFormat:
        """How the run is asked to fill blanks: as the first of its objectives that teaches it.

        Raises:
          UserError: none does.
        """
        formats = (part.infilling() for part in self.bound)
        found = next((form for form in formats if form is not None), None)
        if found is None:
            raise UserError(
                f"this run's train.objective, {type(self.objective).__name__}, does not teach a "
                "model to fill blanks; SpanCorruption, UL2, CodeGen2 and FIM do: leave --infill "
                "out to have prompts continued, or train with one of those"
            )
        return found

    @property
    def objective(self) -> Objective:
        """The run's objective, not bound."""
        return self.config.objective


def load_run(
    workdir: str, gin_files: Sequence[str] = (), bindings: Sequence[str] = ()
) -> LoadedRun:
    """Loads the newest readable checkpoint of a run.

    Args:
      workdir: a run's workdir, or one checkpoint in it.
      gin_files, bindings: applied over the saved configuration.

    Raises:
      UserError: there is no usable checkpoint, its vocabulary has changed, or the model as
        configured has other parameters.
    """
    path, info = init_from.find(workdir)
    pages = [str(path / manifest.CONFIG_NAME), *gin_files]
    config: RunConfig = config_lib.load(pages, bindings).run
    # A checkpoint lies in WORKDIR/checkpoints/STEP, and what the run has cached in WORKDIR.
    home = path.parent.parent if path.parent.name == "checkpoints" else epath.Path(workdir)
    vocabulary = assemble.resolve_vocabulary(config, assemble.cache_directory(config, str(home)))
    trained_with = info.get("vocabulary")
    if trained_with and trained_with != vocabulary.fingerprint():
        raise UserError(
            f"checkpoint {path} was trained with another vocabulary than {vocabulary}: bind "
            "train.vocabulary to that one, or put its file back"
        )
    model = assemble.sized(config.model, vocabulary)
    params = _read_backbone(path, model, info["arrays"])
    # A checkpoint by itself has no folder for what is made of it.
    place = config.cache_dir or (home / "cache" if home != path else None)
    return LoadedRun(config, vocabulary, model, params, int(info["step"]), place)


def load_trained(workdir: str) -> TrainedModel:
    """The newest readable checkpoint of a run as the measures of t5like/evaluation take it."""
    run = load_run(workdir)
    objective = assemble.bind(run.config, run.vocabulary, None)
    return TrainedModel(
        run.model, run.params, run.vocabulary, objective, both_ways=run.bidirectional_inputs
    )


def _read_backbone(path: epath.Path, model: ModelConfig, arrays: Collection[str]) -> Any:
    """The parameters at `model/`, on this process's first device; heads are left out.

    So is the output layer where the run had none (replaced token detection predicts no token).
    """
    shapes = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
    if not any(name.startswith("params/model/head/") for name in arrays):
        shapes.pop("head", None)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )
    found = init_from.restore_params(path, {"model": template}, ("model/",), {})
    return found["model"]
