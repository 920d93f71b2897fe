"""Generator on small random models: the cache, batching and buckets change nothing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from t5like.data.examples import Seq2Seq
from t5like.data.layout import lay_out
from t5like.data.vocabularies.bytes import ByteVocabulary
from t5like.errors import UserError
from t5like.inference.generate import Decoding, Generator
from t5like.inference.sampling import Sampling
from t5like.models.config import ModelConfig
from t5like.models.transformer import Transformer, init_parameters

VOCABULARY = ByteVocabulary(extra_ids=10)
TINY = ModelConfig(
    architecture="decoder", vocab_size=384, num_layers=1, d_model=32, d_ff=48, num_heads=4,
    head_dim=8,
)  # fmt: skip
DEEP = dataclasses.replace(TINY, num_layers=2, scan_layers=True)
MODELS = {
    "causal": (TINY, False),
    "prefix": (dataclasses.replace(DEEP, num_kv_heads=2, position="rope"), True),
    "encoder_decoder": (dataclasses.replace(DEEP, architecture="encoder_decoder"), False),
}
# All of one bucket: a shape is a compilation.
PROMPTS = ["a", "a longer one", "", "b c?"]
SAMPLED = Decoding(10, Sampling(1.0, top_k=50), num_samples=2)


@functools.cache
def generator(name: str, batch_size: int = 16) -> Generator:
    config, bidirectional = MODELS[name]
    params = jax.jit(init_parameters, static_argnums=0)(config, jax.random.key(1))
    return Generator(config, params, VOCABULARY, bidirectional, batch_size)


def full_forward(gen: Generator):
    """(inputs, targets so far) -> logits [V] of the next target, by a pass over everything."""
    apply = jax.jit(Transformer(gen.config).apply)

    def logits(inputs, targets):
        example = Seq2Seq(
            np.asarray(inputs, np.int32),
            np.asarray([*targets, 0], np.int32),
            bidirectional_inputs=gen.bidirectional_inputs,
        )
        batch = lay_out(
            [[example]], architecture=gen.config.architecture, length=64, targets_length=32,
            bos_id=VOCABULARY.bos_id, pad_id=VOCABULARY.pad_id, sees_ahead=gen.bidirectional_inputs,
        )  # fmt: skip
        last = int((batch["decoder_segment_ids"] != 0).sum()) - 1
        return np.asarray(apply({"params": gen.params}, batch)[0, last])

    return logits


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_the_argmax_of_full_forward_passes(name):
    gen = generator(name)
    logits = full_forward(gen)
    inputs = [VOCABULARY.encode(prompt) for prompt in PROMPTS]
    if name == "encoder_decoder":
        inputs = [np.append(ids, VOCABULARY.eos_id) for ids in inputs]
    allowed = np.arange(gen.config.vocab_size) < VOCABULARY.size
    allowed[VOCABULARY.pad_id] = False
    for ids, [completion] in zip(inputs, gen.generate(inputs, Decoding(10)), strict=True):
        tokens, log_prob = [], 0.0
        while len(tokens) < 10 and VOCABULARY.eos_id not in tokens:
            row = logits(ids, tokens)
            tokens.append(int(np.argmax(np.where(allowed, row, -np.inf))))
            log_prob += float(jax.nn.log_softmax(row)[tokens[-1]])
        ended = tokens[-1] == VOCABULARY.eos_id
        assert completion.tokens.tolist() == tokens[: len(tokens) - ended]
        assert completion.ended == ended
        np.testing.assert_allclose(completion.log_prob, log_prob, rtol=1e-3)


@pytest.mark.parametrize("name", ["prefix", "encoder_decoder"])
def test_a_completion_does_not_change_with_its_batch(name):
    together = generator(name).complete(PROMPTS, SAMPLED, seed=3)
    one_by_one = generator(name, batch_size=1).complete(PROMPTS, SAMPLED, seed=3)
    for a, b in zip(together, one_by_one, strict=True):
        assert [c.text for c in a] == [c.text for c in b]
    assert len({c.text for completions in together for c in completions}) == 8
    other = generator(name).complete(PROMPTS, SAMPLED, seed=4)
    assert other[0][0].text != together[0][0].text


def test_requests_of_several_buckets_keep_their_order():
    gen, long = generator("causal"), "a prompt of more than sixteen bytes"
    decoding = Decoding(4)
    mixed = gen.complete([long, PROMPTS[0]], decoding)
    apart = [gen.complete([prompt], decoding)[0] for prompt in (long, PROMPTS[0])]
    assert [c.text for [c] in mixed] == [c.text for [c] in apart]


@pytest.mark.parametrize("name", ["prefix", "encoder_decoder"])
def test_score_is_what_generation_reports(name):
    gen = generator(name)
    completions = gen.complete(PROMPTS, SAMPLED, seed=1)
    inputs = [gen._input(VOCABULARY.encode(prompt)) for prompt in PROMPTS]
    targets = [
        np.append(c.tokens, [VOCABULARY.eos_id] * c.ended).astype(np.int32) for c, _ in completions
    ]
    scores = gen.score_tokens(inputs, targets)
    np.testing.assert_allclose(scores, [c.log_prob for c, _ in completions], rtol=1e-3)


def test_beams_come_best_first_and_score_as_the_model_does():
    gen = generator("encoder_decoder")
    [beams] = gen.complete(["hello"], Decoding(6, beams=4, alpha=0.0))
    assert len(beams) == 4
    assert [b.score for b in beams] == sorted((b.score for b in beams), reverse=True)
    ids = np.append(VOCABULARY.encode("hello"), VOCABULARY.eos_id)
    targets = [np.append(b.tokens, [VOCABULARY.eos_id] * b.ended).astype(np.int32) for b in beams]
    scores = gen.score_tokens([ids] * 4, targets)
    np.testing.assert_allclose(scores, [b.log_prob for b in beams], rtol=1e-3)


def test_score_of_texts_counts_the_end_only_if_asked():
    gen = generator("causal")
    whole, start = gen.score([""], ["abc"])[0], gen.score([""], ["abc"], end=False)[0]
    assert whole < start < 0
    chained = gen.score(["", "ab"], ["ab", "c"], end=False).sum()
    np.testing.assert_allclose(start, chained, rtol=1e-5)


def test_rows_without_a_token_are_never_generated():
    gen = generator("causal")
    [completions] = gen.complete(["x"], Decoding(40, Sampling(50.0), num_samples=8))
    tokens = np.concatenate([c.tokens for c in completions])
    assert tokens.max() < VOCABULARY.size <= gen.config.vocab_size
    assert VOCABULARY.pad_id not in tokens


def test_an_encoder_cannot_generate():
    with pytest.raises(UserError, match="encoder"):
        Generator(dataclasses.replace(TINY, architecture="encoder"), {}, VOCABULARY)


def test_learned_positions_end_somewhere():
    config = dataclasses.replace(TINY, position="learned", max_length=16)
    params = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
    gen = Generator(config, params, VOCABULARY)
    with pytest.raises(UserError, match="16 learned positions"):
        gen.complete(["12345678"], Decoding(9))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(beams=2, num_samples=2), "exclude each other"),
        (dict(beams=2, sampling=Sampling(0.5)), "exclude each other"),
    ],
)
def test_settings_that_contradict_each_other(bad, message):
    with pytest.raises(UserError, match=message):
        Decoding(**bad)


def test_no_prompts_no_completions():
    assert generator("causal").complete([]) == []
