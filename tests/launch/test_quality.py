"""The report at a run's end, on objectives that leave blanks and on those that do not."""

import dataclasses
import types

import numpy as np
import pytest

from launch import quality
from t5like.data.examples import Seq2Seq
from t5like.errors import UserError
from t5like.evaluation.input_use import InputUse

SENTINELS = np.arange(103, 93, -1, dtype=np.int32)


class Endless:
    """Stands for a pipeline: endless examples, whose inputs `inputs_of` gives by number."""

    def __init__(self, inputs_of):
        self._inputs_of, self.drawn = inputs_of, 0

    def examples(self, start=0):
        while True:
            self.drawn += 1
            inputs = np.asarray(self._inputs_of(start), np.int32)
            yield types.SimpleNamespace(example=Seq2Seq(inputs, np.ones(2, np.int32)))
            start += 1


def data_with(sentinels):
    return types.SimpleNamespace(
        vocabulary=types.SimpleNamespace(sentinels=sentinels, special_ids=sentinels),
        model=types.SimpleNamespace(architecture="encoder_decoder"),
    )


def test_examples_without_blanks_end_the_search_and_show_nothing():
    for sentinels in (SENTINELS, SENTINELS[:0]):
        prefix_lm = Endless(lambda index: [5, 6, 1])
        assert list(quality.infills(data_with(sentinels), prefix_lm, {"model": {}})) == []
        assert 10 < prefix_lm.drawn < 200


def test_examples_with_blanks_are_found_far_apart():
    corrupted = Endless(lambda index: [index % 90 + 2, SENTINELS[0] if index % 2 else 5, 1])
    found = list(quality._readable(data_with(SENTINELS), corrupted))
    assert len(found) > 3
    assert all(SENTINELS[0] in example.inputs for example in found)


def test_a_report_that_cannot_be_written_names_the_file(tmp_path, monkeypatch):
    use = InputUse(**{field.name: 1.0 for field in dataclasses.fields(InputUse)})
    monkeypatch.setattr(quality, "measure_input_use", lambda *args: use)
    (tmp_path / "file").write_text("")
    pipeline = types.SimpleNamespace(one_pass=lambda limit: iter(()))
    with pytest.raises(UserError, match="file/run/quality.json"):
        quality.report(data_with(SENTINELS), None, pipeline, {}, str(tmp_path / "file" / "run"))
