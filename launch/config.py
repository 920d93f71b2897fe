"""Configurations: gin pages and bindings become a checked object and its resolved text.

Every binding keeps the place it came from, so that errors, the saved config and the check of a
resumed run can name it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import gin

from launch.config_errors import COMMAND_LINE, explain_build, nearest, parameters, with_place
from launch.pages import PAGES, Parsed, find_page, parse
from t5like.errors import UserError

__all__ = ["PAGES", "Resolved", "find_page", "load"]


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A parsed and built configuration.

    Attributes:
      run: the root, built: a launch.run_config.RunConfig, or another of registry.ROOTS.
      bindings: "scope/Name.parameter" -> value as gin text, macros replaced and defaults
        included, for everything that was built.
      provenance: the same names -> "file:line", where a page or flag bound them.
      objects: "Name.parameter" -> repr of defaults that gin cannot write.
      eval_scopes: scopes that only train.evals refers to.
    """

    run: object
    bindings: dict[str, str]
    provenance: dict[str, str]
    objects: dict[str, str]
    eval_scopes: frozenset[str]

    def text(self) -> str:
        """A gin page that rebuilds this configuration, each line with where it came from."""
        lines = ["# The resolved configuration of this run; `default` marks what no page set."]
        owner = None
        for name, value in self.bindings.items():
            if name.rpartition(".")[0] != owner:
                owner = name.rpartition(".")[0]
                lines.append("")
            lines.append(f"{name} = {value}  # {self.provenance.get(name, 'default')}")
        lines += ["", *(f"# {name} = {value}  # default" for name, value in self.objects.items())]
        return "\n".join(lines) + "\n"


def load(
    gin_files: Sequence[str], bindings: Sequence[str] = (), root: str = "train"
) -> Resolved:
    """Parses and builds a configuration.

    Args:
      gin_files: pages, later ones override.
      bindings: single bindings as gin text, which override the pages.
      root: what is built, one of registry.ROOTS.

    Raises:
      UserError: an unknown or misspelt binding, a missing required one, a value that its class
        refuses; names file, line, binding and the nearest valid name.
    """
    if not gin_files and not bindings:
        raise UserError(
            "no configuration: pass --gin_file=gin_configs/runs/quickstart.gin or another page"
        )
    parsed = parse(gin_files, bindings)
    _check_values(parsed.provenance)
    _check_used(parsed, root)
    run = build(root, parsed.provenance)
    operative = _operative()
    for name, place in parsed.provenance.items():
        if place == COMMAND_LINE and not name.startswith("%") and name not in operative:
            raise UserError(
                f"{place}: {name} has no effect: this run does not use "
                f"{name.rpartition('.')[0]}{nearest(name, list(operative))}"
            )
    return Resolved(
        run=run,
        bindings=operative,
        provenance={k: v for k, v in parsed.provenance.items() if k in operative},
        objects=_objects(run, operative),
        eval_scopes=_eval_scopes(),
    )


def build(name: str, provenance: dict[str, str]):
    """Calls the configurable `name` with its bindings; gin's errors become UserErrors."""
    try:
        gin.finalize()
        return gin.get_configurable(name)()
    except UserError as error:
        # gin appends lines of its own about where in a call it happened.
        raise UserError(with_place(str(error).split("\n")[0], provenance)) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(explain_build(str(error), provenance)) from error


# --- checks ----------------------------------------------------------------------------------


def _check_values(provenance: dict[str, str]) -> None:
    """Raises UserError where a macro or a %gin.REQUIRED was never given a value."""
    for name, place in provenance.items():
        for reference in gin.config.iterate_references(_bound(name)):
            macro, _, kind = reference.scoped_selector.rpartition("/")
            if macro == "gin.REQUIRED":
                raise UserError(f"{name} needs a value ({place}): pass --gin.{name}=VALUE")
            if kind == "gin.macro" and f"%{macro}" not in provenance:
                raise UserError(
                    f"{place}: {name} uses the macro %{macro}, which no page gives a value: add "
                    f"`{macro} = VALUE` to a page or pass --gin.{macro}=VALUE"
                )


def _check_used(parsed: Parsed, root: str) -> None:
    """Raises UserError where a macro or a scope is bound that nothing refers to: a misspelling."""
    known = [f"{root}.{name}" for name in parameters(root)]
    for name, place in parsed.provenance.items():
        scope = name.rpartition("/")[0]
        if name.startswith("%") and name not in parsed.used:
            raise UserError(
                f"{place}: nothing uses {name[1:]!r}; a setting is written NAME.PARAMETER"
                f"{nearest(f'{root}.{name[1:]}', known)}"
            )
        if scope and not name.startswith("%") and scope not in parsed.used:
            scopes = sorted(used for used in parsed.used if used and not used.startswith("%"))
            raise UserError(f"{place}: nothing uses the scope {scope!r}{nearest(scope, scopes)}")


def _bound(name: str):
    """What a binding ("%NAME" of a macro) is set to, references unresolved."""
    key = f"{name[1:]}/gin.macro.value" if name.startswith("%") else name
    return gin.config.query_parameter(key)


# --- what was built --------------------------------------------------------------------------


def _operative() -> dict[str, str]:
    """Every parameter that the build used, as gin text with macros replaced, in gin's order."""
    bindings: dict[str, str] = {}
    macros: dict[str, str] = {}
    for statement in gin.operative_config_str(max_line_length=10**6).splitlines():
        if statement.startswith("#") or " = " not in statement:
            continue
        name, _, value = statement.partition(" = ")
        name = name.removeprefix("t5like.")
        (bindings if "." in name else macros)[name] = value
    return {name: _without_macros(value, macros) for name, value in bindings.items()}


def _without_macros(value: str, macros: dict[str, str]) -> str:
    def replace(match):
        name = match[1]
        return _without_macros(macros[name], macros) if name in macros else match[0]

    return re.sub(r"%([\w/]+)", replace, value)


def _objects(run, bindings: dict[str, str]) -> dict[str, str]:
    """Defaults of the built parts that are objects, such as an optimiser's schedule."""
    found = {}
    parts = [getattr(run, field.name) for field in dataclasses.fields(run)]
    for part in filter(dataclasses.is_dataclass, parts):
        for field in dataclasses.fields(part):
            name, value = f"{type(part).__name__}.{field.name}", getattr(part, field.name)
            if name not in bindings and dataclasses.is_dataclass(value):
                found[name] = repr(value)
    return found


def _eval_scopes() -> frozenset[str]:
    """Scopes that train.evals refers to and no other binding of `train` does."""
    scopes = {True: set(), False: set()}
    for (_, selector), values in gin.config._CONFIG.items():
        for parameter, value in values.items():
            for reference in gin.config.iterate_references(value):
                only_evals = selector.endswith(".train") and parameter == "evals"
                scopes[only_evals].add(reference.scoped_selector.rpartition("/")[0])
    return frozenset(scopes[True] - scopes[False] - {""})
