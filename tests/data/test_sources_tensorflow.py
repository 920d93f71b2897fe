"""tfds directories and seqio tasks as text. Only here do the data tests import TensorFlow."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest

from t5like.data.corpus import build_corpus
from t5like.data.sources import SeqioSource, TfdsSource
from t5like.data.vocabularies import ByteVocabulary
from t5like.errors import UserError

pytest.importorskip("tensorflow_datasets")
seqio = pytest.importorskip("seqio")


@pytest.fixture(scope="module")
def c4(shared_data):
    return shared_data / "tfds" / "c4" / "en" / "2.3.0"


def test_prepared_directory_of_the_old_layout(c4, tmp_path):
    source = TfdsSource(str(c4), "validation", metadata_fields=("url",))
    documents = list(source.documents())
    assert len(documents) == 10
    assert documents[0].text.startswith("The woman who died after falling")
    assert documents[0].metadata["url"].startswith("https://www.kentlive.news/")
    assert [d.text for i in range(3) for d in source.documents(i, 3)] == [d.text for d in documents]
    corpus = build_corpus(source, ByteVocabulary(), tmp_path, progress=False)
    assert ByteVocabulary().decode(corpus.document(3)) == documents[3].text
    assert corpus.metadata["url"][3] == documents[3].metadata["url"]


def test_tfds_errors(c4, tmp_path):
    with pytest.raises(UserError, match="no split 'test': choose one of train, validation"):
        list(TfdsSource(str(c4), "test").documents())
    with pytest.raises(UserError, match="no feature 'txt': did you mean 'text'"):
        list(TfdsSource(str(c4), text_field="txt").documents())
    with pytest.raises(UserError, match="no_such_set"):
        list(TfdsSource("no_such_set", data_dir=str(tmp_path)).documents())
    whole = (c4 / "c4-train.tfrecord-00000-of-00001").read_bytes()
    shutil.copy(c4 / "dataset_info.json", tmp_path)
    (tmp_path / "c4-train.tfrecord-00000-of-00001").write_bytes(whole[:5000])
    with pytest.raises(UserError, match="00000-of-00001 is truncated"):
        list(TfdsSource(str(tmp_path)).documents())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset in two shards as tfds writes them today."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "year": np.int64})
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name="lines", version="1.0.0", data_dir=str(folder), module_name=""
            ),
            features=features,
        ),
        max_examples_per_shard=4,
    )
    writer.initialize_splits(["train"])
    rows = [{"text": f"text {i}", "year": 1900 + i} for i in range(7)]
    writer.add_examples({"train": rows})
    writer.close_all()
    return folder, rows


def test_prepared_directory_of_today(prepared):
    folder, rows = prepared
    source = TfdsSource(str(folder), metadata_fields=("year",))
    for num_shards in (1, source.num_shards(), 5):
        got = [d for i in range(num_shards) for d in source.documents(i, num_shards)]
        assert [{"text": d.text, **d.metadata} for d in got] == rows
    assert source.num_shards() == 2


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seqio")
    (folder / "a.txt").write_text("first line\nsecond line\n")
    (folder / "b.jsonl").write_text(json.dumps({"body": "Rückwärts"}) + "\n")
    features = {"targets": seqio.Feature(seqio.ByteVocabulary())}
    append = functools.partial(seqio.preprocessors.append_eos)
    seqio.TaskRegistry.add(
        "t5like_test_lines",
        source=seqio.TextLineDataSource({"train": str(folder / "a.txt")}),
        preprocessors=[
            lambda dataset: dataset.map(lambda line: {"text": line}),
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            append,
        ],
        output_features=features,
    )
    seqio.TaskRegistry.add(
        "t5like_test_more",
        source=seqio.TextLineDataSource({"train": str(folder / "b.jsonl")}),
        preprocessors=[
            lambda dataset: dataset.map(lambda line: {"inputs": line, "targets": line}),
            seqio.preprocessors.tokenize,
        ],
        output_features=features,
    )
    seqio.MixtureRegistry.add(
        "t5like_test_both", ["t5like_test_lines", "t5like_test_more"], default_rate=1
    )


def test_seqio_task_text_before_tokenising(tasks):
    source = SeqioSource("t5like_test_lines")
    assert [d.text for d in source.documents()] == ["first line", "second line"]
    assert source.num_shards() == 1


def test_seqio_mixture_names_each_task(tasks):
    documents = list(SeqioSource("t5like_test_both").documents())
    assert [d.metadata["task"] for d in documents] == ["t5like_test_lines"] * 2 + [
        "t5like_test_more"
    ]


def test_seqio_errors(tasks):
    with pytest.raises(UserError, match="did you mean 't5like_test_lines'"):
        list(SeqioSource("t5like_test_line").documents())
    with pytest.raises(UserError, match="no split 'test': choose one of train"):
        list(SeqioSource("t5like_test_lines", "test").documents())
    with pytest.raises(UserError, match=r"no text feature 'answer' .*set SeqioSource.feature"):
        list(SeqioSource("t5like_test_lines", feature="answer").documents())
    with pytest.raises(UserError, match="SeqioSource.module 'no_such_module'"):
        list(SeqioSource("t5like_test_lines", module="no_such_module").documents())
