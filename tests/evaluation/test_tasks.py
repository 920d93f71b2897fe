"""Loaders: what the embedded tasks are made of, and files in the usual formats."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from launch import config
from t5like.data.sources.python_stdlib import PythonSource
from t5like.errors import UserError
from t5like.evaluation.files import BeirRetrieval, JsonlClassification, TrecRetrieval
from t5like.evaluation.python_tasks import PythonFunctions, PythonStatements


@pytest.fixture(scope="module")
def statements():
    return PythonStatements().load()


@pytest.fixture(scope="module")
def functions():
    return PythonFunctions().load()


def test_statements_are_balanced_and_apart(statements):
    task = statements
    assert task.labels == ("assignment", "call", "def", "if", "return")
    assert np.bincount(task.train_labels).tolist() == [240] * 5
    assert np.bincount(task.test_labels).tolist() == [100] * 5
    assert not set(task.train_texts) & set(task.test_texts)
    assert all(text.split("\n").count("...") + text.count(" ...") for text in task.test_texts)


def test_embedded_tasks_are_the_same_on_every_call(statements, functions):
    again = PythonStatements().load()
    assert again.train_texts == statements.train_texts
    assert again.test_texts == statements.test_texts
    assert np.array_equal(again.test_labels, statements.test_labels)
    assert PythonFunctions().load().queries == functions.queries


def test_embedded_tasks_come_from_held_out_modules(statements, functions):
    source = PythonSource(split="validation", content="code")
    lines = {line.strip() for d in source.documents() for line in d.text.splitlines()}
    for text in (*statements.test_texts[:50], *functions.documents[:50]):
        assert {line.strip() for line in text.splitlines()} <= lines | {"...", ""}


def test_functions_have_lost_the_sentence_that_finds_them(functions):
    task = functions
    assert len(task.queries) >= 100 and len(task.train_queries) >= 50
    assert not set(task.queries) & set(task.train_queries)
    for query, gains in zip(task.queries, task.gains, strict=True):
        ((document, gain),) = gains.items()
        assert gain == 1 and query not in " ".join(task.documents[document].split())
    assert task.gain_matrix().sum(axis=1).tolist() == [1.0] * len(task.queries)


def test_too_many_statements_are_an_error():
    with pytest.raises(UserError, match="PythonStatements.test = 90000: lower it to"):
        PythonStatements(test=90000).load()


def write(path, records):
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_jsonl_classification_holds_a_part_out(tmp_path):
    records = [{"title": f"t{i % 30}", "body": "b", "kind": i % 3 == 0} for i in range(60)]
    path = write(tmp_path / "data.jsonl.gz", records)
    loader = JsonlClassification(path, text_fields=("title", "body"), label_field="kind")
    task = loader.load()
    assert task.labels == ("False", "True")
    assert len(task.train_texts) + len(task.test_texts) == 30  # each text once, on one side
    assert not set(task.train_texts) & set(task.test_texts)
    assert all(text.endswith("\nb") for text in task.train_texts)
    for text, label in zip(task.train_texts, task.train_labels, strict=True):
        assert label == (int(text[1:].split("\n")[0]) % 3 == 0)
    again = JsonlClassification(path, text_fields=("title", "body"), label_field="kind").load()
    assert again.test_texts == task.test_texts


def test_jsonl_errors_name_the_mend(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match="no field 'stars': it has text, label"):
        JsonlClassification(path, label_field="stars").load()
    with pytest.raises(UserError, match="at least two labels"):
        JsonlClassification(path).load()


def test_beir(tmp_path):
    corpus = [{"_id": str(i), "title": f"t{i}", "text": f"x{i}"} for i in range(5)]
    write(tmp_path / "corpus.jsonl.gz", corpus)
    write(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}])
    (tmp_path / "qrels").mkdir()
    header = "query-id\tcorpus-id\tscore\n"
    (tmp_path / "qrels" / "test.tsv").write_text(header + "q2\t4\t2\nq2\t3\t0\nq1\tgone\t1\n")
    task = BeirRetrieval(str(tmp_path)).load()
    assert task.documents == tuple(f"t{i}\nx{i}" for i in range(5))
    assert task.queries == ("two",) and task.gains == ({4: 2.0},)
    assert task.train_queries == ()
    small = BeirRetrieval(str(tmp_path), max_documents=2).load()
    assert small.documents == ("t0\nx0", "t4\nx4") and small.gains == ({1: 2.0},)
    with pytest.raises(UserError, match="no qrels/dev.tsv or qrels_dev.tsv"):
        BeirRetrieval(str(tmp_path), split="dev").load()


def test_trec_as_cranfield_lies(tmp_path):
    documents = "".join(
        f"<doc>\n<docno>{i}</docno>\n<title>wing {i} .</title>\n<author></author>\n"
        f"<text>wing {i} .\nlift &amp; drag < 1</text>\n</doc>\n"
        for i in range(1, 4)
    )
    queries = "".join(
        f"<top>\n<num> {n}</num><title>\nquestion {n}\n</title>\n</top>\n" for n in (1, 2, 9)
    )
    paths = [tmp_path / name for name in ("docs.xml.gz", "queries.xml", "qrels.txt")]
    paths[0].write_bytes(gzip.compress(documents.encode()))
    paths[1].write_text(queries)
    paths[2].write_text("1 0 2 4\n1 0 3 -1\n3 0 1 1\n")
    with pytest.raises(UserError, match="query 3, .*number_by_order = True"):
        TrecRetrieval(*map(str, paths)).load()
    task = TrecRetrieval(*map(str, paths), number_by_order=True, train=0.0).load()
    assert task.documents[0] == "wing 1 .\nlift & drag < 1"
    found = dict(zip(task.queries, task.gains, strict=True))
    assert found == {"question 1": {1: 1.0}, "question 9": {0: 1.0}}
    split = TrecRetrieval(*map(str, paths), number_by_order=True, train=0.5).load()
    assert sorted(split.queries + split.train_queries) == sorted(task.queries)
    assert len(split.queries) == 1


def test_shared_data_loads(shared_data):
    polarity = shared_data / "classification" / "sentence_polarity_train.jsonl.gz"
    task = JsonlClassification(str(polarity), max_test=500).load()
    assert task.labels == ("0", "1") and len(task.test_texts) == 500
    scifact = BeirRetrieval(str(shared_data / "retrieval" / "scifact")).load()
    assert len(scifact.documents) == 5183
    assert (len(scifact.queries), len(scifact.train_queries)) == (300, 809)


@pytest.mark.parametrize("page", ["python", "retrieval", "jsonl_classification"])
def test_pages_of_measures_load(page):
    others = ["compare.base = []", "compare.runs = {'a': []}", "compare.tokens = 1"]
    loaded = config.load([f"gin_configs/evals/{page}.gin"], others, root="compare").run
    for measure in loaded.measures.values():
        assert set(measure.higher_is_better.values()) <= {True, False}
        assert callable(measure.measure)
