"""Text to token ids and back."""

from t5like.data.vocabularies.base import Vocabulary
from t5like.data.vocabularies.bytes import ByteVocabulary
from t5like.data.vocabularies.hugging_face import (
    GPT2Vocabulary,
    TokenizerJsonVocabulary,
    WordPieceVocabulary,
)
from t5like.data.vocabularies.sentencepiece import SentencePieceVocabulary
from t5like.data.vocabularies.sized import SizedVocabulary
from t5like.data.vocabularies.trained import TrainedVocabulary

__all__ = [
    "ByteVocabulary",
    "GPT2Vocabulary",
    "SentencePieceVocabulary",
    "SizedVocabulary",
    "TokenizerJsonVocabulary",
    "TrainedVocabulary",
    "Vocabulary",
    "WordPieceVocabulary",
]
