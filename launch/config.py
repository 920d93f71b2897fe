"""gin pages: found by short name, composed left to right, with errors that say where and how.

Every binding keeps the place it came from, so that errors, the saved config and the check of a
resumed run can name it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import re
import tokenize
from collections.abc import Sequence

import gin
from etils import epath
from gin import config_parser

from launch import registry
from t5like.errors import UserError

PAGES = pathlib.Path(__file__).resolve().parent.parent / "gin_configs"
COMMAND_LINE = "command line"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A parsed and built configuration.

    Attributes:
      run: the `train` configurable, built: a launch.run_config.RunConfig.
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


def find_page(name: str, beside: str | None = None) -> epath.Path:
    """The file that a `--gin_file` or an include means.

    Looked for as given, beside the including page, then among this library's own pages with or
    without the leading `gin_configs/`.

    Raises:
      UserError: there is no such file; names the nearest page.
    """
    candidates = [epath.Path(name)]
    if beside is not None:
        candidates.append(epath.Path(beside).parent / name)
    candidates += [epath.Path(PAGES.parent) / name, epath.Path(PAGES) / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(PAGES.parent)) for p in PAGES.rglob("*.gin"))
    raise UserError(f"gin file {name!r} does not exist{_nearest(name, known)}")


@dataclasses.dataclass
class Parsed:
    """What was bound where.

    Attributes:
      provenance: "scope/Name.parameter", or "%NAME" of a macro -> "file:line".
      used: scopes and macros ("%NAME") that any binding refers to, later overridden ones too.
    """

    provenance: dict[str, str] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)


def parse(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> Parsed:
    """Binds pages left to right, then single bindings.

    Raises:
      UserError: anything that gin cannot read or does not know.
    """
    registry.register_all()
    gin.clear_config()
    parsed = Parsed()
    for name in gin_files:
        _bind_page(find_page(name), parsed, ())
    for binding in bindings:
        _bind(binding, COMMAND_LINE, parsed)
    return parsed


def load(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> Resolved:
    """Parses and builds a run's configuration.

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
    _check_used(parsed)
    run = build("train", parsed.provenance)
    operative = _operative()
    for name, place in parsed.provenance.items():
        if place == COMMAND_LINE and not name.startswith("%") and name not in operative:
            raise UserError(
                f"{place}: {name} has no effect: this run does not use "
                f"{name.rpartition('.')[0]}{_nearest(name, list(operative))}"
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
        raise UserError(_with_place(str(error).split("\n")[0], provenance)) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(_explain_build(str(error), provenance)) from error


# --- parsing ---------------------------------------------------------------------------------


def _bind_page(page: epath.Path, parsed: Parsed, including: tuple[str, ...]) -> None:
    """Applies a page; `including` are the pages that led to it by includes."""
    if str(page) in including:
        raise UserError(f"{_short(str(page))} includes itself: delete one of the includes")
    try:
        text = page.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read gin file {page}: {error}") from error
    _bind(text, str(page), parsed, (*including, str(page)))


def _bind(text: str, source: str, parsed: Parsed, including: tuple[str, ...] = ()) -> None:
    """Applies every statement of one page or flag."""
    place = source
    try:
        parser = config_parser.ConfigParser(text, gin.config.ParserDelegate())
        for statement in parser:
            line = statement.location.line_num
            place = source if source == COMMAND_LINE else f"{_short(source)}:{line}"
            if isinstance(statement, config_parser.BindingStatement):
                _bind_one(statement, place, parsed)
            elif isinstance(statement, config_parser.IncludeStatement):
                _bind_page(find_page(statement.filename, beside=source), parsed, including)
            elif isinstance(statement, config_parser.ImportStatement):
                raise UserError(f"{place}: gin imports are not used here; delete the line")
    except UserError:
        raise
    except (SyntaxError, tokenize.TokenError, ValueError, TypeError) as error:
        raise UserError(_explain(error, place, source, text)) from error


def _bind_one(statement, place: str, parsed: Parsed) -> None:
    scope, selector, parameter, value, _ = statement
    if parameter:
        gin.bind_parameter((scope, selector, parameter), value)
        short = selector.rpartition(".")[2]
        parsed.provenance[f"{scope + '/' if scope else ''}{short}.{parameter}"] = place
    else:
        name = f"{scope}/{selector}" if scope else selector
        gin.bind_parameter((name, "gin.macro", "value"), value)
        parsed.provenance[f"%{name}"] = place
    for reference in gin.config.iterate_references(value):
        name, _, kind = reference.scoped_selector.rpartition("/")
        parsed.used.add(f"%{name}" if kind == "gin.macro" else name)


def _short(path: str) -> str:
    """A page's name as a user would type it."""
    try:
        return str(pathlib.Path(path).relative_to(PAGES.parent))
    except ValueError:
        return os.path.relpath(path) if "://" not in path else path


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


def _check_used(parsed: Parsed) -> None:
    """Raises UserError where a macro or a scope is bound that nothing refers to: a misspelling."""
    known = [f"train.{name}" for name in _parameters("train")]
    for name, place in parsed.provenance.items():
        scope = name.rpartition("/")[0]
        if name.startswith("%") and name not in parsed.used:
            raise UserError(
                f"{place}: nothing uses {name[1:]!r}; a setting is written NAME.PARAMETER"
                f"{_nearest(f'train.{name[1:]}', known)}"
            )
        if scope and not name.startswith("%") and scope not in parsed.used:
            scopes = sorted(used for used in parsed.used if used and not used.startswith("%"))
            raise UserError(f"{place}: nothing uses the scope {scope!r}{_nearest(scope, scopes)}")


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
    for part in (run.model, run.objective, run.optimizer):
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


# --- errors ----------------------------------------------------------------------------------


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def _parameters(name: str) -> list[str]:
    selector = gin.config._REGISTRY.matching_selectors(name)
    if not selector:
        return []
    arguments = gin.config._get_cached_arg_spec(gin.config._REGISTRY[selector[0]].wrapped)
    return arguments.args + arguments.kwonlyargs


def _configurables() -> list[str]:
    return ["train", *registry.configurable_classes()]


def _explain(error: Exception, place: str, source: str, text: str) -> str:
    """One line for an error that came up while reading a page."""
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
        return f"{_short(source)}:{line or '?'}: {message}"
    unknown = re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", message)
    if unknown:
        # The parser raises on a reference before the statement is yielded: find its line.
        name = unknown[1].rpartition("/")[2]
        if source != COMMAND_LINE:
            at = next((i for i, s in enumerate(text.splitlines(), 1) if name in s), "?")
            place = f"{_short(source)}:{at}"
        return f"{place}: there is no configurable {name!r}{_nearest(name, _configurables())}"
    parameter = re.search(r"'([\w.]+)' doesn't have a parameter named '(\w+)'", message)
    if parameter:
        owner, name = parameter.groups()
        near = _nearest(name, _parameters(owner))
        return f"{place}: {owner} has no parameter {name!r}{near}"
    return f"{place}: {message}"


def _explain_build(message: str, provenance: dict[str, str]) -> str:
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
    return _with_place(first, provenance, owner[1] if owner else None)


def _with_place(message: str, provenance: dict[str, str], owner: str | None = None) -> str:
    """Appends where the bindings that a message names were made."""
    places = [
        f"{name} at {place}"
        for name, place in provenance.items()
        if re.search(rf"\b{re.escape(name)}\b", message)
    ]
    if places:
        return f"{message} ({', '.join(places)})"
    return f"{message} (in {owner})" if owner else message
