"""Where text comes from: files, JSON lines, this Python, TensorFlow Datasets, seqio."""

from t5like.data.sources.base import Document, Source
from t5like.data.sources.jsonl import JsonlSource
from t5like.data.sources.python_stdlib import PythonSource
from t5like.data.sources.seqio import SeqioSource
from t5like.data.sources.text import TextSource
from t5like.data.sources.tfds import TfdsSource

__all__ = [
    "Document",
    "JsonlSource",
    "PythonSource",
    "SeqioSource",
    "Source",
    "TextSource",
    "TfdsSource",
]
