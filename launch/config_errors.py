"""What gin's errors mean: one line that names file, binding and the nearest valid name."""

from __future__ import annotations

import difflib
import re
import tokenize
from collections.abc import Sequence

import gin

from launch import registry

COMMAND_LINE = "command line"


def nearest(name: str, known: Sequence[str]) -> str:
    """"; did you mean ...?", or nothing where no known name is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def parameters(name: str) -> list[str]:
    """The parameters of a configurable; none of one that is unknown."""
    selector = gin.config._REGISTRY.matching_selectors(name)
    if not selector:
        return []
    arguments = gin.config._get_cached_arg_spec(gin.config._REGISTRY[selector[0]].wrapped)
    return arguments.args + arguments.kwonlyargs


def _configurables() -> list[str]:
    return [*registry.ROOTS, *registry.configurable_classes()]


def explain_parse(error: Exception, place: str, source: str, text: str) -> str:
    """One line for an error that came up while reading `source`: a page, or the command line."""
    message = str(error).split("\n")[0]
    line = getattr(error, "lineno", None)
    if isinstance(error, tokenize.TokenError):
        message, (line, _) = error.args
    if isinstance(error, (SyntaxError, tokenize.TokenError)):
        if source == COMMAND_LINE:
            return (
                f"{COMMAND_LINE}: cannot read the value in --gin.{text.replace(' = ', '=')}: "
                "strings need quotes, as in --gin.NAME=\"'value'\""
            )
        return f"{source}:{line or '?'}: {message}"
    unknown = re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", message)
    if unknown:
        # The parser raises on a reference before the statement is yielded: find its line.
        name = unknown[1].rpartition("/")[2]
        if source != COMMAND_LINE:
            at = next((i for i, s in enumerate(text.splitlines(), 1) if name in s), "?")
            place = f"{source}:{at}"
        return f"{place}: there is no configurable {name!r}{nearest(name, _configurables())}"
    parameter = re.search(r"'([\w.]+)' doesn't have a parameter named '(\w+)'", message)
    if parameter:
        owner, name = parameter.groups()
        near = nearest(name, parameters(owner))
        return f"{place}: {owner} has no parameter {name!r}{near}"
    return f"{place}: {message}"


def explain_build(message: str, provenance: dict[str, str]) -> str:
    """One line for an error that came up while building what the pages describe."""
    first = message.split("\n")[0]
    missing = re.search(r"missing \d+ required (?:[\w-]+ )?arguments?: (.*)", first)
    required = re.search(r"Required bindings for `([\w.]+)` not provided.*: (\[.*?\])", message)
    owner = re.search(r"In call to configurable '([\w.]+)'", message)
    if missing or required:
        who = required[1] if required else (owner[1] if owner else "train")
        names = (required[2] if required else missing[1]).strip("[]")
        return (
            f"{who} needs {names}: add a gin page that binds them, or --gin.{who}.NAME=VALUE"
        )
    return with_place(first, provenance, owner[1] if owner else None)


def with_place(message: str, provenance: dict[str, str], owner: str | None = None) -> str:
    """Appends where the bindings that a message names were made."""
    places = [
        f"{name} at {place}"
        for name, place in provenance.items()
        if re.search(rf"\b{re.escape(name)}\b", message)
    ]
    if places:
        return f"{message} ({', '.join(places)})"
    return f"{message} (in {owner})" if owner else message
