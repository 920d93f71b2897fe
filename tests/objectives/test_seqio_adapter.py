"""Objectives as preprocessors of seqio Tasks."""

from __future__ import annotations

import numpy as np
import pytest

from objectives.causal_lm import CausalLM
from objectives.mlm import MaskedLM
from objectives.prefix_lm import PrefixLM
from objectives.seqio_adapter import objective_preprocessor
from objectives.span_corruption import SpanCorruption
from t5like.errors import UserError

TEXTS = ["the quick brown fox", "jumps", "over the lazy dog and goes on for quite a while longer"]
EOS = 1


@pytest.fixture(scope="module")
def run():
    """(objective, lengths, with inputs, keywords) -> (examples, byte vocabulary)."""
    seqio = pytest.importorskip("seqio")
    tf = pytest.importorskip("tensorflow")
    vocabulary = seqio.ByteVocabulary(extra_ids=100)

    def make(objective, lengths, inputs=True, **keywords):
        feature = seqio.Feature(vocabulary=vocabulary, add_eos=False)
        task = seqio.Task(
            f"adapter_{np.random.default_rng().integers(1 << 60)}",
            source=seqio.FunctionDataSource(
                lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
                    {"targets": TEXTS}
                ),
                splits=["train"],
            ),
            preprocessors=[
                seqio.preprocessors.tokenize,
                objective_preprocessor(objective, **keywords),
            ],
            output_features={"inputs": feature, "targets": feature}
            if inputs
            else {"targets": feature},
        )
        dataset = task.get_dataset(lengths, "train", shuffle=False)
        return list(dataset.as_numpy_iterator()), vocabulary

    return make


def stream(vocabulary, end=()):
    return sum(([*vocabulary.encode(text), *end] for text in TEXTS), [])


def test_span_corruption(run):
    objective = SpanCorruption(noise_density=0.3)
    lengths = {"inputs": 24, "targets": 16}
    examples, vocabulary = run(objective, lengths)
    sentinels = set(range(vocabulary.vocab_size - vocabulary.extra_ids, vocabulary.vocab_size))
    kept = [t for e in examples for t in e["inputs"].tolist() if t not in sentinels | {EOS}]
    noise = [t for e in examples for t in e["targets"].tolist() if t not in sentinels | {EOS}]
    assert sorted(kept + noise) == sorted(stream(vocabulary))
    assert all(len(e["inputs"]) <= 24 and len(e["targets"]) <= 16 for e in examples)
    assert len(examples[0]["inputs"]) == 24 and len(examples) > 2

    again, _ = run(objective, lengths)
    other, _ = run(objective, lengths, seed=1)
    ids, same, different = ([e["inputs"].tolist() for e in x] for x in (examples, again, other))
    assert ids == same and ids != different


def test_causal_lm_windows_run_on(run):
    examples, vocabulary = run(CausalLM(), {"targets": 16}, inputs=False)
    assert set(examples[0]) == {"targets"}
    joined = np.concatenate([e["targets"] for e in examples]).tolist()
    assert joined == stream(vocabulary, end=[EOS])


def test_prefix_lm_documents(run):
    objective = PrefixLM(cut="document")
    examples, vocabulary = run(objective, {"targets": 32}, architecture="decoder")
    joined = sum(([*e["inputs"], *e["targets"]] for e in examples), [])
    assert joined == stream(vocabulary, end=[EOS])
    assert max(len(e["inputs"]) + len(e["targets"]) for e in examples) <= 32


def test_masked_lm(run):
    examples, vocabulary = run(MaskedLM(), {"inputs": 16, "targets": 16})
    assert np.concatenate([e["targets"] for e in examples]).tolist() == stream(
        vocabulary, end=[EOS]
    )
    for example in examples:
        changed = example["inputs"] != example["targets"]
        assert (example["loss_weights"][changed] == 1).all()
        words = int((example["targets"] != EOS).sum())
        assert example["loss_weights"].sum() == min(words, max(1, round(0.15 * len(changed))))


def test_lengths_that_do_not_fit_are_an_error(run):
    with pytest.raises(UserError, match="targets_length is 2"):
        run(SpanCorruption(), {"inputs": 24, "targets": 2})
