"""UTF-8 bytes as tokens (ByT5, https://arxiv.org/abs/2105.13626, section 3.1)."""

from __future__ import annotations

import dataclasses

import numpy as np

from t5like.data.vocabularies.base import Vocabulary

_OFFSET = 3


@dataclasses.dataclass(frozen=True)
class ByteVocabulary(Vocabulary):
    """id = byte + 3; pad 0, EOS 1, UNK 2.

    The paper reuses the last 100 byte ids as sentinels, which makes some text unwritable; here
    sentinels follow the bytes, at 259 and up. The default gives ByT5's embedding size, 384.
    """

    extra_ids: int = 125

    @property
    def base_size(self) -> int:
        return _OFFSET + 256

    @property
    def eos_id(self) -> int:
        return 1

    @property
    def unk_id(self) -> int:
        return 2

    @property
    def pad_id(self) -> int:
        return 0

    def named_id(self, *names: str) -> int | None:
        return {"<pad>": 0, "</s>": 1, "<unk>": 2}.get(names[0])

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + _OFFSET for t in texts]

    def _decode_run(self, ids: list[int], first: bool) -> str:
        del first
        return bytes(i - _OFFSET for i in ids if i >= _OFFSET).decode("utf-8", "replace")

    def _piece(self, i: int) -> str:
        return ("<pad>", "</s>", "<unk>")[i] if i < _OFFSET else f"<0x{i - _OFFSET:02X}>"

    def _is_control(self, i: int) -> bool:
        return i < _OFFSET

    def _starts_word(self, i: int) -> bool:
        return i >= _OFFSET and chr(i - _OFFSET) in " \t\n\r\v\f"

    def _content(self) -> bytes:
        return b""
