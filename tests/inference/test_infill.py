"""Blanks in, text out: what a model says ends up where it belongs, whatever it says."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from t5like.data.vocabularies.bytes import ByteVocabulary
from t5like.data.vocabularies.sentencepiece import SentencePieceVocabulary
from t5like.errors import UserError
from t5like.inference.generate import Completion, Decoding, Generator
from t5like.inference.infill import encode_parts, fill, infill, join, split_blanks
from t5like.inference.infill_formats import (
    MaskedSpans,
    PrefixSuffixMiddle,
    Sentinels,
    parse_spans,
)
from t5like.inference.sampling import GREEDY, Sampling
from t5like.models.config import ModelConfig
from t5like.models.transformer import init_parameters

BYTES = ByteVocabulary(extra_ids=8)
SPANS = Sentinels(BYTES.sentinels, BYTES.eos_id)
MASKS = MaskedSpans(BYTES.sentinels[:3], 259, 260, BYTES.eos_id)
MIDDLE = PrefixSuffixMiddle(259, 260, 261, BYTES.eos_id)


@pytest.fixture
def t5(shared_data):
    return SentencePieceVocabulary(str(shared_data / "tokenizers" / "t5_en_32k.spiece.model"))


def prompt_of(vocabulary, parts):
    return Sentinels(vocabulary.sentinels, vocabulary.eos_id).prompt(
        encode_parts(vocabulary, parts)
    )


def spans(vocabulary, *items):
    """Token ids from sentinel numbers and texts."""
    parts = [
        vocabulary.sentinels[item : item + 1] if isinstance(item, int) else vocabulary.encode(item)
        for item in items
    ]
    return np.concatenate(parts).astype(np.int32)


def test_blanks_are_split_in_the_order_they_stand_in():
    assert split_blanks("a ____ b <extra_id_7>.") == ["a ", " b ", "."]
    assert split_blanks("[gap]x____", blank="[gap]") == ["", "x____"]
    with pytest.raises(UserError, match="'no gap' has no blank"):
        split_blanks("no gap")


def test_inputs_are_what_span_corruption_makes(t5):
    text = "Thank you for inviting me to your party last week."
    ids = t5.encode(text)
    parts = split_blanks("Thank you ____ me to your party <extra_id_1> week.")
    start, stop = 2, 4
    assert t5.decode(ids[start:stop]) == "for inviting"
    last = [t5.decode(ids[i : i + 1]) for i in range(len(ids))].index("last")
    expected = np.concatenate([
        ids[:start], t5.sentinels[:1], ids[stop:last], t5.sentinels[1:2], ids[last + 1 :],
        [t5.eos_id],
    ])  # fmt: skip
    np.testing.assert_array_equal(prompt_of(t5, parts), expected)


def test_spans_go_back_where_they_came_from(t5):
    parts = split_blanks("Thank you ____ me to your party ____ week.")
    found, well_formed = parse_spans(spans(t5, 0, "for inviting", 1, "last"), t5.sentinels, 2)
    fills = fill(t5, parts, found)
    assert well_formed
    assert fills == ("for inviting", "last")
    assert join(parts, fills) == "Thank you for inviting me to your party last week."


def test_no_space_is_invented_or_lost_at_a_seam(t5):
    for text in ("f(____)", "un____able", "____ it is.", "End with ____"):
        parts = split_blanks(text)
        assert t5.decode(prompt_of(t5, parts)).replace("<extra_id_0>", "____") in (
            text, text.replace(" ____", "____"),
        )  # fmt: skip
    start = split_blanks("____ it is.")
    assert join(start, fill(t5, start, [t5.encode("So")])) == "So it is."
    tight = split_blanks("See____")
    assert join(tight, fill(t5, tight, [t5.encode("now")])) == "See now"


@settings(max_examples=80, deadline=None)
@given(st.text(min_size=1, max_size=30).filter(lambda t: "____" not in t and "<extra" not in t),
       st.data())  # fmt: skip
def test_what_was_cut_out_of_bytes_comes_back(text, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=6, unique=True))
    cuts = sorted(cuts)[: len(cuts) // 2 * 2]
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    parts, held = pieces[::2], pieces[1::2]
    inputs = prompt_of(BYTES, parts)
    assert (inputs == BYTES.eos_id).sum() == 1
    # The model also says the space that was left to it.
    said = [(" " if p.endswith(" ") else "") + h for p, h in zip(parts, held, strict=False)]
    generated = spans(BYTES, *(x for k, h in enumerate(said) for x in (k, h)))
    found, well_formed = parse_spans(generated, BYTES.sentinels, len(held))
    if parts[0] == "" and held[0].startswith(" "):
        held[0] = held[0][1:]  # no text begins with the space of its first word
        text = text[1:]
    assert well_formed
    assert fill(BYTES, parts, found) == tuple(held)
    assert join(parts, held) == text


@pytest.mark.parametrize(
    ("said", "expected", "well_formed"),
    [
        ((), ("", ""), False),
        ((0, "x"), ("x", ""), False),
        ((1, "y"), ("", "y"), False),
        ((1, "y", 0, "x"), ("x", "y"), False),
        (("stray", 0, "x", 1, "y"), ("x", "y"), False),
        ((0, "x", 0, "again", 1, "y"), ("x", "y"), False),
        ((0, "x", 1, "y", 2, "more", 7, "most"), ("x", "y"), False),
        ((0, 1), ("", ""), True),
        ((0, "x", 1, "y"), ("x", "y"), True),
    ],
)
def test_malformed_generations_survive(said, expected, well_formed):
    ids = spans(BYTES, *said) if said else np.empty(0, np.int32)
    found, good = parse_spans(ids, BYTES.sentinels, 2)
    assert fill(BYTES, ["a", "b", "c"], found) == expected
    assert good is well_formed


@pytest.mark.parametrize(("form", "most"), [(SPANS, 8), (MASKS, 3), (MIDDLE, 1)])
def test_more_blanks_than_the_format_has(form, most):
    with pytest.raises(UserError, match=f"{most + 1} blanks.* at most {most} at once"):
        infill(Scripted([]), ["____", "____" * (most + 1)], form)


@pytest.fixture(scope="module")
def untrained():
    """A Generator of each architecture, with learned nothing."""

    def make(architecture):
        config = ModelConfig(architecture=architecture, vocab_size=384, num_layers=1, d_model=16,
                             d_ff=16, num_heads=2, head_dim=8)  # fmt: skip
        params = jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(0))
        return Generator(config, params, BYTES)

    return functools.cache(make)


@pytest.mark.parametrize(
    ("architecture", "form"),
    [("encoder_decoder", SPANS), ("decoder", SPANS), ("decoder", MASKS), ("decoder", MIDDLE)],
)
def test_an_untrained_model_still_fills(untrained, architecture, form):
    decoding = Decoding(6, Sampling(), num_samples=2)
    texts = ["a ____ b", "____ and ____"][: form.most_blanks]
    results = infill(untrained(architecture), texts, form, decoding)
    assert [len(samples) for samples in results] == [2] * len(texts)
    for text, samples in zip(texts, results, strict=True):
        for filled in samples:
            assert filled.text == join(split_blanks(text), filled.fills)


@pytest.mark.parametrize("beams", [0, 2])
def test_an_answer_ends_with_its_last_end_mark(untrained, beams):
    eom, mask = MASKS.eom_id, int(MASKS.masks[0])
    # The model may say <eom> or one byte, so that it surely comes to the last <eom>.
    generator = dataclasses.replace(untrained("decoder"))
    generator.__dict__["_allowed"] = np.isin(np.arange(384), (eom, 100))
    decoding = Decoding(40, GREEDY, beams=2) if beams else Decoding(40, Sampling(), num_samples=4)
    results = infill(generator, ["x____", "____ y ____"], MASKS, decoding)
    for blanks, samples in enumerate(results, 1):
        for filled in samples:
            said = filled.completion.tokens
            assert filled.completion.ended
            assert (said == eom).sum() == blanks - 1 and mask not in said


class Scripted:
    """Answers every prompt with the same tokens, and remembers what it was asked."""

    vocabulary = BYTES
    bidirectional_inputs = True

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def generate(self, inputs, decoding, *, seed, stop):
        self.asked += [BYTES.decode(ids) for ids in inputs]
        return [[Completion(self.answer, "", 0.0, 0.0, True)] for _ in inputs]


def test_code_keeps_its_lines_and_indentation():
    scripted = Scripted(spans(BYTES, 0, " x = 1", 1, "return"))
    [[filled]] = infill(scripted, ["def f():\n    ____\n    ____ x"], SPANS)
    assert scripted.asked == ["def f():\n   <extra_id_0>\n   <extra_id_1> x"]
    assert filled.text == "def f():\n    x = 1\n    return x"
    assert filled.fills == ("x = 1", "return")
