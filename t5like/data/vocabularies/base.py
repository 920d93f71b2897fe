"""What a vocabulary is: text to token ids and back, and which ids are not text."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from t5like.errors import UserError

SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Vocabulary:
    """Base of all vocabularies: frozen dataclasses of settings; tables are read at first use.

    A pickled vocabulary is its settings only, so it travels to worker processes cheaply.

    Attributes:
      extra_ids: sentinels wanted. They are appended after the vocabulary's own ids, and
        `<extra_id_0>` is the last id of all (T5, https://arxiv.org/abs/1910.10683, section
        3.1.4), unless the vocabulary's own pieces include sentinels: then those serve.
    """

    extra_ids: int

    # --- what a vocabulary must say ---

    @property
    def base_size(self) -> int:
        """Ids before appended sentinels."""
        raise NotImplementedError

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text."""
        raise NotImplementedError

    @property
    def unk_id(self) -> int | None:
        """The id of what the vocabulary cannot write, or None where there is no such thing."""
        raise NotImplementedError

    def named_id(self, *names: str) -> int | None:
        """The id of the first special piece of these names that exists, or None."""
        raise NotImplementedError

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def _decode_run(self, ids: list[int], first: bool) -> str:
        """Text of ids without appended sentinels; `first` where nothing comes before them."""
        raise NotImplementedError

    def _piece(self, i: int) -> str:
        raise NotImplementedError

    def _is_control(self, i: int) -> bool:
        """Whether an id stands for no text."""
        raise NotImplementedError

    def _content(self) -> bytes:
        """The bytes of the vocabulary's files."""
        raise NotImplementedError

    # --- what follows from that ---

    @property
    def size(self) -> int:
        """Ids in all, sentinels included."""
        return self.base_size + self._appended

    @property
    def pad_id(self) -> int:
        """Fills the end of a row. A vocabulary without one pads with EOS (else 0).

        Padding is known by segment ids, never by this value, so nothing is lost by that.
        """
        pad = self.named_id("<pad>", "[PAD]", "<|padding|>")
        return pad if pad is not None else self.eos_id or 0

    @property
    def bos_id(self) -> int:
        """What a decoder starts from; the pad id where there is no BOS (T5)."""
        bos = self.named_id("<s>", "<bos>", "[CLS]", "<|begin_of_text|>")
        return bos if bos is not None else self.pad_id

    @property
    def mask_id(self) -> int | None:
        """The [MASK] id; a vocabulary without one lends its first sentinel, if it has any."""
        mask = self.named_id("[MASK]", "<mask>")
        if mask is None and len(self.sentinels):
            return int(self.sentinels[0])
        return mask

    @functools.cached_property
    def _own_sentinels(self) -> list[int]:
        own = []
        while (i := self.named_id(f"<extra_id_{len(own)}>")) is not None:
            own.append(i)
        return own

    @property
    def _appended(self) -> int:
        return 0 if self._own_sentinels else self.extra_ids

    @functools.cached_property
    def sentinels(self) -> np.ndarray:
        """int32 [extra_ids], in order of use."""
        if self._own_sentinels:
            return np.array(self._own_sentinels, np.int32)
        return np.arange(self.size - 1, self.base_size - 1, -1, dtype=np.int32)

    @functools.cached_property
    def _sentinel_numbers(self) -> dict[int, int]:
        return {int(i): k for k, i in enumerate(self.sentinels)}

    @functools.cached_property
    def _silent_ids(self) -> frozenset[int | None]:
        """Ids that decode to nothing: EOS and pad, unless pad is id 0 for want of either."""
        if self.eos_id is None and self.pad_id == 0 and not self._is_control(0):
            return frozenset()
        return frozenset({self.eos_id, self.pad_id})

    @functools.cached_property
    def _not_text(self) -> np.ndarray:
        """bool [size]: ids that `decode` treats apart from text."""
        apart = np.zeros(self.size, bool)
        apart[[i for i in (*self._silent_ids, *self.sentinels.tolist()) if i is not None]] = True
        return apart

    @functools.cached_property
    def special_ids(self) -> np.ndarray:
        """int32, rising: ids that stand for no text (pad, EOS, BOS, UNK, mask, sentinels ...)."""
        named = [*self._silent_ids, self.unk_id, self.mask_id]
        named += [self.bos_id] if self.bos_id != self.pad_id else []
        control = [i for i in range(self.base_size) if self._is_control(i)]
        found = {i for i in [*named, *control, *self.sentinels.tolist()] if i is not None}
        return np.array(sorted(found), np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 [n], without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [n] each, without BOS or EOS."""
        return self._encode_batch(list(texts))

    def encode_with_sentinels(self, text: str) -> np.ndarray:
        """As `encode`, but `<extra_id_k>` in the text is the sentinel, as in an infilling prompt.

        Raises:
          UserError: the text names a sentinel that the vocabulary does not have.
        """
        pieces = SENTINEL.split(text)
        numbers = [int(k) for k in pieces[1::2]]
        self.require_sentinels(max(numbers, default=-1) + 1, "the text")
        runs = self.encode_batch(pieces[0::2])
        parts = [runs[0]]
        for k, run in zip(numbers, runs[1:], strict=True):
            parts += [self.sentinels[k : k + 1], run]
        return np.concatenate(parts).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; sentinels read `<extra_id_k>`, pad and EOS read as nothing.

        In a vocabulary that has neither, id 0 fills rows and is text all the same.

        Raises:
          ValueError: an id is not in the vocabulary.
        """
        ids = np.asarray(ids, np.int64)
        if len(foreign := ids[(ids < 0) | (ids >= self.size)]):
            raise ValueError(f"id {foreign[0]} is not in a vocabulary of {self.size}")
        if not self._not_text[ids].any():
            return self._decode_run(ids.tolist(), True)
        text, run = [], []
        for i in ids.tolist():
            if i in self._sentinel_numbers:
                number = self._sentinel_numbers[i]
                text += [self._decode_run(run, not text), f"<extra_id_{number}>"]
                run = []
            elif i not in self._silent_ids:
                run.append(i)
        return "".join([*text, self._decode_run(run, not text)])

    def piece(self, i: int) -> str:
        """The piece of an id as the vocabulary writes it."""
        appended = self.size - 1 - i
        if 0 <= appended < self._appended:
            return f"<extra_id_{appended}>"
        if not 0 <= i < self.base_size:
            raise ValueError(f"id {i} is not in a vocabulary of {self.size}")
        return self._piece(i)

    def _starts_word(self, i: int) -> bool:
        return self._piece(i)[:1].isspace()

    def word_starts(self) -> np.ndarray:
        """bool [size]: whether a token begins a word (special ids do, being words themselves)."""
        return self._word_starts

    @functools.cached_property
    def _word_starts(self) -> np.ndarray:
        starts = np.ones(self.size, bool)
        starts[: self.base_size] = [self._starts_word(i) for i in range(self.base_size)]
        starts[self.special_ids] = True
        starts.setflags(write=False)
        return starts

    def require_sentinels(self, n: int, who: str) -> None:
        """Raises UserError unless the vocabulary has n sentinels for `who`."""
        if n > len(self.sentinels):
            raise UserError(
                f"{who} needs {n} sentinels, but {self} has {len(self.sentinels)}: raise "
                f"{type(self).__name__}.extra_ids to {n} or more"
            )

    @functools.cached_property
    def _fingerprint(self) -> str:
        key = f"{type(self).__name__}/{self._settings()!r}".encode()
        return hashlib.blake2b(key + b"\0" + self._content(), digest_size=16).hexdigest()

    def _settings(self) -> dict[str, Any]:
        """Fields that change the ids; paths do not (the files' content does)."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if not name.endswith("path")}

    def fingerprint(self) -> str:
        """A hash of class, settings and content: equal fingerprints give equal ids."""
        return self._fingerprint

    def resolve(self, source: Any, cache_dir: Any) -> Vocabulary:
        """The vocabulary to use for a source; only one that is still to be trained differs."""
        del source, cache_dir
        return self

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def read_file(path: str, who: str) -> bytes:
    """The bytes of a vocabulary file.

    Raises:
      UserError: naming the file and the setting `who`.
    """
    try:
        return epath.Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{who}: {path} cannot be read ({e.strerror or e})") from e
