"""Tasks from files in the usual formats: JSON lines, BEIR's folders, TREC's tagged documents."""

from __future__ import annotations

import dataclasses
import functools
import html
import re
from collections.abc import Iterator, Sequence

from etils import epath

from t5like.data.sources import files
from t5like.data.sources.jsonl import JsonlSource
from t5like.errors import UserError
from t5like.evaluation.tasks import (
    ClassificationLoader,
    ClassificationTask,
    RetrievalLoader,
    RetrievalTask,
    classification,
    shuffled,
)

Gains = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class JsonlClassification(ClassificationLoader):
    """Labelled texts in JSON lines files, plain or `.gz`.

    Attributes:
      train: a path or glob, or several.
      test: the same; None holds a part of `train` out, which is the same on every call.
      text_fields: fields whose texts are joined, a line each, in this order.
      label_field: field of the label: a string, a whole number or a truth value.
      holdout: share of `train` that is held out if there is no `test`.
      max_train, max_test: most texts of a side, drawn evenly; None: all.
    """

    train: str | Sequence[str]
    test: str | Sequence[str] | None = None
    text_fields: Sequence[str] = ("text",)
    label_field: str = "label"
    holdout: float = 0.25
    max_train: int | None = None
    max_test: int | None = None

    @functools.cached_property
    def _task(self) -> ClassificationTask:
        train = self._read(self.train)
        if self.test is None:
            if not 0 < self.holdout < 1:
                raise UserError(
                    f"JsonlClassification.holdout is {self.holdout}; without a test file it must "
                    "lie between 0 and 1"
                )
            held = round(self.holdout * len(train))
            train, test = train[held:], train[:held]
        else:
            test = self._read(self.test)
        who = f"JsonlClassification({self.train!r})"
        return classification(train[: self.max_train], test[: self.max_test], who)

    def _read(self, paths: str | Sequence[str]) -> list[tuple[str, object]]:
        """(text, label) in an order that is random, and the same on every call."""
        pairs = []
        first, *others = self.text_fields
        for document in JsonlSource(paths, text_field=first).documents():
            fields = document.metadata
            missing = [n for n in (*others, self.label_field) if fields.get(n) is None]
            if missing:
                raise UserError(
                    f"{paths}, record {len(pairs)} has no field {missing[0]!r}: it has "
                    f"{', '.join([first, *fields])}; set JsonlClassification.text_fields and "
                    "label_field"
                )
            text = "\n".join([document.text, *(str(fields[name]) for name in others)])
            pairs.append((text, fields[self.label_field]))
        return [pairs[i] for i in shuffled(len(pairs), "jsonl")]


@dataclasses.dataclass(frozen=True)
class BeirRetrieval(RetrievalLoader):
    """A folder in BEIR's form (Thakur et al. 2021), its files plain or `.gz`.

    `corpus.jsonl` with `_id`, `title` and `text`; `queries.jsonl` (or one a split,
    `queries_test.jsonl`) with `_id` and `text`; judgements `qrels/test.tsv` (or `qrels_test.tsv`)
    with a header line and columns query, document, score.

    Attributes:
      directory: where they lie.
      split: whose queries are measured.
      train_split: whose queries can be learned from; None, or one without judgements: none.
      max_documents: documents kept: all that are judged relevant, then the first of the others;
        None: all. Fewer documents make the ranking easier.
    """

    directory: str
    split: str = "test"
    train_split: str | None = "train"
    max_documents: int | None = None

    @functools.cached_property
    def _task(self) -> RetrievalTask:
        corpus = {
            str(d.metadata["_id"]): "\n".join(filter(None, [d.metadata.get("title"), d.text]))
            for d in _records(self._file("corpus.jsonl"))
        }
        test = self._split(self.split)
        train = ({}, {})
        if self.train_split and self._find(*_qrels_names(self.train_split)):
            train = self._split(self.train_split)
        return _retrieval(corpus, test, train, self.max_documents, f"BEIR data {self.directory}")

    def _split(self, split: str) -> tuple[dict[str, str], Gains]:
        path = self._file(f"queries_{split}.jsonl", "queries.jsonl")
        queries = {str(d.metadata["_id"]): d.text for d in _records(path)}
        gains: Gains = {}
        qrels = self._file(*_qrels_names(split))
        for line in _lines(qrels)[1:]:
            query, document, score = line.split("\t")
            gains.setdefault(query, {})[document] = float(score)
        return queries, gains

    def _find(self, *names: str) -> epath.Path | None:
        for name in names:
            for suffix in ("", ".gz"):
                path = epath.Path(self.directory) / f"{name}{suffix}"
                if path.exists():
                    return path
        return None

    def _file(self, *names: str) -> epath.Path:
        path = self._find(*names)
        if path is None:
            raise UserError(
                f"{self.directory} has no {' or '.join(names)} (nor .gz of it): set "
                "BeirRetrieval.directory to a folder in BEIR's form"
            )
        return path


