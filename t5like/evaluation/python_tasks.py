"""Tasks that need no download, made of the held-out modules of the running Python's library.

Only files of PythonSource's validation split are used, so that a model trained on its train split
has seen none of them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from t5like.data.sources.python_stdlib import PythonSource
from t5like.errors import UserError
from t5like.evaluation.tasks import (
    ClassificationLoader,
    ClassificationTask,
    RetrievalLoader,
    RetrievalTask,
    classification,
    shuffled,
)

PLACEHOLDER = "..."
_KINDS = {
    ast.Assign: "assignment",
    ast.AugAssign: "assignment",
    ast.AnnAssign: "assignment",
    ast.Return: "return",
    ast.If: "if",
    ast.FunctionDef: "def",
}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_TEST_MODULES_ONE_IN = 3


@dataclasses.dataclass(frozen=True)
class PythonStatements(ClassificationLoader):
    """Which kind of statement was taken out of a few lines of code?

    A text is a line of code, or the first line of a compound statement, replaced by `...`, between
    the lines before and after it; the kinds are assignment, call, def, if and return, equally
    many of each. Words alone say little: what stands around the gap, its indentation and the order
    of the lines tell. Train and test texts are of different modules.

    Attributes:
      train, test: texts of each side, divided evenly among the five kinds.
      before, after: lines of context.
    """

    train: int = 1200
    test: int = 500
    before: int = 2
    after: int = 2

    @functools.cached_property
    def _task(self) -> ClassificationTask:
        modules = [(path, list(dict.fromkeys(self._items(text)))) for path, text in _modules()]
        # The largest modules first, each to the side that is furthest below its share.
        modules.sort(key=lambda module: (-len(module[1]), module[0]))
        sides: list[list[tuple[str, str]]] = [[], []]
        for _, items in modules:
            behind = len(sides[0]) >= (_TEST_MODULES_ONE_IN - 1) * len(sides[1])
            sides[behind] += items
        train, test = sides
        seen = {text for text, _ in train}
        test = [item for item in test if item[0] not in seen]
        return classification(
            self._balanced(train, self.train, "train"),
            self._balanced(test, self.test, "test"),
            "PythonStatements",
        )

    def _items(self, text: str) -> Iterator[tuple[str, str]]:
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            kind = _kind(node)
            if kind is None:
                continue
            start = node.lineno - 1
            end = node.body[0].lineno - 1 if hasattr(node, "body") else node.end_lineno
            if end != start + 1 or lines[start].lstrip().startswith("elif"):
                continue
            indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
            before = [line for line in lines[max(0, start - 8) : start] if line.strip()]
            after = [line for line in lines[end : end + 8] if line.strip()]
            around = [*before[-self.before :], indent + PLACEHOLDER, *after[: self.after]]
            yield textwrap.dedent("\n".join(around)), kind

    def _balanced(self, items: list[tuple[str, str]], total: int, side: str):
        kinds = sorted({kind for _, kind in items})
        each = total // max(len(kinds), 1)
        chosen = []
        for kind in kinds:
            own = sorted((item for item in items if item[1] == kind), key=lambda i: _digest(i[0]))
            if len(own) < each:
                raise UserError(
                    f"this Python's library has {len(own)} statements of kind {kind!r} for "
                    f"PythonStatements.{side} = {total}: lower it to {len(own) * len(kinds)}"
                )
            chosen += own[:each]
        return [chosen[i] for i in shuffled(len(chosen), "python statements")]


@dataclasses.dataclass(frozen=True)
class PythonFunctions(RetrievalLoader):
    """Finds the function that a docstring's first sentence is about.

    Documents are functions and methods without their docstrings (all of them: those that have none
    are distractors); a query has the one function that it was taken from.

    Attributes:
      train: share of the queries that can be learned from and are not measured.
      min_words: of a first sentence that is a query.
    """

    train: float = 0.4
    min_words: int = 4

    @functools.cached_property
    def _task(self) -> RetrievalTask:
        functions: dict[str, str] = {}
        for _, text in _modules():
            for function in _functions(text):
                functions.setdefault(function.code, function.sentence)
        documents = tuple(functions)
        pairs, seen = [], set()
        for place, (code, sentence) in enumerate(functions.items()):
            told = sentence in seen or sentence in " ".join(code.split())
            if len(sentence.split()) >= self.min_words and not told:
                seen.add(sentence)
                pairs.append((sentence, {place: 1.0}))
        count = round(self.train * len(pairs))
        if not 0 <= count < len(pairs):
            raise UserError(
                f"PythonFunctions.train is {self.train}; of {len(pairs)} queries it must leave some"
            )
        order = [pairs[i] for i in shuffled(len(pairs), "python functions")]
        queries, gains = zip(*order, strict=True)
        return RetrievalTask(
            documents, queries[count:], gains[count:], queries[:count], gains[:count]
        )


class _Function(NamedTuple):
    """A function's code without its docstring, and that docstring's first sentence or ""."""

    code: str
    sentence: str


def _modules() -> list[tuple[str, str]]:
    """(path, text) of the held-out modules that parse."""
    source = PythonSource(split="validation", content="code")
    found = []
    for document in source.documents():
        try:
            ast.parse(document.text)
        except SyntaxError:
            continue
        found.append((document.metadata["path"], document.text))
    return found


def _kind(node: ast.AST) -> str | None:
    if isinstance(node, ast.Expr):
        return "call" if isinstance(node.value, ast.Call) else None
    return _KINDS.get(type(node))


def _functions(text: str) -> Iterator[_Function]:
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, _FUNCTIONS):
            continue
        start, docstring = node.lineno - 1, ast.get_docstring(node)
        kept = lines[start : node.end_lineno]
        if docstring is not None:
            quoted = node.body[0]
            if quoted.lineno == node.lineno or len(node.body) == 1:
                continue
            kept = lines[start : quoted.lineno - 1] + lines[quoted.end_lineno : node.end_lineno]
        yield _Function(textwrap.dedent("\n".join(kept)), _first_sentence(docstring or ""))


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return paragraph.split(". ")[0]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
