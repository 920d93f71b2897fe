"""Ids without text, for what needs a vocabulary's size and special ids and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from t5like.data.vocabularies.base import Vocabulary
from t5like.errors import UserError

_PIECES = ("<pad>", "</s>", "<unk>")


@dataclasses.dataclass(frozen=True)
class SizedVocabulary(Vocabulary):
    """Stands in for a vocabulary whose files are not here: a step is compiled for its shapes.

    pad 0, EOS 1, UNK 2, then the named pieces, sentinels last. It reads and writes no text.

    Attributes:
      tokens: ids in all but for the sentinels.
      named: pieces that objectives ask for by name.
    """

    tokens: int = 32000
    extra_ids: int = 100
    named: Sequence[str] = ("[MASK]",)

    @property
    def base_size(self) -> int:
        return self.tokens

    @property
    def eos_id(self) -> int:
        return 1

    @property
    def unk_id(self) -> int:
        return 2

    def named_id(self, *names: str) -> int | None:
        pieces = (*_PIECES, *self.named)
        return next((pieces.index(name) for name in names if name in pieces), None)

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        raise UserError(
            "SizedVocabulary has no text, only a size: bind train.vocabulary to one that can read"
        )

    def _decode_run(self, ids: list[int], first: bool) -> str:
        del first
        return "".join(f"<{i}>" for i in ids)

    def _piece(self, i: int) -> str:
        pieces = (*_PIECES, *self.named)
        return pieces[i] if i < len(pieces) else f"<{i}>"

    def _is_control(self, i: int) -> bool:
        return i < len(_PIECES) + len(self.named)

    def _content(self) -> bytes:
        return b""
