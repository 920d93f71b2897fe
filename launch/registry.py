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
from collections.abc import Iterator

import gin

ROOMS = (
    "objectives",
    "t5like.data.sources",
    "t5like.data.vocabularies",
    "t5like.models.config",
    "t5like.training.optimizers",
    "t5like.training.schedules",
)
# Fields that the program fills in, never a gin page.
INTERNAL_FIELDS = {"setting"}


def modules(name: str) -> Iterator:
    """The module called `name` and, if it is a package, the modules in it."""
    module = importlib.import_module(name)
    yield module
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        yield importlib.import_module(f"{name}.{info.name}")


def configurable_classes() -> dict[str, type]:
    """Name -> every public dataclass that is defined in one of the rooms."""
    found = {}
    for room in ROOMS:
        for module in modules(room):
            for name, cls in inspect.getmembers(module, dataclasses.is_dataclass):
                if cls.__module__ == module.__name__ and not name.startswith("_"):
                    found[name] = cls
    return found


def register(cls: type, name: str) -> None:
    """Makes `cls` configurable as `name`.

    gin would subclass a class that it wraps, and such a class cannot be pickled into a loader's
    worker; it wraps a function with the same signature instead.
    """

    @functools.wraps(cls, updated=())
    def make(*args, **kwargs):
        return cls(*args, **kwargs)

    signature = inspect.signature(cls)
    kept = [p for p in signature.parameters.values() if p.name not in INTERNAL_FIELDS]
    make.__signature__ = signature.replace(parameters=kept, return_annotation=cls)
    del make.__wrapped__
    gin.external_configurable(make, name=name, module="t5like")


@functools.cache
def register_all() -> None:
    """Registers every configurable once; a second call does nothing."""
    from launch.run_config import RunConfig

    for name, cls in configurable_classes().items():
        register(cls, name)
    register(RunConfig, "train")
