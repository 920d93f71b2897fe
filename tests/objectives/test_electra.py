"""Replaced token detection: its draws, its samples, its labels, its losses and their gradients."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from objectives.electra import Electra
from objectives.heads_rtd import TASKS
from objectives.losses_rtd import draft, replaced_token_losses
from t5like.data.layout import lay_out
from t5like.data.rng import generator
from t5like.errors import UserError
from t5like.models.config import ModelConfig
from t5like.training.step import total_loss

CLS, SEP, MASK = 990, 991, 2
BERT = ModelConfig(
    architecture="encoder",
    vocab_size=1000,
    num_layers=1,
    d_model=32,
    d_ff=64,
    num_heads=4,
    head_dim=8,
    embedding_size=16,
    token_types=2,
    embedding_norm=True,
    position="learned",
    max_length=64,
    norm="layernorm",
    norm_position="post",
    gated_mlp=False,
    use_bias=True,
    tie_embeddings=True,
    scale_tied_logits=False,
    head_transform=True,
    logits_bias=True,
    initializer="normal",
)
T5 = ModelConfig(
    architecture="decoder",
    vocab_size=1000,
    num_layers=2,
    d_model=16,
    d_ff=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    relative_bidirectional=True,
    scan_layers=True,
    dropout_rate=0.1,
)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def batch_of(setting, record):
    """(bound objective, architecture, rows=4) -> a batch of rows with 6 slots of padding."""

    def make(bound, architecture="encoder", rows=4):
        length = bound.lengths.inputs
        examples = [[bound.corrupt(record(length - 8, r), generator(r, "x"))] for r in range(rows)]
        return lay_out(
            examples, architecture=architecture, length=length, bos_id=0, pad_id=0,
            sees_ahead=bound.sees_ahead,
        )  # fmt: skip

    return make


def shapes_of(objective, config, length=32):
    tokens = jnp.zeros((1, length), jnp.int32)
    init = objective.network(config).init
    batch = {f"{config.architecture}_input_tokens": tokens}
    return nn.unbox(jax.eval_shape(init, {"params": jax.random.key(0)}, batch))["params"]


def parameters_of(objective, config, length=32):
    """As the config's initialisers draw, but in NumPy: they take seconds to compile."""
    rng = np.random.default_rng(0)
    stddev = config.initializer_stddev if config.initializer == "normal" else 0.3

    def draw(path, leaf):
        if path[-1].key in ("scale", "bias"):
            return np.full(leaf.shape, path[-1].key == "scale", np.float32)
        return rng.normal(scale=stddev, size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(objective, config, length))


# --- host half -------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "count"), [(128, 19), (512, 77)])
def test_positions_are_drawn_without_replacement(setting, record, length, count):
    """At 128 tokens all 19 of 19 draws differ; with replacement 17.7 do."""
    objective = Electra().bind(setting("encoder", length, framed=True))
    for seed in range(50):
        example = objective.corrupt(record(length - 2, seed), generator(seed, "x"))
        assert example.weights.sum() == count and example.weights.max() == 1
        assert example.weights[0] == example.weights[-1] == 0
        assert example.targets[0] == CLS and example.targets[-1] == SEP


def test_85_percent_are_masked_and_the_rest_left(setting, record):
    objective = Electra().bind(setting("encoder", 512))
    text = record(512)
    shown = []
    for seed in range(200):
        example = objective.corrupt(text, generator(seed, "x"))
        drawn = example.weights > 0
        assert set(example.tokens[drawn & (example.tokens != example.targets)]) == {MASK}
        np.testing.assert_array_equal(example.tokens[~drawn], example.targets[~drawn])
        shown.append(example.tokens[drawn] == MASK)
    masked = np.concatenate(shown)
    assert abs(masked.mean() - 0.85) < 4 * np.sqrt(0.85 * 0.15 / masked.size)


def test_held_out_data_is_drawn_at_its_own_rate(setting):
    assert Electra(rate=0.25).bind(setting("encoder", 64)).evaluation().rate == 0.15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda make: Electra(rate=1.5), "Electra.rate is 1.5"),
        (lambda make: Electra(task="electra"), "Electra.task is 'electra'"),
        (lambda make: Electra(temperature=-1.0), "Electra.temperature is -1"),
        (lambda make: Electra(generator_width=0.0), "Electra.generator_width is 0"),
        (lambda make: Electra(generator_layers=0), "Electra.generator_layers is 0"),
        (lambda make: Electra().bind(make("encoder", mask=False)), "no mask token, which Electra"),
        (lambda make: Electra().bind(make("encoder_decoder")), "encoder or decoder"),
    ],
)
def test_errors(setting, make, message):
    with pytest.raises(UserError, match=message):
        make(setting)


