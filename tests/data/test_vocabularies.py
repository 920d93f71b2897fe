"""Token ids of published tokenizers, the ids that are not text, and round trips."""

from __future__ import annotations

import hashlib
import json
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings, strategies as st

from t5like.data.vocabularies import (
    ByteVocabulary,
    GPT2Vocabulary,
    SentencePieceVocabulary,
    TokenizerJsonVocabulary,
    WordPieceVocabulary,
)
from t5like.errors import UserError


def make(name: str, shared_data):
    folder = shared_data / "tokenizers"
    return {
        "t5": lambda: SentencePieceVocabulary(str(folder / "t5_en_32k.spiece.model")),
        "sp_1k": lambda: SentencePieceVocabulary(str(folder / "sp_en_1k.model"), extra_ids=5),
        "bert": lambda: WordPieceVocabulary(str(folder / "bert_uncased_vocab.txt")),
        "gpt2": lambda: GPT2Vocabulary(
            str(folder / "gpt2_encoder.json"), str(folder / "gpt2_vocab.bpe"), extra_ids=3
        ),
        "neox": lambda: TokenizerJsonVocabulary(
            str(folder / "gpt_neox_20b_tokenizer.json.gz"), extra_ids=3
        ),
        "bytes": ByteVocabulary,
    }[name]()


