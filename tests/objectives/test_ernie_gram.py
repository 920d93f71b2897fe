"""ERNIE-Gram: the paper's worked example, what queries see, and the four losses."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from kernels import masks
from objectives import ngram_masks
from objectives.ernie_gram import ErnieGram
from objectives.mlm import MaskedLM
from objectives.show_reader import Reader
from t5like.data import ngrams
from t5like.data.examples import Record
from t5like.data.layout import lay_out
from t5like.data.lexicon import Lexicon
from t5like.data.rng import generator
from t5like.errors import UserError
from t5like.models.config import ModelConfig
from t5like.models.visibility import self_mask
from t5like.training.step import total_loss

V, MASK, EOS, CLS, SEP = 1000, 2, 1, 990, 991
M1, M2, M3 = 908, 909, 910  # sentinels 9, 10 and 11 from the end of a hundred
CONTIGUOUS = {"masking": "contiguous", "comprehensive": False, "relation": False}


class Repetitive:
    """A corpus of few words, in which some stand together: 30 31, and 40 41 42."""

    def __init__(self):
        rng = np.random.default_rng(0)
        pieces = [[30, 31], [40, 41, 42], [50], [51], [52], [53], [54], [55]]
        self.all = np.concatenate([pieces[i] for i in rng.integers(0, 8, 1500)]).astype(np.uint16)
        self.offsets = np.array([0, len(self.all)])
        self.num_documents, self.num_tokens = 1, len(self.all)
        self.metadata, self.fingerprint = {}, "repetitive"

    def tokens(self, start, stop):
        return self.all[start:stop]


CORPUS = Repetitive()
SMALL = {"bigrams": 12, "trigrams": 6}


@pytest.fixture(scope="module")
def bind(setting):
    """(architecture="encoder", length=64, framed=False, **fields) -> ErnieGram over CORPUS."""

    @functools.cache
    def make(architecture="encoder", length=64, framed=False, **fields):
        where = setting(architecture, length, framed=framed)
        return ErnieGram(**(SMALL | fields)).bind(dataclasses.replace(where, corpus=CORPUS))

    return make


def record(length, seed=0, documents=None):
    start = int(generator(seed, "start").integers(0, CORPUS.num_tokens - length))
    ids = np.zeros(length, np.int32) if documents is None else documents
    return Record(CORPUS.all[start : start + length].astype(np.int32), ids)


def test_the_lexicon_holds_what_stands_together(bind):
    lexicon = bind().lexicon
    grams = [lexicon.tokens(V + i).tolist() for i in range(len(lexicon))]
    assert [30, 31] in grams and [40, 41] in grams and [40, 41, 42] in grams
    assert [50, 51] not in grams


# --- the worked example ----------------------------------------------------------------------

# x1..x6 with bounds 1, 2, 4, 5, 6, 7: the units are x1, x2 x3, x4, x5, x6; units 2 and 4 hidden.
X = np.arange(101, 107, dtype=np.int32)
LEXICON = Lexicon(V, ngrams.keys_of(X[1:3], 2, V), np.empty(0, np.int64))


def worked_example():
    units = LEXICON.cut(X)
    queries = np.array([M1, M2, M3], np.int32)
    return units, ngram_masks.explicit(X, None, units, np.array([1, 3]), MASK, queries)


def test_the_worked_example_of_the_paper():
    units, example = worked_example()
    assert units.starts.tolist() == [0, 1, 3, 4, 5]  # b = 1, 2, 4, 5, 6 (and the end, 7)
    x1, x2, x3, x4, x5, x6 = X.tolist()
    y2, y4 = V + 0, x5
    assert example.tokens.tolist() == [x1, MASK, x4, MASK, x6, M1, M2, M1]
    assert example.positions.tolist() == [0, 1, 2, 3, 4, 1, 1, 3]
    assert example.features["ngram_targets"].tolist() == [0, y2, 0, y4, 0, 0, 0, 0]
    assert example.targets[-3:].tolist() == [x2, x3, x5]
    assert example.weights.tolist() == [0, 1, 0, 1, 0, 1, 1, 1]
    assert example.features["isolated"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert example.features["unit_starts"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_queries_of_the_worked_example_see_the_text_and_themselves():
    _, example = worked_example()
    features = ("isolated", "ngram_targets")
    batch = lay_out(
        [[example]], architecture="encoder", length=10, bos_id=0, pad_id=0, features=features
    )
    seen = np.asarray(self_mask(batch, "encoder").dense(10, 10))[0, 0]
    expected = np.zeros((10, 10), bool)
    expected[:8, :5] = True
    expected[range(5, 8), range(5, 8)] = True
    np.testing.assert_array_equal(seen, expected)
    docs, main = batch["encoder_segment_ids"], 1 - batch["encoder_isolated"]
    formula = masks.Segments(docs, docs) & (
        masks.Segments(np.ones_like(main), main) | masks.SlidingWindow(0, 0)
    )
    np.testing.assert_array_equal(formula.dense(10, 10)[0, 0], expected)


def test_without_queries_the_text_is_only_shorter():
    units = LEXICON.cut(X)
    none = np.empty(0, np.int32)
    example = ngram_masks.explicit(X, None, units, np.array([1, 3]), MASK, none)
    assert example.tokens.tolist() == [101, MASK, 104, MASK, 106]
    assert example.positions.tolist() == list(range(5))


# --- the host half ---------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 54),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    st.integers(0, 10**6),
)
def test_what_is_asked_rebuilds_the_text(bind, raw, framed, comprehensive, rate, seed):
    objective = bind(framed=framed, comprehensive=comprehensive, rate=rate, length=120)
    drawn = record(raw, seed)
    rng = generator(seed, "x")
    example = objective.corrupt(drawn, rng)
    text = [CLS, *drawn.tokens.tolist(), SEP] if framed else drawn.tokens.tolist()
    main = example.features["isolated"] == 0
    hidden = main & (example.weights > 0)
    ids = example.features["ngram_targets"]
    rebuilt = [
        objective.lexicon.tokens(int(ids[i])) if hidden[i] else example.tokens[[i]]
        for i in np.flatnonzero(main)
    ]
    assert np.concatenate([*rebuilt, []]).tolist() == text
    assert (example.tokens[hidden] == MASK).all()

    # One mask a hidden unit, whatever its length; 15% of the units.
    units = objective.lexicon.cut(np.array(text, np.int32))
    count = len(units.starts) - 2 * framed
    assert hidden.sum() == min(count, max(1, round(count * rate)))
    spelt = [t for i in np.flatnonzero(hidden) for t in objective.lexicon.tokens(int(ids[i]))]
    assert example.targets[~main].tolist() == (spelt if comprehensive else [])
    assert example.features["unit_starts"].sum() == len(units.starts)
    assert len(example.tokens) <= objective.bounds(raw, generator(seed, "x")).inputs


@pytest.mark.parametrize("fields", [{}, {"comprehensive": False}, {"rate": 0.5}])
@pytest.mark.parametrize("framed", [False, True])
def test_the_longest_record_fits_and_one_more_token_might_not(bind, fields, framed):
    objective = bind(framed=framed, **fields)
    raw = objective.unit.raw_length
    most = [objective.bounds(n, generator(0, "x")).inputs for n in (raw, raw + 1)]
    assert most[0] <= 64 < most[1]
    longest = max(
        len(objective.corrupt(record(raw, s), generator(s, "x")).tokens) for s in range(20)
    )
    assert longest <= most[0]


def test_each_unit_is_hidden_alike(bind):
    objective, drawn = bind(), record(50)
    starts = objective.lexicon.cut(drawn.tokens).starts
    hidden = np.zeros(len(starts))
    for i in range(2000):
        example = objective.corrupt(drawn, generator(0, "x", i))
        slots = np.flatnonzero(example.features["unit_starts"])
        hidden += example.weights[slots]
    share = round(0.15 * len(starts)) / len(starts)
    assert np.abs(hidden / 2000 - share).max() < 5 * np.sqrt(share * (1 - share) / 2000)


def test_units_end_with_their_documents_and_queries_belong_to_theirs(bind):
    documents = np.repeat([0, 1], [1, 1]).astype(np.int32)
    drawn = Record(np.array([30, 31], np.int32), documents)
    example = bind(rate=1.0, length=64).corrupt(drawn, generator(0, "x"))
    assert example.features["ngram_targets"].tolist() == [30, 31, 0, 0]
    assert example.documents.tolist() == [0, 1, 0, 1]
    assert example.tokens.tolist() == [MASK, MASK, M1, M1]


def test_separators_are_never_hidden(bind):
    drawn = Record(np.array([30, EOS, 31, EOS], np.int32), np.array([0, 0, 1, 1], np.int32))
    example = bind(rate=1.0).corrupt(drawn, generator(0, "x"))
    assert example.tokens.tolist() == [MASK, EOS, MASK, EOS, M1, M1]


def test_contiguous_masks_hide_each_token_of_the_same_units(bind):
    drawn = record(50)
    explicit = bind(length=120).corrupt(drawn, generator(3, "x"))
    example = bind(length=120, **CONTIGUOUS).corrupt(drawn, generator(3, "x"))
    assert example.targets.tolist() == drawn.tokens.tolist() and example.positions is None
    hidden = example.weights > 0
    assert (example.tokens[hidden] == MASK).all()
    assert example.targets[hidden].tolist() == (
        explicit.targets[explicit.features["isolated"] == 1].tolist()
    )


def test_units_of_one_token_give_bert(setting, bind):
    """With no n-gram, contiguous masking is masked language modelling with [MASK] alone."""
    ours = bind(bigrams=0, trigrams=0, **CONTIGUOUS)
    bert = MaskedLM(mask_probability=1.0, random_probability=0.0).bind(setting("encoder", 64))
    for seed in range(20):
        one, other = (o.corrupt(record(60, seed), generator(seed, "x")) for o in (ours, bert))
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.targets, other.targets)
        np.testing.assert_array_equal(one.weights, other.weights)
    assert bert.unit == ours.unit


def test_held_out_data_is_hidden_at_its_own_rate(bind):
    assert bind().evaluation() is bind()
    assert bind(rate=0.4, eval_rate=None).evaluation().rate == 0.4
    measured = bind(rate=0.4).evaluation()
    assert measured.rate == 0.15 and measured.lengths == bind(rate=0.4).lengths
    one, other = (o.corrupt(record(40), generator(0, "x")) for o in (measured, bind()))
    np.testing.assert_array_equal(one.tokens, other.tokens)


def test_readable(bind):
    objective = bind(length=64)
    example = objective.corrupt(Record(np.array([50, 30, 31, 52]), np.zeros(4)), generator(5, "x"))
    batch = lay_out(
        [[example]], architecture="encoder", length=64, bos_id=0, pad_id=0,
        features=objective.features,
    )  # fmt: skip
    row = {name: array[0] for name, array in batch.items()}
    reader = Reader(objective.setting.vocabulary, objective.named_tokens)
    lines = {
        label: "".join(text for text, _ in runs) for label, runs in objective.readable(row, reader)
    }
    decode = objective.setting.vocabulary.decode
    assert lines["units"] == "│".join(decode(unit) for unit in ([50], [30, 31], [52]))
    assert lines["encoder sees"].count("[MASK]") == 1
    assert "[M1]" in lines["spells them"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda make: ErnieGram(masking="whole"), "ErnieGram.masking is 'whole'"),
        (lambda make: ErnieGram(masking="contiguous"), "comprehensive and ErnieGram.relation"),
        (lambda make: ErnieGram(bigrams=0, trigrams=0), "are both 0"),
        (lambda make: ErnieGram(rate=1.5), "ErnieGram.rate is 1.5"),
        (lambda make: ErnieGram(eval_rate=-1.0), "ErnieGram.eval_rate is -1.0"),
        (lambda make: ErnieGram().bind(make("encoder", mask=False)), "has no mask token"),
        (lambda make: ErnieGram().bind(make("encoder", num_sentinels=5)), "extra_ids to at least"),
        (lambda make: ErnieGram().bind(make("encoder", 1)), "train.length is 1"),
        (lambda make: ErnieGram().bind(make("encoder_decoder")), "encoder or decoder"),
    ],
)
def test_errors(setting, make, message):
    with pytest.raises(UserError, match=message):
        make(setting)


# --- the device half -------------------------------------------------------------------------

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config(architecture="encoder", **fields):
    small = {"num_layers": 1, "d_model": 16, "d_ff": 16, "num_heads": 2, "head_dim": 8}
    small |= {"vocab_size": 1024, "relative_bidirectional": True}
    return ModelConfig(architecture=architecture, **(small | fields))


def made(objective, rows=3, scale=0.3, **fields):
    """(network, parameters, batch) of a bound objective."""
    raw = objective.unit.raw_length
    examples = [[objective.corrupt(record(raw, r), generator(r, "x"))] for r in range(rows)]
    batch = lay_out(
        examples, architecture=objective.setting.architecture, length=objective.setting.length,
        bos_id=0, pad_id=0, features=objective.features, sees_ahead=objective.sees_ahead,
    )  # fmt: skip
    network = objective.network(config(objective.setting.architecture, **fields))
    shapes = nn.unbox(jax.eval_shape(network.init, {"params": jax.random.key(0)}, batch))["params"]
    rng = np.random.default_rng(0)  # drawn here: an initialiser takes seconds to compile
    params = jax.tree.map(lambda x: np.float32(rng.normal(scale=scale, size=x.shape)), shapes)
    return network, params, batch


@pytest.fixture(scope="module")
def whole(bind):
    """The whole objective: (bound, network, parameters, batch, its losses compiled)."""
    objective = bind(length=32, coarse_weight=2.0, relation_weight=3.0)
    network, params, batch = made(objective)
    losses = quick_jit(
        lambda p, b: objective.losses(network.apply, p, None, b, jax.random.key(0), False)
    )
    return objective, network, params, batch, losses


def test_known_losses_of_a_model_that_knows_nothing(whole):
    objective, _, params, batch, losses = whole
    terms = losses(jax.tree.map(np.zeros_like, params), batch)
    means = {name: float(term.sum / term.weight) for name, term in terms.items()}
    units = V + SMALL["bigrams"] + SMALL["trigrams"]
    assert means["coarse_cross_entropy"] == pytest.approx(math.log(units), abs=1e-4)
    assert means["generator_cross_entropy"] == pytest.approx(math.log(units), abs=1e-4)
    assert means["fine_cross_entropy"] == pytest.approx(math.log(1024), abs=1e-4)
    assert means["replaced_token_detection"] == pytest.approx(math.log(2), abs=1e-5)
    isolated, weights = batch["encoder_isolated"], batch["encoder_loss_weights"]
    assert terms["coarse_cross_entropy"].weight == (weights * (1 - isolated)).sum()
    assert terms["fine_cross_entropy"].weight == isolated.sum() > 0
    assert terms["replaced_token_detection"].weight == batch["encoder_unit_starts"].sum()
    total = 3 * math.log(units) + math.log(1024) + 3 * math.log(2)
    assert float(total_loss(terms)) == pytest.approx(total, abs=1e-3)


def test_only_its_own_loss_moves_the_generator(whole):
    """And its samples pass no gradient on."""
    objective, network, params, batch, _ = whole
    key = jax.random.key(0)

    @quick_jit
    def gradients(params):
        def of(*names):
            terms = lambda p: objective.losses(network.apply, p, None, batch, key, False)  # noqa: E731
            return jax.grad(lambda p: sum(terms(p)[name].sum for name in names))(params)

        model = of("coarse_cross_entropy", "fine_cross_entropy", "replaced_token_detection")
        return model, of("generator_cross_entropy")

    largest = functools.partial(jax.tree.map, lambda g: float(np.abs(g).max()))
    model, generator = map(largest, gradients(params))
    own = ("generator", "generator_ngram_head")
    assert set(jax.tree.leaves([model[name] for name in own])) == {0.0}
    assert max(jax.tree.leaves(generator["relation_head"])) == 0
    assert max(jax.tree.leaves(generator["model"]["encoder"]["layers_0"])) == 0
    for moved in ([generator[name] for name in own], model["relation_head"], model["model"]):
        assert max(jax.tree.leaves(moved)) > 0


def test_a_sample_that_is_right_counts_as_original(whole):
    """A generator that says one token whatever it sees is right where that token was hidden."""
    _, network, params, batch, losses = whole
    hidden = batch["encoder_loss_weights"] * (1 - batch["encoder_isolated"])
    wanted = batch["encoder_ngram_targets"]
    said = wanted[(hidden > 0) & (wanted < V)][0]
    sure = jax.tree.map(np.copy, params)
    sure["generator"]["head"]["bias"][said] = 1e4
    terms = losses(sure, batch)
    wrong = hidden * (wanted != said)
    assert 0 < wrong.sum() < hidden.sum()
    assert float(terms["replaced_fraction"].sum) == wrong.sum()
    # What the model read, and was judged on: the masks replaced by that token.
    read = {**batch, "encoder_input_tokens": np.where(hidden, said, batch["encoder_input_tokens"])}
    states = quick_jit(functools.partial(network.apply, method="hidden"))({"params": sure}, read)
    output = network.apply({"params": sure}, states, method="replaced_logits")
    each = np.logaddexp(0, np.where(wrong, -output, output)) * batch["encoder_unit_starts"]
    assert float(terms["replaced_token_detection"].sum) == pytest.approx(each.sum(), rel=1e-4)


def test_n_grams_are_read_by_embeddings_of_their_own(whole):
    _, network, params, batch, _ = whole
    tokens = batch["encoder_input_tokens"]
    units, as_token = tokens.copy(), tokens.copy()
    units[0, 3], as_token[0, 3] = V + 5, 77
    copied = jax.tree.map(np.copy, params)
    copied["model"]["token_embedder"]["embedding"][77] = params["ngram_embedder"]["embedding"][5]

    @quick_jit
    def hidden(params, units):
        return network.apply({"params": params}, batch, units=units, method="hidden")

    states = np.asarray(hidden(params, units))
    np.testing.assert_allclose(states, hidden(copied, as_token), atol=1e-6)
    assert np.abs(states - hidden(params, as_token))[0].max() > 1e-3


def test_losses_are_those_of_all_logits(bind):
    """Coarse and fine cross-entropy against logits of every slot, without a generator."""
    objective = bind(length=32, relation=False)
    network, params, batch = made(objective)

    @quick_jit
    def both(params, batch):
        terms = objective.losses(network.apply, params, None, batch, jax.random.key(0), False)
        return terms, network.apply({"params": params}, batch)

    terms, output = jax.tree.map(np.asarray, both(params, batch))
    isolated, weights = batch["encoder_isolated"], batch["encoder_loss_weights"]

    def expected(logits, targets, weights):
        logits = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return -(chosen * weights).sum()

    coarse = expected(output["units"], batch["encoder_ngram_targets"], weights * (1 - isolated))
    fine = expected(output["tokens"], batch["encoder_target_tokens"], weights * isolated)
    assert float(terms["coarse_cross_entropy"].sum) == pytest.approx(coarse, rel=1e-4)
    assert float(terms["fine_cross_entropy"].sum) == pytest.approx(fine, rel=1e-4)
    assert set(terms) == {
        f"{x}_{y}" for x in ("coarse", "fine") for y in ("cross_entropy", "accuracy")
    }


def test_units_of_one_token_have_the_loss_of_bert(setting, bind):
    objective = bind(length=32, bigrams=0, trigrams=0, **CONTIGUOUS)
    bert = MaskedLM(mask_probability=1.0, random_probability=0.0).bind(setting("encoder", 32))
    network, params, batch = made(objective)
    apply = bert.network(config()).apply
    theirs = jax.eval_shape(bert.network(config()).init, {"params": jax.random.key(0)}, batch)
    assert jax.tree.structure(params) == jax.tree.structure(nn.unbox(theirs)["params"])

    @quick_jit
    def both(params, batch):
        key = jax.random.key(0)
        ours = objective.losses(network.apply, params, None, batch, key, False)
        return ours, bert.losses(apply, params, None, batch, key, False)

    ours, theirs = both(params, batch)
    assert ours.keys() == theirs.keys() and ours["cross_entropy"].sum > 1
    for name, term in ours.items():
        np.testing.assert_allclose(term.sum, theirs[name].sum, rtol=1e-6)
        assert term.weight == theirs[name].weight == batch["encoder_loss_weights"].sum()


@pytest.mark.parametrize("position", ["relative", "learned"])
@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
def test_queries_are_blind_to_each_other(bind, architecture, position):
    """A changed query moves its own states alone; the order of queries means nothing."""
    objective = bind(architecture, length=32, relation=False)
    network, params, batch = made(objective, position=position)
    tokens, positions = f"{architecture}_input_tokens", f"{architecture}_positions"
    apply = quick_jit(functools.partial(network.apply, method="hidden"))
    hidden = functools.partial(apply, {"params": params})
    states = np.asarray(hidden(batch))
    queries = np.flatnonzero(batch[f"{architecture}_isolated"][0])
    first, last = queries[0], queries[-1]

    def moved(slot):
        changed = {**batch, tokens: batch[tokens].copy()}
        changed[tokens][0, slot] = 60
        return np.flatnonzero(np.abs(np.asarray(hidden(changed)) - states).max(-1)[0] > 1e-6)

    assert moved(last).tolist() == [last]
    assert set(queries) <= set(moved(first - 1))  # all of them see the text

    swapped = {name: array.copy() for name, array in batch.items()}
    for name in (tokens, positions):
        swapped[name][0, [first, last]] = batch[name][0, [last, first]]
    assert batch[positions][0, first] != batch[positions][0, last]
    after = np.asarray(hidden(swapped))
    np.testing.assert_allclose(after[0, [last, first]], states[0, [first, last]], atol=1e-5)


def test_packed_texts_do_not_see_each_other(bind):
    """Two texts in a row, queries between them, have the states that each has alone."""
    objective = bind("decoder", length=64, relation=False)
    network, params, _ = made(objective, rows=1)
    two = [objective.corrupt(record(20, seed), generator(seed, "x")) for seed in (5, 6)]
    lay = functools.partial(
        lay_out, architecture="decoder", length=64, bos_id=0, pad_id=0,
        features=objective.features, sees_ahead=objective.sees_ahead,
    )
    apart, packed = lay([[two[0]], [two[1]]]), lay([two, []])
    params = jax.tree.map(jax.numpy.asarray, params)
    hidden = quick_jit(functools.partial(network.apply, {"params": params}, method="hidden"))
    alone, together = np.asarray(hidden(apart)), np.asarray(hidden(packed))
    split, end = len(two[0].tokens), len(two[0].tokens) + len(two[1].tokens)
    np.testing.assert_allclose(together[0, :split], alone[0, :split], atol=1e-5)
    np.testing.assert_allclose(together[0, split:end], alone[1, : end - split], atol=1e-5)


def test_flops_count_the_generator_and_the_n_grams(bind):
    spec = {"encoder_input_tokens": ((3, 32), np.dtype(np.int32))}
    shape = config()
    flops = lambda **fields: bind(length=32, **fields).train_flops(shape, spec)  # noqa: E731
    masks = bind(length=32).usual_predictions
    more = flops(bigrams=112, relation=False) - flops(relation=False)
    assert more == 3 * 3 * masks * 2 * 16 * 100
    # The generator's head is tied to the same n-grams, through a projection from its width.
    assert flops(bigrams=112) - flops() == 2 * more
    assert flops() > flops(relation=False) > flops(relation=False, comprehensive=False)
