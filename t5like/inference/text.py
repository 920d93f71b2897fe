"""Text at the seams: encoding and decoding pieces that continue another text.

Most tokenizers treat the start of a text specially (SentencePiece puts a space before it and
drops one when decoding), which is wrong for a piece that stands in the middle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# A private-use character is in no vocabulary: it becomes UNK or bytes and merges with nothing.
_ANCHOR = "\ue000"
# Enough tokens to make up a character of bytes, and to tell whether a space is needed.
_CONTEXT = 8


def encode_after(vocabulary: Any, text: str, *, start: bool) -> np.ndarray:
    """Token ids, int32 [n], of a piece of text in the middle of another (or at its start)."""
    if not text:
        return np.empty(0, np.int32)
    if not start:
        anchor, both = vocabulary.encode_batch([_ANCHOR, _ANCHOR + text])
        if np.array_equal(both[: len(anchor)], anchor):
            return both[len(anchor) :].astype(np.int32)
    return vocabulary.encode(text).astype(np.int32)


def decode_after(vocabulary: Any, context: np.ndarray, ids: np.ndarray) -> str:
    """Text of `ids` as it reads after `context`, leading space included."""
    context = np.asarray(context, np.int32)[-_CONTEXT:]
    before = vocabulary.decode(context)
    both = vocabulary.decode(np.concatenate([context, ids]).astype(np.int32))
    if before and both.startswith(before):
        return both[len(before) :]
    return vocabulary.decode(ids)
