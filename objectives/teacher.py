"""A trained model to learn from: found, configured and read from the checkpoint of its run."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from t5like.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Teacher:
    """A checkpoint and the model in it.

    Attributes:
      path: of the checkpoint, an etils path.
      info: what its manifest records.
      config: ModelConfig, with its vocab_size.
    """

    path: Any
    info: Mapping[str, Any]
    config: Any

    @property
    def vocabulary(self) -> str:
        """The fingerprint of what it was trained with, "" if that is not recorded."""
        return self.info.get("vocabulary", "")

    def frozen(self) -> Any:
        """The backbone, {"model": parameters}, as t5like.training.state.Frozen; no heads.

        Reading it raises UserError if the checkpoint has other parameters than the config.
        """
        import jax

        from t5like.models.transformer import init_named
        from t5like.training import init_from
        from t5like.training.state import Frozen

        shapes = jax.eval_shape(lambda: init_named(self.config, jax.random.key(0)))

        def read(template: Any) -> Any:
            return init_from.restore_params(self.path, template, ("model/",), {})

        return Frozen({"model": shapes}, read)


def find(path: str, config: Any | None, who: str) -> _Teacher:
    """The newest checkpoint at `path`, a workdir or one checkpoint, and its model.

    Args:
      config: ModelConfig of the model; None: as its run recorded it.
      who: the binding that says `path`, for errors.

    Raises:
      UserError: there is no usable checkpoint, or it records no ModelConfig.
    """
    from t5like.training import init_from

    try:
        found, info = init_from.find(path)
    except UserError as error:
        raise UserError(f"{who}: {error}") from error
    if config is None:
        config = _recorded(info.get("identity", {}))
        if config is None:
            raise UserError(
                f"{who}: {found} does not say what model it holds: bind Distillation.teacher_model "
                "= @teacher/ModelConfig() and what teacher/ModelConfig is"
            )
    if config.vocab_size is None:
        shape, _ = info["arrays"]["params/model/token_embedder/embedding"]
        config = dataclasses.replace(config, vocab_size=shape[0])
    return _Teacher(found, info, config)


def _recorded(identity: Mapping[str, str]) -> Any | None:
    """The ModelConfig that a run's identity bindings describe, {"NAME.FIELD": value as gin text}.

    A field that the run did not have yet keeps its default.
    """
    from t5like.models.config import ModelConfig

    name = identity.get("train.model", "").removeprefix("@").removesuffix("()")
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    values = {
        binding.removeprefix(f"{name}."): ast.literal_eval(value)
        for binding, value in identity.items()
        if name and binding.startswith(f"{name}.")
    }
    return ModelConfig(**{k: v for k, v in values.items() if k in fields}) if values else None
