"""Each format's prompts and answers on hand-made ids, and what is read from answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from t5like.inference.infill_formats import MaskedSpans, PrefixSuffixMiddle, Sentinels

EOS, SEP, EOM = 1, 90, 91
MARKS = np.array([99, 98, 97, 96], np.int32)
SENTINELS = Sentinels(MARKS, EOS)
MASKS = MaskedSpans(MARKS, SEP, EOM, EOS)
MIDDLE = PrefixSuffixMiddle(80, 81, 82, EOS)


def arrays(*lists):
    return [np.array(ids, np.int32) for ids in lists]


def test_sentinels():
    assert SENTINELS.prompt(arrays([5], [], [6, 7])).tolist() == [5, 99, 98, 6, 7, EOS]
    assert SENTINELS.answer(arrays([8], [9, 10])).tolist() == [99, 8, 98, 9, 10, EOS]
    assert SENTINELS.stop_id == EOS and SENTINELS.most_blanks == 4


def test_sentinels_behind_a_mode():
    form = Sentinels(MARKS, EOS, mode_ids=[70, 71])
    assert form.prompt(arrays([5], [6])).tolist() == [70, 71, 5, 99, 6, EOS]
    assert form.answer(arrays([8])).tolist() == [99, 8, EOS]


def test_masked_spans_are_codegen2s():
    prompt = [5, 99, 6, 98, 7, EOS, SEP, 99]
    assert MASKS.prompt(arrays([5], [6], [7])).tolist() == prompt
    assert MASKS.answer(arrays([8], [9, 10])).tolist() == [8, EOM, 98, 9, 10, EOM]
    # The model card's own: prefix <mask_1> suffix <|endoftext|> <sep> <mask_1>.
    assert MASKS.prompt(arrays([5], [7])).tolist() == [5, 99, 7, EOS, SEP, 99]
    assert MASKS.answer(arrays([8])).tolist() == [8, EOM]
    assert MASKS.stop_id == EOM and MASKS.stops(3) == 3 and not MASKS.bidirectional_inputs


def test_prefix_suffix_middle():
    assert MIDDLE.prompt(arrays([5, 6], [7])).tolist() == [80, 5, 6, 81, 7, 82]
    assert MIDDLE.answer(arrays([8])).tolist() == [8, EOS]
    assert MIDDLE.stop_id == EOS and MIDDLE.most_blanks == 1 and not MIDDLE.bidirectional_inputs


span_lists = st.lists(st.lists(st.integers(2, 60), max_size=4), min_size=1, max_size=4)


@given(st.sampled_from([SENTINELS, MASKS, MIDDLE]), span_lists)
def test_what_is_answered_is_read_back(form, spans):
    spans = spans[: form.most_blanks]
    answer = form.answer(arrays(*spans))
    assert answer.dtype == form.prompt(arrays([], *spans)).dtype == np.int32
    assert (answer == form.stop_id).sum() == form.stops(len(spans))
    for said in (answer, answer[:-1]):  # a Completion comes without what ended it
        found, well_formed = form.parse(said, len(spans))
        assert [span.tolist() for span in found] == spans
        assert well_formed


@pytest.mark.parametrize(
    ("form", "said", "blanks", "expected"),
    [
        (SENTINELS, [99, 8, 98, 9, EOS, 97, 3], 2, [[8], [9]]),
        (MASKS, [8, 98, 9, EOM], 2, [[8], [9]]),  # the first <eom> is missing
        (MASKS, [8, EOM, EOM, 98, 9], 2, [[8], [9]]),
        (MASKS, [8, EOM, 7, 98, 9, EOM], 2, [[8], [9]]),  # 7 is in no span
        (MASKS, [8, EOM, 97, 9, EOM], 2, [[8], []]),
        (MASKS, [8, EOM, 99, 9, EOM], 2, [[8], []]),
        (MASKS, [8, EOS, EOM, 98, 9, EOM], 2, [[8], []]),
        (MASKS, [], 2, [[], []]),
        (MIDDLE, [8, 81, 9], 1, [[8]]),
        (MIDDLE, [8, 82, EOS], 1, [[8]]),
    ],
)
def test_malformed_answers_survive(form, said, blanks, expected):
    found, well_formed = form.parse(np.array(said, np.int32), blanks)
    assert [span.tolist() for span in found] == expected
    assert well_formed is (form is SENTINELS)  # that one only went on after its end
