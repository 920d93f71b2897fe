"""gin pages: found by short name, bound left to right, each binding with where it came from."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tokenize
from collections.abc import Sequence

import gin
from etils import epath
from gin import config_parser

from launch import registry
from launch.config_errors import COMMAND_LINE, explain_parse, nearest
from t5like.errors import UserError

PAGES = pathlib.Path(__file__).resolve().parent.parent / "gin_configs"


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
    raise UserError(f"gin file {name!r} does not exist{nearest(name, known)}")


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
        raise UserError(explain_parse(error, place, _short(source), text)) from error


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