@dataclasses.dataclass(frozen=True)
class TrecRetrieval(RetrievalLoader):
    """TREC's tagged documents and queries with `qrels`, such as the Cranfield collection.

    Documents are `<doc>` elements with `<docno>`, `<title>` and `<text>`, queries `<top>` elements
    with `<num>` and `<title>`; a judgement is a line "query 0 document relevance".

    Attributes:
      documents, queries, qrels: the three files, plain or `.gz`.
      number_by_order: judgements count the queries from 1 in the order of their file, whatever
        their numbers are, as Cranfield's do.
      binary: every relevance above 0 is a gain of 1. Cranfield's grades run from 1, the best, to
        4, so that they are no gains.
      train: share of the judged queries that can be learned from and are not measured; the same
        ones on every call.
    """

    documents: str
    queries: str
    qrels: str
    number_by_order: bool = False
    binary: bool = True
    train: float = 0.4

    @functools.cached_property
    def _task(self) -> RetrievalTask:
        corpus = {d["docno"]: _text_of(d) for d in _elements(self.documents, "doc")}
        queries: dict[str, str] = {}
        for number, query in enumerate(_elements(self.queries, "top"), 1):
            name = str(number) if self.number_by_order else query["num"].removeprefix("Number:")
            queries[name.strip().lstrip("0")] = query["title"]
        gains: Gains = {}
        for line in _lines(self.qrels):
            query, _, document, relevance = line.split()
            if float(relevance) > 0:
                gain = 1.0 if self.binary else float(relevance)
                gains.setdefault(query.lstrip("0"), {})[document] = gain
        unknown = next((query for query in gains if query not in queries), None)
        if unknown is not None:
            raise UserError(
                f"{self.qrels} judges a query {unknown}, which {self.queries} does not have: if "
                "judgements count the queries, set TrecRetrieval.number_by_order = True"
            )
        names = sorted(gains, key=lambda name: (len(name), name))
        order = [names[i] for i in shuffled(len(names), "trec")]
        count = round(self.train * len(order))
        test, train = ({n: gains[n] for n in part} for part in (order[count:], order[:count]))
        return _retrieval(corpus, (queries, test), (queries, train), None, self.documents)


def _qrels_names(split: str) -> tuple[str, str]:
    return f"qrels/{split}.tsv", f"qrels_{split}.tsv"


def _retrieval(corpus, test, train, max_documents: int | None, who: str) -> RetrievalTask:
    """A task from texts by name, and (queries, gains) by name of the two sides."""
    sides = []
    for queries, gains in (test, train):
        found = [
            (text, {d: g for d, g in gains[name].items() if g > 0 and d in corpus})
            for name, text in queries.items()
            if name in gains
        ]
        sides.append([(text, wanted) for text, wanted in found if wanted])
    if not sides[0]:
        raise UserError(f"{who} has no query with a relevant document: are the judgements its own?")
    needed = {name for side in sides for _, wanted in side for name in wanted}
    others = [name for name in corpus if name not in needed]
    if max_documents is not None:
        others = others[: max(0, max_documents - len(needed))]
    kept = needed | set(others)
    names = [name for name in corpus if name in kept]
    place = {name: i for i, name in enumerate(names)}
    columns = []
    for side in sides:
        columns += [tuple(text for text, _ in side)]
        columns += [tuple({place[d]: g for d, g in wanted.items()} for _, wanted in side)]
    return RetrievalTask(tuple(corpus[name] for name in names), *columns)


def _records(path: epath.Path) -> Iterator:
    return JsonlSource(str(path)).documents()


def _lines(path: str | epath.Path) -> list[str]:
    """The lines of a text file that are not blank."""
    return [line for line in _read(path).splitlines() if line.strip()]


def _read(path: str | epath.Path) -> str:
    (file,) = files.expand(str(path))
    with files.open_bytes(file) as stream:
        return stream.read().decode("utf-8")


def _elements(path: str, name: str) -> Iterator[dict[str, str]]:
    """Tag -> text of every element of a file that need not be well-formed XML."""
    for body in re.findall(rf"<{name}>(.*?)</{name}>", _read(path), re.DOTALL | re.IGNORECASE):
        found = re.findall(r"<(\w+)>(.*?)(?=</\1>|<\w+>|\Z)", body, re.DOTALL)
        yield {tag.lower(): html.unescape(text).strip() for tag, text in found}


def _text_of(document: dict[str, str]) -> str:
    """Title and text; the text often begins with the title, which is then not repeated."""
    title, text = document.get("title", ""), document.get("text", "")
    return text if text.startswith(title) else f"{title}\n{text}"
