"""Vocabularies that the `tokenizers` library runs: WordPiece, GPT-2's BPE, tokenizer.json."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
from typing import Any

import numpy as np
import tokenizers

from t5like.data.vocabularies.base import Vocabulary, read_file
from t5like.errors import UserError

_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "[SEP]")
_UNK = ("<unk>", "[UNK]", "<|unk|>")


def _lines(data: bytes) -> list[str]:
    """Lines of a vocabulary file; str.splitlines would also cut at pieces such as U+2028."""
    return data.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")


class _TokenizerVocabulary(Vocabulary):
    """What the three have in common: everything but how the tokenizer is made."""

    def _make(self) -> tokenizers.Tokenizer:
        raise NotImplementedError

    @functools.cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        try:
            tokenizer = self._make()
        except Exception as e:  # tokenizers raises bare Exception.
            raise UserError(f"{self} cannot be read ({e})") from e
        # "</s>" in a text is text: only the pipeline puts control tokens.
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def _pieces(self) -> dict[int, str]:
        return {i: piece for piece, i in self._ids.items()}

    @functools.cached_property
    def base_size(self) -> int:
        return max(self._ids.values()) + 1

    @property
    def eos_id(self) -> int | None:
        return self.named_id(*_EOS)

    @property
    def unk_id(self) -> int | None:
        return self.named_id(*_UNK)

    def named_id(self, *names: str) -> int | None:
        return next((self._ids[name] for name in names if name in self._ids), None)

    def _encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _decode_run(self, ids: list[int], first: bool) -> str:
        del first
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""

    def _piece(self, i: int) -> str:
        return self._pieces.get(i, f"<unused_{i}>")

    @functools.cached_property
    def _control(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return frozenset(i for i, token in added if token.special)

    def _is_control(self, i: int) -> bool:
        return i in self._control or i not in self._pieces

    def _starts_word(self, i: int) -> bool:
        # Byte-level BPE writes bytes as letters: \u0120 is a space, \u010a a newline, \u0109 a tab.
        first = self._piece(i)[:1]
        return first.isspace() or first in ("\u0120", "\u010a", "\u0109", "\u2581")


@dataclasses.dataclass(frozen=True)
class WordPieceVocabulary(_TokenizerVocabulary):
    """BERT's WordPiece (https://arxiv.org/abs/1810.04805); EOS is [SEP] and BOS [CLS].

    Attributes:
      path: vocab.txt, a piece a line.
      lowercase: as the uncased models; accents are stripped with it.
      extra_ids: sentinels appended.
    """

    path: str
    lowercase: bool = True
    extra_ids: int = 0

    def _content(self) -> bytes:
        return read_file(self.path, "WordPieceVocabulary.path")

    def _make(self) -> tokenizers.Tokenizer:
        pieces = _lines(self._content())
        model = tokenizers.models.WordPiece(
            {piece: i for i, piece in enumerate(pieces)},
            unk_token="[UNK]",
            max_input_chars_per_word=100,
        )
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        return tokenizer

    def _is_control(self, i: int) -> bool:
        piece = self._piece(i)
        return piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") or piece.startswith(
            "[unused"
        )

    def _starts_word(self, i: int) -> bool:
        return not self._piece(i).startswith("##")


@dataclasses.dataclass(frozen=True)
class GPT2Vocabulary(_TokenizerVocabulary):
    """GPT-2's byte-level BPE; EOS, BOS and pad are <|endoftext|>.

    Attributes:
      encoder_path: encoder.json (or vocab.json).
      merges_path: vocab.bpe (or merges.txt).
      extra_ids: sentinels appended.
    """

    encoder_path: str
    merges_path: str
    extra_ids: int = 0

    def _content(self) -> bytes:
        encoder = read_file(self.encoder_path, "GPT2Vocabulary.encoder_path")
        return encoder + b"\0" + read_file(self.merges_path, "GPT2Vocabulary.merges_path")

    def _make(self) -> tokenizers.Tokenizer:
        encoder, merges = self._content().split(b"\0", 1)
        lines = [line for line in _lines(merges) if line and not line.startswith("#version")]
        pairs = [tuple(line.split(" ")) for line in lines]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(json.loads(encoder), pairs))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        return tokenizer

    def _is_control(self, i: int) -> bool:
        return self._piece(i) == "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class TokenizerJsonVocabulary(_TokenizerVocabulary):
    """A Hugging Face tokenizer.json, plain or `.gz`.

    Attributes:
      path: the file.
      extra_ids: sentinels appended, unless the file has `<extra_id_0>` and so on itself.
      eos_token, pad_token, bos_token: for files whose names for these are not the usual ones.
    """

    path: str
    extra_ids: int = 0
    eos_token: str | None = None
    pad_token: str | None = None
    bos_token: str | None = None

    def _content(self) -> bytes:
        data = read_file(self.path, "TokenizerJsonVocabulary.path")
        try:
            return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        except (OSError, EOFError) as e:
            raise UserError(f"{self.path} is not a readable gzip file ({e})") from e

    def _make(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._content().decode())

    def _settings(self) -> dict[str, Any]:
        # Special strings were once read as ids; stores made so must not be taken for these.
        return {**super()._settings(), "special_strings": "text"}

    def _chosen(self, setting: str, default: int | None) -> int | None:
        token = getattr(self, setting)
        if token is not None and token not in self._ids:
            raise UserError(f"TokenizerJsonVocabulary.{setting}: {self.path} has no {token!r}")
        return default if token is None else self._ids[token]

    @property
    def eos_id(self) -> int | None:
        return self._chosen("eos_token", super().eos_id)

    @property
    def pad_id(self) -> int:
        return self._chosen("pad_token", super().pad_id)

    @property
    def bos_id(self) -> int:
        return self._chosen("bos_token", super().bos_id)