# --- networks --------------------------------------------------------------------------------


def names_of(objective, config=BERT):
    return traverse_util.flatten_dict(shapes_of(objective, config), sep="/")


def test_a_tied_generator_has_no_embeddings_and_a_quarter_of_the_width():
    names = names_of(Electra())
    own = {name.removeprefix("generator/"): leaf.shape for name, leaf in names.items()}
    assert not [name for name in names if name.startswith("generator/") and "embed" in name]
    assert own["encoder/projection/kernel"] == (16, 8)
    assert own["encoder/layers_0/self_attention/query/kernel"] == (8, 8)
    assert own["encoder/layers_0/mlp/wi/kernel"] == (8, 16)
    assert own["head/transform/kernel"] == (8, 16)
    assert own["head/bias"] == (1000,)
    assert names["model/encoder/layers_0/mlp/wi/kernel"].shape == (32, 64)
    assert names["model/encoder/embedding_norm/scale"].shape == (16,)


def test_an_untied_generator_is_a_whole_model_of_its_own():
    names = names_of(Electra(tied=False, generator_layers=3, generator_width=0.5))
    assert names["generator/token_embedder/embedding"].shape == (1000, 16)
    assert "generator/encoder/embedding_norm/scale" in names
    assert "generator/encoder/layers_2/mlp/wi/kernel" in names
    assert "model/encoder/layers_1/mlp/wi/kernel" not in names


@pytest.mark.parametrize("task", TASKS)
def test_heads_are_those_that_the_task_needs(task):
    """And a small main network keeps one head in its generator."""
    objective = Electra(task=task, generator_width=0.1)
    names = names_of(objective, dataclasses.replace(BERT, num_kv_heads=2))
    detects, predicts = TASKS[task]
    assert any(name.startswith("discriminator_head/") for name in names) == detects
    assert any(name.startswith("model/head/") for name in names) == predicts
    assert names["generator/encoder/layers_0/self_attention/query/kernel"].shape == (3, 8)


# --- samples and labels ----------------------------------------------------------------------


def drafted(targets, weights, scores, **options):
    """`draft` where the hidden states [B, L, V] are the logits."""
    function = quick_jit(
        lambda s: draft(lambda x: x, s, targets, weights, jax.random.key(3), **options)
    )
    return function(jnp.asarray(scores))


@pytest.fixture(scope="module")
def texts():
    """(targets [4, 32], weights [4, 32] with 5 drawn a row, logits [4, 32, 50])."""
    rng = np.random.default_rng(0)
    weights = np.zeros((4, 32), np.float32)
    for row in weights:
        row[rng.permutation(32)[:5]] = 1.0
    targets = rng.integers(0, 50, (4, 32)).astype(np.int32)
    return targets, weights, rng.normal(size=(4, 32, 50)).astype(np.float32)


def test_only_drawn_positions_change(texts):
    targets, weights, scores = texts
    result = drafted(targets, weights, scores)
    replaced = np.asarray(result.tokens) != targets
    assert 0 < replaced.sum() <= weights.sum() and not replaced[weights == 0].any()
    greedy = drafted(targets, weights, scores, temperature=0.0).tokens
    np.testing.assert_array_equal(greedy, np.where(weights > 0, scores.argmax(-1), targets))
    nll = (
        np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    )
    np.testing.assert_allclose(result.loss_sum, (nll * weights).sum(), rtol=1e-5)


@pytest.mark.parametrize("predictions", [5, 8, 3])
def test_samples_do_not_depend_on_what_is_computed_with_them(texts, predictions):
    """Also where rows draw more than are gathered (3)."""
    targets, weights, scores = texts
    whole = drafted(targets, weights, scores)
    gathered = drafted(targets, weights, scores, predictions=predictions)
    np.testing.assert_array_equal(gathered.tokens, whole.tokens)
    np.testing.assert_allclose(gathered.loss_sum, whole.loss_sum, rtol=1e-5)


