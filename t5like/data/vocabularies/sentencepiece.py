"""SentencePiece vocabularies (https://arxiv.org/abs/1808.06226), T5's among them."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import sentencepiece

from t5like.data.vocabularies.base import Vocabulary, read_file
from t5like.errors import UserError

_SPACE = "\u2581"


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model; T5's has 32,000 pieces and 100 extra ids: 32,100.

    A model that normalises nothing and falls back to bytes (as trained ones do) is lossless:
    `decode(encode(text)) == text` for every text.

    Attributes:
      path: the `.model` file.
    """

    path: str
    extra_ids: int = 100

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self._content())
        except (RuntimeError, ValueError) as e:
            raise UserError(f"{self.path} is not a SentencePiece model ({e})") from e

    def _content(self) -> bytes:
        return read_file(self.path, "SentencePieceVocabulary.path")

    @functools.cached_property
    def _adds_prefix(self) -> bool:
        return self._processor.normalize("a").startswith(_SPACE)

    @functools.cached_property
    def lossless(self) -> bool:
        """Whether decode(encode(text)) is text."""
        probe = "\ufb01  a\u0301\t\uff21\r\n "
        kept = self._processor.normalize(probe).replace(_SPACE, " ") == probe
        return kept and self.named_id("<0x00>") is not None

    @property
    def base_size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def eos_id(self) -> int | None:
        return _defined(self._processor.eos_id())

    @property
    def unk_id(self) -> int | None:
        return _defined(self._processor.unk_id())

    @property
    def pad_id(self) -> int:
        pad = _defined(self._processor.pad_id())
        return pad if pad is not None else super().pad_id

    @property
    def bos_id(self) -> int:
        bos = _defined(self._processor.bos_id())
        return bos if bos is not None else self.pad_id

    def named_id(self, *names: str) -> int | None:
        for name in names:
            i = self._processor.piece_to_id(name)
            if self._processor.id_to_piece(i) == name:
                return i
        return None

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        ids = self._processor.encode(texts, out_type="numpy", num_threads=1)
        if self.lossless:
            for n, text in enumerate(texts):
                if _SPACE in text:
                    ids[n] = self._encode_marks(text)
        return ids

    def _encode_marks(self, text: str) -> np.ndarray:
        """SentencePiece writes a space as U+2581; a real U+2581 survives as its three bytes."""
        mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        runs = [self._processor.encode(run, out_type=int) for run in text.split(_SPACE)]
        ids = runs[0]
        for run in runs[1:]:
            ids = ids + mark + run
        return np.array(ids, np.int32)

    def _decode_run(self, ids: list[int], first: bool) -> str:
        if not ids:
            return ""
        text = self._processor.decode(ids)
        # A model with a dummy prefix drops the first space of what it decodes.
        dropped = self._adds_prefix and not first and self._piece(ids[0]).startswith(_SPACE)
        return " " + text if dropped else text

    def _piece(self, i: int) -> str:
        return self._processor.id_to_piece(i)

    def _is_control(self, i: int) -> bool:
        sp = self._processor
        return sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)

    def _starts_word(self, i: int) -> bool:
        piece = self._piece(i)
        return piece.startswith(_SPACE) or piece[:1].isspace()


def _defined(i: int) -> int | None:
    return i if i >= 0 else None
