"""Compiling an update under options of XLA's own: those that the compiler at hand knows."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
from absl import logging

from t5like.errors import UserError

_UNKNOWN = re.compile(r"No such compile option: '([^']+)'")
_REFUSED = re.compile(r"While setting option ([^,]+), (.*)")


def compile_with(
    lowered: jax.stages.Lowered, options: Mapping[str, bool | int | float | str] | None
) -> jax.stages.Compiled:
    """Compiles under `options` (train.compiler_options), less those that the compiler lacks.

    Options come and go with versions and belong to one kind of device, and all they change is
    speed and memory: one that is unknown is warned about and left out.

    Args:
      options: {"xla_...": value}; None for none.

    Raises:
      UserError: the compiler knows an option but not its value.
    """
    known, unknown = dict(options or {}), []
    while True:
        try:
            compiled = lowered.compile(compiler_options=known or None)
            break
        except jax.errors.JaxRuntimeError as error:
            missing, refused = _UNKNOWN.search(str(error)), _REFUSED.search(str(error))
            if refused and refused[1] in known:
                raise UserError(f"train.compiler_options[{refused[1]!r}]: {refused[2]}") from error
            if not missing or missing[1] not in known:
                raise
            unknown.append(missing[1])
            del known[missing[1]]
    if unknown:
        logging.warning(
            "this compiler (%s) does not know %s of train.compiler_options: left out",
            jax.default_backend(), ", ".join(unknown),
        )  # fmt: skip
    return compiled
