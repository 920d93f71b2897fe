"""Speed of the data path on one core, beside tf-text and seqio in the same run.

    python benchmarks/data.py                       # text generated from Python's own manual
    python benchmarks/data.py --data=FILE.txt       # a document a line
    python benchmarks/data.py --vocabulary=spiece.model

Prints a markdown table, and that of corruption.py for every objective. Needs tensorflow-text and
seqio; the preprocessors are T5's own where the `t5` package is installed, else the same steps
written with tf.data here.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import corruption
import numpy as np

from objectives.base import Setting
from objectives.noise import random_spans_lengths
from objectives.span_corruption import SpanCorruption
from t5like.data.corpus import Corpus, build_corpus
from t5like.data.loader import load
from t5like.data.pipeline import Component, Pipeline
from t5like.data.sources.python_stdlib import PythonSource
from t5like.data.sources.text import TextSource
from t5like.data.vocabularies.sentencepiece import SentencePieceVocabulary
from t5like.data.vocabularies.trained import TrainedVocabulary

LENGTH, BATCH, DENSITY, SPAN = 512, 128, 0.15, 3.0
ENCDEC = "encoder_decoder"


def main() -> None:
    arguments = parse_arguments()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        text = arguments.data or generate(folder / "text.txt", arguments.megabytes)
        source = TextSource(str(text), unit="line")
        if arguments.vocabulary:
            vocabulary = SentencePieceVocabulary(arguments.vocabulary)
        else:
            vocabulary = TrainedVocabulary(8000, model_type="unigram").resolve(source, folder)
        report(source, text, vocabulary, folder, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, help="text, a document a line")
    parser.add_argument("--vocabulary", help="a SentencePiece model; default: trained on the text")
    parser.add_argument("--megabytes", type=int, default=12, help="of text to generate")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; best counts")
    parser.add_argument("--step_seconds", type=float, default=0.2, help="of the simulated step")
    return parser.parse_args()


def generate(path: pathlib.Path, megabytes: int) -> pathlib.Path:
    """Running text from Python's manual in documents of lognormal length, one a line."""
    pages = PythonSource(content="prose").documents()
    words = " ".join(page.text for page in pages).split()
    rng, written = np.random.default_rng(0), 0
    with path.open("w") as file:
        while written < megabytes << 20:
            size = min(int(rng.lognormal(5.2, 1.1)) + 1, len(words) // 2)
            start = int(rng.integers(len(words) - size))
            written += file.write(" ".join(words[start : start + size]) + "\n")
    return path


def report(source, text, vocabulary, folder, arguments) -> None:
    """Measures everything, ours and theirs in turn, and prints the table."""
    numbers = iter(range(1000))

    def store() -> Corpus:
        directory = folder / f"store{next(numbers)}"
        return build_corpus(source, vocabulary, directory, workers=1, progress=False)

    corpus = store()
    encdec = make_pipeline(corpus, vocabulary)
    steps = corpus.num_tokens // (BATCH * encdec.components[0].objective.unit.raw_length)

    def batches(corpus: Corpus) -> None:
        made = make_pipeline(corpus, vocabulary)
        for step in range(steps):
            made.batch(step)

    # First, while TensorFlow has not yet imported half of what the loader needs.
    first, blocked = blocking(encdec, arguments.step_seconds)
    theirs, origin = seqio_task(text, vocabulary)
    candidates = [
        store,
        tf_text_encode(text, vocabulary),
        lambda: batches(corpus),
        lambda: batches(store()),
        theirs,
    ]
    ours_store, tf_text, ours_batches, ours_all, seqio_all = best(
        candidates, corpus.num_tokens, arguments.repeats
    )

    print(f"{corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens; one core")
    print("\n| what | t5like | beside | ratio |\n| --- | ---: | ---: | ---: |")
    print(row("text to store (beside: tf-text encode)", ours_store, tf_text))
    print(row(f"store to packed span corruption, {LENGTH}", ours_batches, None))
    print(row(f"text to batches (beside: seqio, {origin})", ours_all, seqio_all))
    print(f"| first batch, seconds (imports of the executor included) | {first:.2f} | | |")
    print(f"| blocked in next(batch), step of {arguments.step_seconds} s | {blocked:.2%} | | |")
    print("\n" + corruption.measured())


def row(what: str, ours: float, theirs: float | None) -> str:
    """A line of the table, from tokens a second."""
    if theirs is None:
        return f"| {what} | {ours / 1e6:.2f} M tokens/s | | |"
    return (
        f"| {what} | {ours / 1e6:.2f} M tokens/s | {theirs / 1e6:.2f} M tokens/s "
        f"| {ours / theirs:.1f} |"
    )


def best(candidates: list[Callable], tokens: int, repeats: int) -> list[float]:
    """Tokens a second of each candidate, the best of several rounds in which all take turns."""
    seconds = [float("inf")] * len(candidates)
    for _ in range(repeats):
        for i, run in enumerate(candidates):
            start = time.perf_counter()
            run()
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return [tokens / s for s in seconds]


# --- ours ----------------------------------------------------------------------------------------


def make_pipeline(corpus: Corpus, vocabulary) -> Pipeline:
    """Packed T5 span corruption."""
    objective = SpanCorruption(noise_density=DENSITY, mean_noise_span_length=SPAN).bind(
        Setting(ENCDEC, vocabulary, LENGTH)
    )
    return Pipeline(
        [Component("all", corpus, objective)],
        vocabulary=vocabulary,
        architecture=ENCDEC,
        length=LENGTH,
        targets_length=objective.lengths.targets,
        batch_size=BATCH,
        seed=0,
        pack=True,
    )


def blocking(pipeline: Pipeline, step_seconds: float, steps: int = 40) -> tuple[float, float]:
    """(Seconds to the first batch, share of the following time spent in next) around a sleep."""
    start = time.perf_counter()
    loader = load(pipeline)
    next(loader)
    first = time.perf_counter() - start
    start, blocked = time.perf_counter(), 0.0
    for _ in range(steps):
        time.sleep(step_seconds)
        asked = time.perf_counter()
        next(loader)
        blocked += time.perf_counter() - asked
    total = time.perf_counter() - start
    loader.close()
    return first, blocked / total


# --- beside --------------------------------------------------------------------------------------


def tf_text_encode(text: pathlib.Path, vocabulary) -> Callable[[], None]:
    """tf-text's SentencePiece over the same lines in tf.data, as seqio calls it."""
    import tensorflow as tf
    import tensorflow_text as tf_text

    model = pathlib.Path(vocabulary.path).read_bytes()
    tokenizer = tf_text.SentencepieceTokenizer(model=model)
    lines = tf.data.TextLineDataset(str(text)).map(tokenizer.tokenize)

    def run() -> None:
        for _ in lines:
            pass

    return run


def seqio_task(text: pathlib.Path, vocabulary) -> tuple[Callable[[], None], str]:
    """A seqio Task with T5's preprocessors to packed batches, and whose preprocessors they are."""
    import seqio

    spm = seqio.SentencePieceVocabulary(vocabulary.path, extra_ids=vocabulary.extra_ids)
    denoise, origin = _t5_span_corruption() or (_tf_span_corruption(vocabulary.size), "tf.data")
    targets = random_spans_lengths(LENGTH, DENSITY, SPAN)[1]
    feature = seqio.Feature(spm, add_eos=True)
    task = seqio.TaskRegistry.add(
        "benchmark",
        source=seqio.TextLineDataSource({"train": str(text)}),
        preprocessors=[
            lambda lines: lines.map(lambda line: {"inputs": "", "targets": line}),
            seqio.preprocessors.tokenize,
            denoise,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={"inputs": feature, "targets": feature},
    )
    lengths = {"inputs": LENGTH, "targets": targets}

    def run() -> None:
        examples = task.get_dataset(lengths, split="train", shuffle=False, use_cached=False)
        packed = seqio.EncDecFeatureConverter(pack=True)(examples, lengths)
        for _ in packed.batch(BATCH, drop_remainder=True).as_numpy_iterator():
            pass

    return run, origin


def _t5_span_corruption():
    try:
        from t5.data import preprocessors
    except ImportError:
        return None
    return preprocessors.span_corruption, "T5's preprocessors"


def _tf_span_corruption(vocab_size: int) -> Callable:
    """T5's steps: 128 documents joined, cut, a mask of random spans, unique sentinels."""
    import tensorflow as tf

    raw = random_spans_lengths(LENGTH, DENSITY, SPAN)[0]

    def segmentation(items, segments):
        cuts = tf.random.shuffle(tf.cast(tf.range(items - 1) < segments - 1, tf.int32))
        ids = tf.cumsum(tf.concat([[0], cuts], 0))
        return tf.math.segment_sum(tf.ones_like(ids), ids)

    def random_mask(length):
        real = tf.cast(length, tf.float32)
        noise = tf.clip_by_value(tf.cast(tf.round(real * DENSITY), tf.int32), 1, length - 1)
        spans = tf.maximum(tf.cast(tf.round(tf.cast(noise, tf.float32) / SPAN), tf.int32), 1)
        sizes = tf.stack([segmentation(length - noise, spans), segmentation(noise, spans)], 1)
        starts = tf.cumsum(tf.reshape(sizes, [-1]))[:-1]
        marks = tf.math.unsorted_segment_sum(tf.ones_like(starts), starts, length)
        return tf.cumsum(marks) % 2 == 1

    def to_sentinels(tokens, mask):
        before = tf.pad(mask[:-1], [[1, 0]])
        first = mask & ~before
        sentinels = vocab_size - tf.cumsum(tf.cast(first, tokens.dtype))
        return tf.boolean_mask(tf.where(first, sentinels, tokens), ~(mask & before))

    def corrupt(tokens):
        mask = random_mask(tf.size(tokens))
        return {"inputs": to_sentinels(tokens, mask), "targets": to_sentinels(tokens, ~mask)}

    def cut(examples):
        tokens = examples["targets"].flat_values
        windows = tf.size(tokens) // raw  # the rest is left out, to their advantage
        return tf.data.Dataset.from_tensor_slices(
            tf.reshape(tokens[: windows * raw], [windows, raw])
        )

    def preprocess(examples):
        return examples.ragged_batch(128).flat_map(cut).map(corrupt)

    return preprocess


if __name__ == "__main__":
    main()
