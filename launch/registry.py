"""What gin can configure: launch-level dataclasses, found by where they live.

A class in one of the rooms below is configurable under its own name, so that a new objective,
source or optimiser is one file and needs no registration.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping

import gin
from flax import linen as nn

from kernels import masks
from t5like.errors import UserError

ROOMS = (
    "objectives",
    "t5like.data.sources",
    "t5like.data.vocabularies",
    "t5like.evaluation.files",
    "t5like.evaluation.finetune",
    "t5like.evaluation.likelihood",
    "t5like.evaluation.probe",
    "t5like.evaluation.python_tasks",
    "t5like.evaluation.retrieval",
    "t5like.models.config",
    "t5like.training.optimizers",
    "t5like.training.schedules",
    "t5like.training.sharding",
)
# Masks that a page can write down, for ModelConfig.attention_pattern: those without arrays.
MASKS = (
    "AShape", "And", "BigBird", "Causal", "Dilated", "Full", "GlobalTokens", "Not", "Or",
    "SlidingWindow",
)  # fmt: skip
# What a command line builds: name -> where its class is.
ROOTS = {
    "train": "launch.run_config.RunConfig",
    "compare": "launch.comparison.config.CompareConfig",
}
# What the program fills in, never a gin page.
INTERNAL_FIELDS = {"setting"}
INTERNAL_CLASSES = {"Setting"}
_PLAIN = {int, float, bool, str, type(None)}
_CHOICES = {typing.Literal, typing.Union, types.UnionType}


def modules(name: str) -> Iterator:
    """The module called `name` and, if it is a package, the modules in it."""
    module = importlib.import_module(name)
    yield module
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        yield importlib.import_module(f"{name}.{info.name}")


def configurable_classes() -> dict[str, type]:
    """Name -> every public dataclass defined in one of the rooms that is no other's base."""
    found = {}
    for room in ROOMS:
        for module in modules(room):
            for name, cls in inspect.getmembers(module, dataclasses.is_dataclass):
                ours = cls.__module__ == module.__name__ and not name.startswith("_")
                if ours and not issubclass(cls, nn.Module):
                    found[name] = cls
    found |= {name: getattr(masks, name) for name in MASKS}
    bases = {base for cls in found.values() for base in cls.__mro__[1:]}
    return {
        name: cls
        for name, cls in found.items()
        if cls not in bases and name not in INTERNAL_CLASSES
    }


def register(cls: type, name: str) -> None:
    """Makes `cls` configurable as `name`.

    gin would subclass a class that it wraps, and such a class cannot be pickled into a loader's
    worker; it wraps a function with the same signature instead.
    """

    @functools.wraps(cls, updated=())
    def make(*args, **kwargs):
        bound = inspect.signature(cls).bind_partial(*args, **kwargs)
        values = checked(cls, name, bound.arguments)
        try:
            return cls(**values)
        except ValueError as error:
            if not issubclass(cls, masks.Mask):
                raise
            # The kernels know no UserError; their message names class, field and value.
            raise UserError(str(error)) from error

    signature = inspect.signature(cls)
    kept = [p for p in signature.parameters.values() if p.name not in INTERNAL_FIELDS]
    make.__signature__ = signature.replace(parameters=kept, return_annotation=cls)
    del make.__wrapped__
    gin.external_configurable(make, name=name, module="t5like")


def checked(cls: type, name: str, values: Mapping[str, object]) -> dict[str, object]:
    """`values` of a dataclass's fields, whole floats made ints where ints are asked for.

    gin itself checks nothing. What is checked are fields made of int, float, bool, str, None and
    literals, and that no field is given a class or function where its result is meant.

    Raises:
      UserError: a value of another type; names the field.
    """
    hints = typing.get_type_hints(cls)
    return {
        field: _checked_value(f"{name}.{field}", hints.get(field, object), value)
        for field, value in values.items()
    }


def _checked_value(name: str, hint: object, value: object) -> object:
    if inspect.isfunction(value) or inspect.isclass(value):
        raise UserError(f"{name} is @{value.__name__}; write @{value.__name__}() to make one")
    origin = typing.get_origin(hint)
    choices = typing.get_args(hint) if origin in _CHOICES else (hint,)
    if origin is typing.Literal:
        if value not in choices:
            wanted = " or ".join(map(repr, choices))
            raise UserError(f"{name} is {value!r}; it must be {wanted}")
        return value
    if not set(choices) <= _PLAIN:
        return value
    if isinstance(value, float) and int in choices and float not in choices and value.is_integer():
        return int(value)
    if type(value) in choices or (type(value) is int and float in choices):
        return value
    wanted = sorted(t.__name__.replace("NoneType", "None") for t in choices)
    raise UserError(f"{name} is {value!r}; it must be {' or '.join(wanted)}")


@functools.cache
def register_all() -> None:
    """Registers every configurable once; a second call does nothing."""
    for name, cls in configurable_classes().items():
        register(cls, name)
    for name, place in ROOTS.items():
        module, _, cls = place.rpartition(".")
        register(getattr(importlib.import_module(module), cls), name)