# What the models' own files and published configurations say.
SPECIAL = {
    #        size, pad, eos, bos, unk, mask, first sentinel
    "t5": (32100, 0, 1, 0, 2, 32099, 32099),
    "sp_1k": (1005, 2, 2, 1, 0, 1004, 1004),
    "bert": (30522, 0, 102, 101, 100, 103, None),
    "gpt2": (50260, 50256, 50256, 50256, None, 50259, 50259),
    "neox": (50283, 1, 0, 1, None, 50282, 50282),
    "bytes": (384, 0, 1, 0, 2, 383, 383),
}
HELLO = {
    "t5": [8774, 296],
    "bert": [7592, 2088],
    "gpt2": [15496, 995],
    "neox": [12092, 1533],
    "bytes": [byte + 3 for byte in b"Hello world"],
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_ids(name, shared_data):
    v = make(name, shared_data)
    first = int(v.sentinels[0]) if len(v.sentinels) else None
    got = (v.size, v.pad_id, v.eos_id, v.bos_id, v.unk_id, v.mask_id, first)
    assert got == SPECIAL[name]
    named = {i for i in got[1:] if i is not None}
    assert named | set(v.sentinels.tolist()) <= set(v.special_ids.tolist())
    assert np.all(np.diff(v.sentinels) == -1)


@pytest.mark.parametrize("name", HELLO)
def test_known_ids(name, shared_data):
    ids = make(name, shared_data).encode("Hello world")
    assert ids.dtype == np.int32
    assert ids.tolist() == HELLO[name]


def test_t5_ids_match_published_ones(shared_data):
    peer = json.loads((shared_data / "peer" / "peer_expectations.json").read_text())
    v = make("t5", shared_data)
    cases = peer["t5_tokenizer"]["cases"]
    assert len(cases) == 5
    texts = [case["text"] for case in cases]
    for ids, case in zip(v.encode_batch(texts), cases, strict=True):
        assert [*ids.tolist(), v.eos_id] == case["ids_with_eos"]


def test_sentencepiece_without_pad_keeps_all_its_ids(shared_data):
    """Id 0 is UNK and 1 BOS in this model: nothing may take id 0 for padding."""
    v = make("sp_1k", shared_data)
    assert (v.piece(0), v.piece(1), v.piece(2)) == ("<unk>", "<s>", "</s>")
    text = "This is a test."
    assert v.decode(v.encode(text)) == text


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_byte_level_vocabularies_round_trip(name, shared_data):
    v = make(name, shared_data)

    @settings(deadline=None)
    @given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
    def check(text):
        ids = v.encode(text)
        assert v.decode(ids) == text
        assert not set(ids.tolist()) & set(v.special_ids.tolist())

    check()


@pytest.mark.parametrize("text", ["def f():\n    return 1\n\n", "  two  spaces\t", "漢字 😀"])
def test_tokenizer_json_round_trips(text, shared_data):
    v = make("neox", shared_data)
    assert v.decode(v.encode(text)) == text


@pytest.mark.parametrize("name", SPECIAL)
def test_sentinels_are_read_and_written(name, shared_data):
    v = make(name, shared_data)
    if not len(v.sentinels):
        with pytest.raises(UserError, match="needs 1 sentinels.*WordPieceVocabulary.extra_ids"):
            v.encode_with_sentinels("a <extra_id_0> b")
        return
    ids = v.encode_with_sentinels("The <extra_id_0> is in <extra_id_1>.")
    assert [i for i in ids.tolist() if i in v.sentinels] == v.sentinels[:2].tolist()
    assert v.decode(ids).replace(" ", "") == "The<extra_id_0>isin<extra_id_1>."
    assert v.piece(v.size - 1) == "<extra_id_0>"
    # Text from a corpus must not be able to name a sentinel.
    assert not set(v.encode("<extra_id_0>").tolist()) & set(v.sentinels.tolist())


def test_decode_keeps_the_space_after_a_sentinel(shared_data):
    v = make("t5", shared_data)
    ids = [*v.encode("The"), v.sentinels[0], *v.encode("walks"), v.eos_id, v.pad_id]
    assert v.decode(ids) == "The<extra_id_0> walks"
    with pytest.raises(ValueError, match="32100"):
        v.decode([v.size])


WORDS = {
    "t5": ["▁un", "believ", "able"],
    "bert": ["em", "##bed", "##ding", "##s"],
    "gpt2": ["Ġun", "bel", "iev", "able"],
}


@pytest.mark.parametrize("name", WORDS)
def test_word_starts(name, shared_data):
    v = make(name, shared_data)
    starts = v.word_starts()
    assert starts.shape == (v.size,) and starts[v.special_ids].all()
    ids = {v.piece(i): i for i in range(v.size)}
    got = [bool(starts[ids[piece]]) for piece in WORDS[name] if piece in ids]
    assert got == [True] + [False] * (len(got) - 1) and len(got) > 1


def test_byte_words_start_at_spaces():
    starts = ByteVocabulary().word_starts()
    assert [bool(starts[ord(c) + 3]) for c in " \nab"] == [True, True, False, False]


@pytest.mark.parametrize("name", SPECIAL)
def test_pickles_as_its_settings(name, shared_data):
    v = make(name, shared_data)
    ids = v.encode("some text")
    data = pickle.dumps(v)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again == v and again.encode("some text").tolist() == ids.tolist()
    assert again.fingerprint() == v.fingerprint()


def test_fingerprint_follows_content_not_place(shared_data, tmp_path):
    v = make("sp_1k", shared_data)
    copy = tmp_path / "copy.model"
    copy.write_bytes((shared_data / "tokenizers" / "sp_en_1k.model").read_bytes())
    assert SentencePieceVocabulary(str(copy), extra_ids=5).fingerprint() == v.fingerprint()
    assert SentencePieceVocabulary(str(copy), extra_ids=6).fingerprint() != v.fingerprint()


def test_ids_that_changed_have_another_fingerprint(shared_data):
    """Stores whose special strings were read as control ids are not taken for these."""
    v = make("neox", shared_data)
    settings = {"extra_ids": 3, "eos_token": None, "pad_token": None, "bos_token": None}
    key = f"TokenizerJsonVocabulary/{settings!r}".encode() + b"\0" + v._content()
    assert v.fingerprint() != hashlib.blake2b(key, digest_size=16).hexdigest()


def test_too_few_sentinels_names_who_and_how_many():
    v = ByteVocabulary(extra_ids=4)
    v.require_sentinels(4, "SpanCorruption")
    with pytest.raises(UserError, match=r"SpanCorruption needs 5 .* has 4: raise ByteVocab"):
        v.require_sentinels(5, "SpanCorruption")


def test_tokenizer_json_with_other_names(shared_data):
    path = str(shared_data / "tokenizers" / "gpt_neox_20b_tokenizer.json.gz")
    v = TokenizerJsonVocabulary(path, eos_token="<|padding|>")
    assert v.eos_id == 1
    with pytest.raises(UserError, match="pad_token"):
        _ = TokenizerJsonVocabulary(path, pad_token="[PAD]").pad_id


def test_a_piece_that_looks_like_a_line_break_is_a_piece(tmp_path):
    path = tmp_path / "vocab.txt"
    for newline in ("\n", "\r\n"):
        pieces = ["[PAD]", "[UNK]", "\u2028", "\x85", "b"]
        path.write_bytes(newline.join([*pieces, ""]).encode())
        v = WordPieceVocabulary(str(path))
        assert v.size == 5 and v.encode("b").tolist() == [4]
        assert [v.piece(i) for i in range(5)] == pieces


def test_id_0_is_text_where_there_is_neither_pad_nor_end(tmp_path):
    model = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="b")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    v = TokenizerJsonVocabulary(str(path), extra_ids=1)
    assert (v.pad_id, v.eos_id) == (0, None)
    assert v.decode(v.encode("a b a")) == "a b a"
    assert v.special_ids.tolist() == [2]


def test_unreadable_vocabularies(tmp_path):
    missing = str(tmp_path / "missing.model")
    with pytest.raises(UserError, match="SentencePieceVocabulary.path: .*missing.model"):
        SentencePieceVocabulary(missing).encode("x")
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a model")
    with pytest.raises(UserError, match="broken.model"):
        SentencePieceVocabulary(str(broken)).encode("x")
    with pytest.raises(UserError, match="broken.model"):
        TokenizerJsonVocabulary(str(broken)).encode("x")


def test_control_words_in_a_text_are_text(shared_data):
    v = make("neox", shared_data)
    ids = v.encode("a <|endoftext|> b<|padding|>")
    assert not np.isin(ids, [v.eos_id, v.pad_id, 1]).any()
    assert v.decode(ids) == "a <|endoftext|> b<|padding|>"
