"""The embedded default: the documentation and source of the running Python itself."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator

from etils import epath

from t5like.data.sources import files
from t5like.data.sources.base import Document, Source
from t5like.errors import UserError

SPLITS = ("train", "validation")
CONTENTS = ("all", "code", "prose")
_HELD_OUT_ONE_IN = 20
_NOT_THE_LIBRARY = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    # Tables written by a program, and one that names this machine's paths.
    *("encodings", "pydoc_data"),
}
_MACHINE_PREFIXES = ("_sysconfigdata", "config-")


@dataclasses.dataclass(frozen=True)
class PythonSource(Source):
    """Text that every machine with Python has: no download, nothing to keep in a repository.

    "code" is the standard library's source files, a document each, about 11 MB; tests,
    character tables and files that are not UTF-8 are left out. "prose" is the language
    reference behind `help()` (`pydoc_data.topics`) and each module's docstrings. "all" is the
    code and the reference: the docstrings are in the code already.

    Metadata: `path` (a module's file, or `topics/<name>`) and `kind` ("code" or "prose").

    Attributes:
      split: "train", or "validation" for the one document in 20 that a hash of its path picks;
        a module's code and its docstrings are on the same side.
      content: "all", "code" or "prose".
    """

    split: str = "train"
    content: str = "all"

    def __post_init__(self):
        for name, value, known in (
            ("split", self.split, SPLITS),
            ("content", self.content, CONTENTS),
        ):
            if value not in known:
                raise UserError(
                    f"PythonSource.{name} is {value!r}: choose one of {', '.join(known)}"
                )

    @functools.cached_property
    def _modules(self) -> list[tuple[str, files.File]]:
        root = epath.Path(sysconfig.get_path("stdlib"))
        names = (name for name in _python_files(root) if _side(name) == self.split)
        return [(name, files.File(root / name, (root / name).stat().length)) for name in names]

    @functools.cached_property
    def _topics(self) -> dict[str, str]:
        if self.content == "code":
            return {}
        topics = importlib.import_module("pydoc_data.topics").topics
        names = {f"topics/{name}": text for name, text in sorted(topics.items())}
        return {name: text for name, text in names.items() if _side(name) == self.split}

    def num_shards(self) -> int:
        return files.shard_count([file for _, file in self._modules], by_line=False)

    def documents(
        self, shard: int = 0, num_shards: int = 1, *, skipped: Counter | None = None
    ) -> Iterator[Document]:
        if not self._modules:
            raise UserError(f"{sysconfig.get_path('stdlib')} has no source files: use TextSource")
        sizes = [file.size for _, file in self._modules] + [len(t) for t in self._topics.values()]
        share = files.share(sizes, shard, num_shards)
        for name, file in self._modules[share]:
            yield from self._module(name, file)
        skip = len(self._modules)
        for name in list(self._topics)[max(share.start - skip, 0) : max(share.stop - skip, 0)]:
            yield Document(self._topics[name], {"path": name, "kind": "prose"})

    def _module(self, name: str, file: files.File) -> Iterator[Document]:
        with files.open_bytes(file) as stream:
            data = stream.read()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            return
        if self.content != "prose":
            yield Document(text, {"path": name, "kind": "code"})
        elif docstrings := _docstrings(text):
            yield Document("\n\n".join(docstrings), {"path": name, "kind": "prose"})

    @functools.cached_property
    def _fingerprint(self) -> str:
        topics = hashlib.blake2b(repr(self._topics).encode(), digest_size=16).hexdigest()
        names = [name for name, _ in self._modules]
        content = files.content_hash([file for _, file in self._modules])
        return files.settings_hash("PythonSource", self.content, topics, names, content)


def _python_files(root: epath.Path) -> list[str]:
    """Paths below root, sorted, with "/" on every system."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _wanted(name)]
        inside = epath.Path(folder).relative_to(root)
        found += [(inside / n).as_posix() for n in names if n.endswith(".py") and _wanted(n)]
    return sorted(found)


def _wanted(name: str) -> bool:
    return name not in _NOT_THE_LIBRARY and not name.startswith(_MACHINE_PREFIXES)


def _side(name: str) -> str:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "little") % _HELD_OUT_ONE_IN == 0]


def _docstrings(text: str) -> list[str]:
    """The docstrings of a module, its classes and functions, in the order of the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    except SyntaxError:
        return []
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [doc for node in nodes if (doc := ast.get_docstring(node))]