def test_disallowing_the_correct_token_replaces_every_drawn_one(texts):
    targets, weights, _ = texts
    likely = 3.0 * np.eye(50, dtype=np.float32)[targets]
    replaced = np.asarray(drafted(targets, weights, likely).tokens) != targets
    assert 0 < replaced.sum() < weights.sum()
    result = drafted(targets, weights, likely, disallow_correct=True)
    np.testing.assert_array_equal(np.asarray(result.tokens) != targets, weights > 0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_follow_the_distribution_at_its_temperature(temperature):
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    ones = np.ones((40, 500))
    scores = np.broadcast_to(logits, (40, 500, 4))
    tokens = drafted(np.zeros((40, 500), np.int32), ones, scores, temperature=temperature).tokens
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    frequencies = np.bincount(np.asarray(tokens).ravel(), minlength=4) / ones.size
    np.testing.assert_allclose(frequencies, expected, atol=4 * 0.5 / np.sqrt(ones.size))


# --- losses by hand --------------------------------------------------------------------------


def terms_of(texts, replaced_logits, scores=None, token_logits=None, segment_ids=None, **options):
    """Terms where a network says what is given; scores are the generator's logits [4, 32, V]."""
    targets, weights, random = texts
    scores = random if scores is None else scores
    says = {
        "generator_hidden": lambda batch: jnp.asarray(scores),
        "generator_logits": lambda states: states,
        "hidden": lambda batch: batch["encoder_input_tokens"],
        "replaced_logits": lambda hidden: jnp.asarray(replaced_logits),
        "logits": lambda hidden: jnp.asarray(token_logits),
    }

    def apply(variables, inputs, *, method, rngs=None, train=False):
        return says[method](inputs)

    batch = {
        "encoder_input_tokens": jnp.full(targets.shape, MASK),
        "encoder_target_tokens": jnp.asarray(targets),
        "encoder_loss_weights": jnp.asarray(weights),
    }
    if segment_ids is not None:
        batch["encoder_segment_ids"] = jnp.asarray(segment_ids)
    settings = dict(
        stack="encoder", task="replaced_token_detection", generator_weight=1.0,
        discriminator_weight=50.0, temperature=0.0, disallow_correct=False, predictions=None,
    )  # fmt: skip
    key = jax.random.key(0)
    return replaced_token_losses(apply, {}, batch, key, False, **{**settings, **options})


def mean(term):
    return float(term.sum / term.weight)


def test_a_generator_that_knows_the_text_leaves_no_replaced_token(texts):
    targets, weights, _ = texts
    truth = 100.0 * np.eye(50, dtype=np.float32)[targets]
    says_original = np.full(targets.shape, -100.0, np.float32)
    terms = terms_of(texts, says_original, truth, temperature=1.0)
    assert mean(terms["generator_accuracy"]) == 1 and mean(terms["replaced_fraction"]) == 0
    assert float(total_loss(terms)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("task", ["replaced_token_detection", "masked_positions_only"])
def test_binary_loss_by_hand(texts, task):
    """Over all tokens but padding, or over the drawn ones; a correct sample is an original."""
    targets, weights, scores = texts
    segment_ids = np.repeat([[1] * 28 + [0] * 4], 4, axis=0)
    weights = weights * segment_ids
    scores = scores + 3.0 * np.eye(50, dtype=np.float32)[targets]
    logits = np.random.default_rng(1).normal(size=targets.shape).astype(np.float32)
    terms = terms_of((targets, weights, scores), logits, segment_ids=segment_ids, task=task)

    label = (weights > 0) & (scores.argmax(-1) != targets)
    assert 0 < label.sum() < weights.sum()
    counted = weights > 0 if task == "masked_positions_only" else segment_ids > 0
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    bce = -np.where(label, np.log(p), np.log(1 - p))
    term = terms["replaced_token_detection"]
    np.testing.assert_allclose(term.sum, bce[counted].sum(), rtol=1e-5)
    assert (term.weight, term.coefficient) == (counted.sum(), 50.0)
    flagged = (logits > 0) & (segment_ids > 0)
    hits = (flagged & label).sum()
    assert mean(terms["detection_precision"]) == pytest.approx(hits / flagged.sum())
    assert mean(terms["detection_recall"]) == pytest.approx(hits / label.sum())
    assert mean(terms["replaced_fraction"]) == pytest.approx(label.sum() / segment_ids.sum())


def test_knowing_only_how_many_are_replaced_costs_the_entropy_of_that():
    """0.227 nats at 6%."""
    weights = np.zeros((4, 50), np.float32)
    weights[:, :3] = 1.0
    zeros = np.zeros((4, 50), np.int32)
    prior = np.full((4, 50), np.log(0.06 / 0.94), np.float32)
    terms = terms_of((zeros, weights, np.zeros((4, 50, 9))), prior, disallow_correct=True)
    assert mean(terms["replaced_token_detection"]) == pytest.approx(0.227, abs=5e-4)


def test_copying_by_hand(texts):
    """The mixture written out: c on the input token, the rest of the softmax."""
    targets, weights, scores = texts
    rng = np.random.default_rng(2)
    token_logits = rng.normal(size=scores.shape).astype(np.float32)
    replaced_logits = rng.normal(size=targets.shape).astype(np.float32)
    terms = terms_of(
        texts, replaced_logits, token_logits=token_logits, task="all_tokens_mlm",
        discriminator_weight=1.0,
    )  # fmt: skip
    inputs = np.where(weights > 0, scores.argmax(-1), targets)
    copy = 1 / (1 + np.exp(replaced_logits.astype(np.float64)))[..., None]
    softmax = np.exp(token_logits) / np.exp(token_logits).sum(-1, keepdims=True)
    mixture = copy * np.eye(50)[inputs] + (1 - copy) * softmax
    np.testing.assert_allclose(mixture.sum(-1), 1.0, rtol=1e-6)
    nll = -np.log(np.take_along_axis(mixture, targets[..., None], -1))
    np.testing.assert_allclose(terms["cross_entropy"].sum, nll.sum(), rtol=1e-5)
    assert terms["cross_entropy"].weight == targets.size


def test_replace_mlm_predicts_at_the_drawn_positions_alone(texts):
    targets, weights, _ = texts
    token_logits = np.zeros((4, 32, 50), np.float32)
    terms = terms_of(texts, None, token_logits=token_logits, task="replace_mlm", predictions=None)
    assert "replaced_token_detection" not in terms
    assert mean(terms["cross_entropy"]) == pytest.approx(np.log(50), rel=1e-6)
    assert terms["cross_entropy"].weight == weights.sum()


# --- whole networks --------------------------------------------------------------------------


def test_total_at_initialisation(setting, batch_of):
    """ln V + 50 ln 2 = 44.98 with BERT's vocabulary and initial values; 15% are replaced."""
    config = dataclasses.replace(BERT, vocab_size=30522)
    objective = Electra().bind(setting("encoder", 64, size=30522, framed=True))
    batch, params = batch_of(objective), parameters_of(objective, config, 64)
    apply, key = objective.network(config).apply, jax.random.key(0)
    loss = quick_jit(lambda params: objective.losses(apply, params, None, batch, key, False))
    terms = loss(params)
    assert mean(terms["generator_cross_entropy"]) == pytest.approx(np.log(30522), abs=0.02)
    assert mean(terms["replaced_token_detection"]) == pytest.approx(np.log(2), abs=1e-3)
    assert float(total_loss(terms)) == pytest.approx(44.98, abs=0.05)
    drawn, real = (batch["encoder_loss_weights"]).sum(), (batch["encoder_segment_ids"] > 0).sum()
    replaced = float(terms["replaced_fraction"].sum)
    assert drawn - 1 <= replaced <= drawn and abs(drawn / real - 0.15) < 0.01


@pytest.mark.parametrize("tied", [True, False])
def test_the_detection_loss_moves_a_generator_through_shared_embeddings_alone(
    setting, batch_of, tied
):
    # At this rate all positions are computed, which halves what is compiled.
    objective = Electra(tied=tied, rate=0.9).bind(setting("encoder", 32))
    batch, params = batch_of(objective), parameters_of(objective, BERT)
    apply, key = objective.network(BERT).apply, jax.random.key(0)

    @quick_jit
    def gradients(params):
        def of(name):
            terms = lambda p: objective.losses(apply, p, None, batch, key, False)  # noqa: E731
            return jax.grad(lambda p: terms(p)[name].sum)(params)

        return of("replaced_token_detection"), of("generator_cross_entropy")

    largest = functools.partial(jax.tree.map, lambda g: float(jnp.abs(g).max()))
    detection, generation = map(largest, gradients(params))
    assert set(jax.tree.leaves(detection["generator"])) == {0.0}
    assert min(jax.tree.leaves(detection["discriminator_head"])) > 0
    assert detection["model"]["token_embedder"]["embedding"] > 0
    assert max(jax.tree.leaves(generation["discriminator_head"])) == 0
    shared = {
        "token_embedder": generation["model"]["token_embedder"],
        "position_embedder": generation["model"]["encoder"]["position_embedder"],
        "embedding_norm": generation["model"]["encoder"]["embedding_norm"],
    }
    assert all((leaf > 0) == tied for leaf in jax.tree.leaves(shared))
    rest = generation["model"]["encoder"]
    assert max(jax.tree.leaves([rest["layers_0"], rest["projection"]])) == 0


def test_a_scanned_decoder_with_relative_positions_and_dropout(setting, batch_of):
    objective = Electra(task="all_tokens_mlm").bind(setting("decoder", 32))
    batch, params = batch_of(objective, "decoder"), parameters_of(objective, T5)
    apply = objective.network(T5).apply

    @quick_jit
    def loss(params, key):
        terms = lambda p: total_loss(objective.losses(apply, p, None, batch, key, True))  # noqa: E731
        return jax.value_and_grad(terms)(params)

    values, grads = zip(*(loss(params, jax.random.key(i)) for i in (0, 0, 1)), strict=True)
    assert np.isfinite(values).all() and values[0] == values[1] != values[2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads[0]))


def test_parts_of_a_batch_add_up(setting, batch_of):
    """So gradients accumulate exactly, with greedy samples: drawn ones differ between a batch and
    its parts, which have keys of their own. The larger batch also has rows that draw more than
    are gathered."""
    objective = Electra(temperature=0.0).bind(setting("encoder", 32))
    batch, params = batch_of(objective), parameters_of(objective, BERT)
    batch["encoder_loss_weights"][0, :20] = 1.0
    apply = objective.network(BERT).apply
    key = jax.random.key(0)
    loss = quick_jit(lambda params, batch: objective.losses(apply, params, None, batch, key, True))
    whole, *parts = (
        loss(params, {k: v[rows] for k, v in batch.items()})
        for rows in (slice(None), slice(0, None, 2), slice(1, None, 2))
    )
    assert loss._cache_size() == 2  # one for each shape
    for name, term in whole.items():
        summed = sum(part[name].sum for part in parts), sum(part[name].weight for part in parts)
        np.testing.assert_allclose((term.sum, term.weight), summed, rtol=1e-5, err_msg=name)


# --- FLOPs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["replaced_token_detection", "replace_mlm", "all_tokens_mlm"])
def test_flops_match_xla(setting, batch_of, task):
    """Within 4% of a compiled forward pass; all positions asked, since XLA counts both of a
    conditional's branches, and greedily, since it counts random bits."""
    config = dataclasses.replace(
        BERT, vocab_size=512, d_model=256, d_ff=1024, head_dim=64, embedding_size=128
    )
    objective = Electra(task=task, rate=0.95, temperature=0.0).bind(
        setting("encoder", 48, size=512)
    )
    assert objective.usual_predictions == 48
    batch = batch_of(objective, rows=2)
    spec = {name: (array.shape, array.dtype) for name, array in batch.items()}
    apply, key = objective.network(config).apply, jax.random.key(0)
    loss = quick_jit(lambda p: total_loss(objective.losses(apply, p, None, batch, key, False)))
    compiled = loss.lower(shapes_of(objective, config, 48)).compile()
    expected = objective.train_flops(config, spec) / 3
    assert 1.0 < compiled.cost_analysis()["flops"] / expected < 1.04


def test_flops_count_logits_only_where_they_are_computed(setting):
    few, all_of_them = (Electra(rate=r).bind(setting("encoder", 64)) for r in (0.15, 1.0))
    spec = {"encoder_input_tokens": ((2, 64), np.int32)}
    spared = 64 - few.usual_predictions
    head = 2.0 * (8 * 16 + 16 * 1000)
    difference = all_of_them.train_flops(BERT, spec) - few.train_flops(BERT, spec)
    assert difference == 3 * 2 * spared * head
