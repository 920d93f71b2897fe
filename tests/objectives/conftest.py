"""A vocabulary of bare ids, and settings bound to it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from objectives.base import Setting
from t5like.data.examples import Record
from t5like.data.rng import generator


@dataclasses.dataclass(frozen=True)
class ToyVocabulary:
    """Ids 3.. are words; every id divisible by three starts a word, the two after it go on."""

    size: int = 1000
    num_sentinels: int = 100
    framed: bool = False
    mask: bool = True
    eos_id: int | None = 1
    pad_id: int = 0
    bos_id: int = 0

    @property
    def sentinels(self):
        return np.arange(self.size - 1, self.size - 1 - self.num_sentinels, -1, dtype=np.int32)

    @property
    def mask_id(self):
        return 2 if self.mask else None

    @property
    def special_ids(self):
        framing = [990, 991] if self.framed else []
        return np.unique([self.pad_id, self.eos_id or 0, 2, *framing, *self.sentinels])

    def named_id(self, name):
        return {"[CLS]": 990, "[SEP]": 991}.get(name) if self.framed else None

    def word_starts(self):
        return np.arange(self.size) % 3 == 0

    def fingerprint(self):
        return "toy"

    # Each token is three letters, after a space where it starts a word.

    def piece(self, i):
        letters = chr(97 + i // 676) + chr(97 + i // 26 % 26) + chr(97 + i % 26)
        return letters if i % 3 else f" {letters}"

    def decode(self, ids):
        return "".join(self.piece(int(i)) for i in ids)

    def encode_batch(self, texts):
        letters = [[ord(c) - 97 for c in text.replace(" ", "")] for text in texts]
        return [np.array(x).reshape(-1, 3) @ np.array([676, 26, 1]) for x in letters]


@pytest.fixture(scope="session")
def setting():
    """(architecture, length, targets_length=None, **vocabulary) -> Setting."""

    def make(architecture="encoder_decoder", length=64, targets_length=None, **vocabulary):
        return Setting(architecture, ToyVocabulary(**vocabulary), length, targets_length)

    return make


@pytest.fixture(scope="session")
def record():
    """(number of tokens, seed, lengths of its documents) -> Record of ordinary tokens."""

    def make(length, seed=0, documents=None):
        tokens = generator(seed, "tokens").integers(3, 890, length).astype(np.int32)
        sizes = [length] if documents is None else documents
        ids = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
        return Record(tokens, ids)

    return make
