"""A SentencePiece vocabulary trained on the corpus itself at first use."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Iterator

import sentencepiece

from t5like.data.atomic import local, replacing, writing
from t5like.data.sources.base import Source
from t5like.data.vocabularies.sentencepiece import SentencePieceVocabulary
from t5like.errors import UserError

MODEL_TYPES = ("bpe", "unigram")
# Part of the cached model's name: raise it when equal settings give another model.
_VERSION = 2
_SLICES = 64
_CHUNK_CHARACTERS = 2048


@dataclasses.dataclass(frozen=True)
class TrainedVocabulary:
    """Trains SentencePiece on a sample of a source, once, and caches the model.

    The model is lossless, so that it can write source code: no normalisation, runs of spaces as
    pieces, a newline and a tab as pieces of their own, bytes for rare characters. pad 0, EOS 1,
    UNK 2, sentinels last. Equal settings and sources give equal models, whatever the machine.

    Attributes:
      size: ids in all, sentinels included.
      extra_ids: sentinels.
      model_type: "bpe", or "unigram", which takes about ten times as long to train.
      sample_bytes: text to train on, taken evenly from all over the source.
    """

    size: int = 4096
    extra_ids: int = 100
    model_type: str = "bpe"
    sample_bytes: int = 2 << 20

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise UserError(
                f"TrainedVocabulary.model_type is {self.model_type!r}: choose one of "
                f"{', '.join(MODEL_TYPES)}"
            )

    def resolve(self, source: Source, cache_dir: str | os.PathLike) -> SentencePieceVocabulary:
        """The vocabulary for a source: from `cache_dir` if it was trained before.

        Raises:
          UserError: the source is too small for `size`, or the cache cannot be written.
        """
        key = f"{_VERSION}/{self}/{sentencepiece.__version__}/{source.fingerprint()}"
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        path = local(cache_dir) / f"vocabulary-{name}.model"
        if not path.exists():
            model = self._train(source)
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                stream.write(model)
        return SentencePieceVocabulary(str(path), self.extra_ids)

    def _train(self, source: Source) -> bytes:
        model = io.BytesIO()
        train = functools.partial(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=sample(source, self.sample_bytes),
            model_writer=model,
            model_type=self.model_type,
            vocab_size=self.size - self.extra_ids,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            user_defined_symbols=["\n", "\t"],
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            max_sentence_length=8 * _CHUNK_CHARACTERS,
            seed_sentencepiece_size=100_000,
            # Sums of expected counts depend on the number of threads, and with them the model.
            num_threads=1,
            minloglevel=3,
        )
        try:
            train()
        except (RuntimeError, OSError) as e:
            raise UserError(
                f"no vocabulary of {self.size} ids could be trained on {source} ({e}): lower "
                "TrainedVocabulary.size or give it more text"
            ) from e
        return model.getvalue()


def sample(source: Source, sample_bytes: int) -> Iterator[str]:
    """About sample_bytes of a source in chunks of whole lines, evenly from its slices.

    Files that cannot be cut lie in one slice each; empty slices leave their share to the others.
    """
    slices = [source.documents(shard, _SLICES) for shard in range(_SLICES)]
    firsts = [next(documents, None) for documents in slices]
    filled = [pair for pair in zip(firsts, slices, strict=True) if pair[0] is not None]
    for first, documents in filled:
        left = sample_bytes // len(filled)
        for document in itertools.chain([first], documents):
            text = document.text[:left]
            left -= len(text.encode("utf-8", "replace"))
            yield from _chunks(text)
            if left <= 0:
                break


def _chunks(text: str) -> Iterator[str]:
    held = ""
    for line in text.splitlines(keepends=True):
        if len(held) + len(line) > _CHUNK_CHARACTERS and held:
            yield held
            held = ""
        held += line
        while len(held) > _CHUNK_CHARACTERS:
            yield held[:_CHUNK_CHARACTERS]
            held = held[_CHUNK_CHARACTERS:]
    if held:
        yield held
