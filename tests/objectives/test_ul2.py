"""UL2: its known lengths, its three traps, what goes in comes out, and losses by denoiser."""

from __future__ import annotations

import dataclasses
import re
import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from objectives import heads, noise
from objectives.causal_lm import CausalLM
from objectives.denoisers import Denoiser
from objectives.prefix_lm import PrefixLM
from objectives.seqio_adapter import objective_preprocessor
from objectives.ul2 import UL2
from t5like.data.examples import Document, Window
from t5like.data.pipeline import Component, Pipeline
from t5like.data.rng import generator
from t5like.errors import UserError
from t5like.models.config import ModelConfig

EOS, R, S, X = 1, 900, 901, 902  # modes: the toy vocabulary's last three of 100 sentinels
MODE = {"R": R, "S": S, "X": X}
ARCHITECTURES = ("encoder_decoder", "decoder")
T5GEMMA = (("R", 3, 0.15), ("X", 12, 0.5), ("X", 32, 0.15), ("X", 32, 0.5), ("S", None, 0.75))


def parts(objective):
    return [part for part, _ in objective.components().values()]


def full_record(record, part, seed=0):
    unit = part.unit
    return record(unit.raw_length if isinstance(unit, Window) else unit.max_raw_length, seed)


# --- known lengths ---------------------------------------------------------------------------

# (mean span, density): raw tokens, targets, spans; derived from T5's code.
KNOWN = {
    128: {
        (3, 0.15): (141, 29, 7), (8, 0.15): (146, 26, 3), (3, 0.5): (190, 128, 32),
        (8, 0.5): (226, 128, 14), (64, 0.5): (250, 128, 2),
        # T5 plans 149 and 23: it counts no span where its mask has one.
        (64, 0.15): (148, 24, 1),
    },
    512: {
        (3, 0.15): (568, 114, 28), (8, 0.15): (588, 100, 11), (3, 0.5): (766, 512, 128),
        (8, 0.5): (908, 512, 57), (64, 0.15): (600, 92, 1), (64, 0.5): (1006, 512, 8),
        (32, 0.15): (598, 94, 3), (12, 0.5): (944, 512, 39), (32, 0.5): (990, 512, 15),
    },
    1024: {
        (3, 0.5): (1534, 1024, 256), (8, 0.5): (1818, 1024, 114), (64, 0.15): (1200, 184, 3),
        (64, 0.5): (2014, 1024, 16),
    },
}  # fmt: skip


@pytest.mark.parametrize("length", KNOWN)
def test_known_lengths_fill_their_rows(setting, record, length):
    table = KNOWN[length]
    objective = UL2(
        denoisers=[("X", *key) for key in table], rates=None, mode_tokens=None, random_roll=False
    ).bind(setting(length=length, num_sentinels=256, size=2000))
    assert objective.lengths.targets == max(targets for _, targets, _ in table.values())
    for part, (raw, targets, spans) in zip(parts(objective), table.values(), strict=True):
        assert part.unit == Window(raw)
        example = part.corrupt(record(raw), generator(0, "x"))
        # To make both sides fit T5 gives up a token here, and with it a span.
        spare = part.denoiser.name == "X(32, 0.5)"
        assert (len(example.inputs), len(example.targets)) == (length - spare, targets - spare)
        assert (example.inputs >= 2000 - 256).sum() == spans


def test_the_seven_of_the_paper(setting):
    objective = UL2().bind(setting(length=512, num_sentinels=300))
    names = [*objective.components()]
    assert names == [
        "R(3, 0.15)", "R(8, 0.15)", "X(3, 0.5)", "X(8, 0.5)", "X(64, 0.15)", "X(64, 0.5)",
        "S(0.25)",
    ]  # fmt: skip
    shares = dict.fromkeys("RXS", 0.0)
    for name, (part, rate) in objective.components().items():
        shares[name[0]] += rate
        assert part.lengths == objective.lengths and part.device_key == objective.device_key
    assert shares == pytest.approx({"R": 0.4, "X": 0.4, "S": 0.2})
    assert (objective.lengths.inputs, objective.lengths.targets) == (512, 511)
    equal = UL2(rates=None).bind(setting(length=64)).components().values()
    assert {rate for _, rate in equal} == {1.0}


# --- the three traps -------------------------------------------------------------------------


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_single_span_lies_anywhere(setting, record, architecture, roll):
    objective = UL2(denoisers=[("X", 64, 0.15)], rates=None, random_roll=roll)
    (part,) = parts(objective.bind(setting(architecture, 256)))
    drawn = full_record(record, part)
    starts = []
    for seed in range(200):
        example = part.corrupt(drawn, generator(seed, "x"))
        sentinels = np.flatnonzero(example.inputs > X)
        assert len(sentinels) in ((1, 2) if roll else (1,))
        starts.append(sentinels[0] - 1)
    kept = len(drawn.tokens) - noise.noise_counts(len(drawn.tokens), 0.15, 64)[0]
    counts = np.histogram(starts, 4, (0, kept))[0]
    assert counts.min() > 20  # of 50 expected
    if not roll:
        assert min(starts) < kept / 20 and max(starts) > kept * 19 / 20


@pytest.mark.parametrize("roll", [False, True])
def test_more_spans_than_sentinels_cannot_be_bound(setting, roll):
    objective = UL2(random_roll=roll)
    with pytest.raises(UserError, match=r"X\(3, 0.5\).*length=512 needs.*has 97 besides") as error:
        objective.bind(setting(length=512))
    enough = int(re.search("extra_ids to (\\d+)", str(error.value))[1])
    assert 127 + 3 <= enough <= 129 + 3
    objective.bind(setting(length=512, num_sentinels=enough))
    with pytest.raises(UserError, match="extra_ids"):
        objective.bind(setting(length=512, num_sentinels=enough - 1))
    with pytest.raises(UserError, match=r"needs a token '\[R\]'"):
        objective.bind(setting(length=16, num_sentinels=0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("length", [64, 128])
@pytest.mark.parametrize("pieces", [1, 4])
def test_the_mode_token_survives_full_rows_and_cuts_nothing(
    setting, record, architecture, length, pieces
):
    setting = setting(architecture, length)
    names = {"R": "[R]", "S": "[S]", "X": "[X]"}
    modes = {mode: [token] for mode, token in MODE.items()}
    if pieces > 1:
        names = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}
        modes = {mode: list(map(ord, name[:pieces])) for mode, name in names.items()}
        object.__setattr__(
            setting.vocabulary, "encode", lambda s: np.array([*map(ord, s[:pieces])], np.int32)
        )
    bound = UL2(random_roll=False, mode_tokens=names).bind(setting)
    bare = UL2(random_roll=False, mode_tokens=None).bind(
        dataclasses.replace(setting, length=length - pieces)
    )
    for part, shorter in zip(parts(bound), parts(bare), strict=True):
        drawn = full_record(record, part)
        example = part.corrupt(drawn, generator(3, "x"))
        without = shorter.corrupt(drawn, generator(3, "x"))
        assert example.inputs.tolist() == modes[part.denoiser.mode] + without.inputs.tolist()
        assert example.targets.tolist() == without.targets.tolist()
        if part.denoiser.mode == "S":
            continue
        assert example.inputs[-1] == example.targets[-1] == EOS
        if architecture == "encoder_decoder":
            assert len(example.inputs) == length
        else:
            assert length - 2 <= len(example.inputs) + len(example.targets) <= length


# --- what goes in comes out ------------------------------------------------------------------


def rebuild(part, example):
    """The text that an example was made of."""
    inputs, targets = example.inputs.tolist(), example.targets.tolist()
    sentinels = part.setting.vocabulary.sentinels[:-3].tolist()
    if part.mode_tokens:
        assert inputs.pop(0) == MODE[part.denoiser.mode]
    both = part.setting.architecture == "encoder_decoder"
    if part.denoiser.mode == "S":
        if both:
            assert inputs.pop() == EOS
        if both or part.cut == "document":
            assert targets.pop() == EOS
        if part.s_sentinel:
            assert inputs.pop() == targets.pop(0) == sentinels[0]
        return inputs + targets
    assert inputs.pop() == targets.pop() == EOS
    used = [t for t in inputs if t in sentinels]
    assert used == [t for t in targets if t in sentinels] == sentinels[: len(used)]
    spans = {}
    for token in targets:
        if token in sentinels:
            spans[token] = current = []
        else:
            current.append(token)
    return [t for token in inputs for t in spans.get(token, [token])]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_denoiser_rebuilds_within_its_bounds(setting, record, data):
    draw = data.draw
    architecture, length = draw(st.sampled_from(ARCHITECTURES)), draw(st.integers(24, 150))
    cut, seed = draw(st.sampled_from(["window", "document"])), draw(st.integers(0, 10**6))
    objective = UL2(
        cut=cut,
        denoisers=draw(st.sampled_from([UL2().denoisers, T5GEMMA])),
        rates=None,
        mode_tokens=draw(st.sampled_from([None, UL2().mode_tokens])),
        random_roll=draw(st.booleans()),
        s_sentinel=draw(st.booleans()),
    ).bind(setting(architecture, length))
    number = draw(st.integers(0, len(objective.denoisers) - 1))
    part = parts(objective)[number]
    full = len(full_record(record, part).tokens)
    raw = draw(st.one_of(st.just(full), st.integers(0, full)))
    several = cut == "window" and raw > 2 and draw(st.booleans())
    drawn = record(raw, seed, [raw // 2, raw - raw // 2] if several else None)

    example = part.corrupt(drawn, generator(seed, "x"))
    assert rebuild(part, example) == drawn.tokens.tolist()
    assert example.inputs.dtype == example.targets.dtype == np.int32
    assert example.features["denoiser"].tolist() == [number + 1] * len(example.targets)
    for tokens, documents in (
        (example.inputs, example.input_documents), (example.targets, example.target_documents)
    ):  # fmt: skip
        if several:
            assert len(documents) == len(tokens) and (np.diff(documents) >= 0).all()
        else:
            assert documents is None

    bounds, rows = part.bounds(raw, generator(seed, "x")), objective.lengths
    assert len(example.inputs) <= bounds.inputs and len(example.targets) <= bounds.targets
    if architecture == "encoder_decoder":
        assert bounds.inputs <= rows.inputs == length and bounds.targets <= rows.targets
    else:
        assert bounds.inputs + bounds.targets <= rows.inputs == length and rows.targets == 0


def test_s_leaves_the_share_that_it_is_asked_for(setting, record):
    for density in (0.25, 0.5, 0.75):
        objective = UL2(denoisers=[("S", None, density)], rates=None)
        (part,) = parts(objective.bind(setting(length=202)))
        drawn = full_record(record, part)
        shares = [
            (len(part.corrupt(drawn, generator(seed, "x")).targets) - 1) / len(drawn.tokens)
            for seed in range(400)
        ]
        assert abs(np.mean(shares) - density) < 0.03
    assert noise.prefix_range(101, 0.75) == (1, 50)
    assert noise.prefix_range(101, 0.5) == (1, 100)


# --- batches ---------------------------------------------------------------------------------


class MemoryCorpus:
    """Documents of 1 to 150 tokens; no token is special in the toy vocabulary."""

    metadata, fingerprint = {}, "memory"

    def __init__(self):
        lengths = np.random.default_rng(0).integers(1, 150, 60)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.num_documents, self.num_tokens = len(lengths), int(self.offsets[-1])
        self.all = np.random.default_rng(1).integers(3, 890, self.num_tokens).astype(np.uint16)

    def tokens(self, start, stop):
        return self.all[start:stop]


def pipeline_of(bound, **keywords):
    corpus = MemoryCorpus()
    return Pipeline(
        [Component(name, corpus, *part) for name, part in bound.components().items()],
        vocabulary=bound.setting.vocabulary,
        architecture=bound.setting.architecture,
        length=bound.lengths.inputs,
        targets_length=bound.lengths.targets,
        batch_size=8,
        seed=0,
        **keywords,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pack", [False, True])
def test_batches(setting, architecture, pack):
    bound = UL2(cut="document" if pack else "window").bind(setting(architecture, 64))
    pipeline = pipeline_of(bound, pack=pack, attend_across_documents=not pack)
    modes = np.array([MODE[d.mode] for d in bound.denoisers])
    seen = set()
    for step in range(8):
        batch = pipeline.batch(step)
        weights, number = batch["decoder_loss_weights"], batch["decoder_denoiser"]
        assert ((number > 0) == (weights > 0)).all()
        stack, kind = ("decoder", "target") if architecture == "decoder" else ("encoder", "input")
        tokens = batch[f"{stack}_{kind}_tokens"]
        ids, positions = batch[f"{stack}_segment_ids"], batch[f"{stack}_positions"]
        first = (ids > 0) & (positions == 0)
        # A mode token begins each example, and stands nowhere else.
        assert (np.isin(tokens, modes) == first).all()
        for row, slot in np.argwhere(first):
            example = batch["decoder_segment_ids"][row] == ids[row, slot]
            (k,) = set(number[row][example & (weights[row] > 0)].tolist())
            assert modes[k - 1] == tokens[row, slot]
            seen.add(k)
        if architecture == "decoder":
            assert (batch["decoder_causal_attention"][first] == 1).all()
    assert seen == set(range(1, 8))
    if pack:
        assert ids.max() > 1


def test_a_decoder_can_stay_causal(setting):
    bound = UL2(bidirectional_inputs=False).bind(setting("decoder", 64))
    assert "decoder_causal_attention" not in pipeline_of(bound).batch(0)
    assert not bound.reads_both_ways


def test_rates_are_exact(setting):
    pipeline = pipeline_of(UL2().bind(setting(length=64)))
    drawn = pipeline._stream.draws(0, 10240).component
    assert np.bincount(drawn).tolist() == [2048, 2048, 1024, 1024, 1024, 1024, 2048]


# --- losses ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(setting):
    """(bound, a batch, batch -> terms)."""
    bound = UL2().bind(setting("decoder", 48))
    batch = pipeline_of(bound).batch(0)
    config = ModelConfig(
        architecture="decoder", vocab_size=1000, num_layers=1, d_model=16, d_ff=32, num_heads=2,
        head_dim=8,
    )  # fmt: skip
    network = bound.network(config)
    shapes = nn.unbox(jax.eval_shape(network.init, {"params": jax.random.key(0)}, batch))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(scale=0.3, size=x.shape)), shapes)

    @jax.jit
    def losses(params, batch):
        return bound.losses(network.apply, params, None, batch, jax.random.key(0), False)

    return bound, batch, lambda batch: jax.device_get(losses(params, batch))


def test_each_denoiser_has_its_own_metric(trained):
    bound, batch, losses = trained
    terms = losses(batch)
    numbers, weights = batch["decoder_denoiser"], batch["decoder_loss_weights"]
    metrics = {name: terms[f"cross_entropy_{name}"] for name in bound.components()}
    assert all(term.coefficient == 0 for term in metrics.values())
    assert [term.weight for term in metrics.values()] == [
        weights[numbers == k].sum() for k in range(1, 8)
    ]
    total = terms["cross_entropy"]
    assert total.weight == weights.sum() and total.coefficient == 1
    np.testing.assert_allclose(sum(t.sum for t in metrics.values()), total.sum, rtol=1e-5)
    # What no denoiser made counts in the total, and each metric is that of its examples alone.
    chosen = int(numbers.max())
    others = losses(batch | {"decoder_denoiser": np.zeros_like(numbers)})
    np.testing.assert_allclose(others["cross_entropy"].sum, total.sum, rtol=1e-5)
    assert others[f"cross_entropy_{[*metrics][chosen - 1]}"].weight == 0
    only = losses(batch | {"decoder_loss_weights": weights * (numbers == chosen)})
    np.testing.assert_allclose(
        only["cross_entropy"].sum, [*metrics.values()][chosen - 1].sum, rtol=1e-5
    )
    assert np.isfinite(total.sum) and total.sum > 0


def test_sums_by_group_are_the_same_gathered_or_not():
    rng = np.random.default_rng(0)
    hidden = np.float32(rng.normal(size=(4, 32, 8)))
    kernel = np.float32(rng.normal(size=(8, 50)))
    targets = np.int32(rng.integers(0, 50, (4, 32)))
    weights = np.float32(rng.random((4, 32)) < 0.2)
    groups = np.where(rng.integers(0, 3, (4, 32)) == np.arange(3)[:, None, None], weights, 0)

    @jax.jit
    def sums(weights, groups):
        def of(weights, predictions):
            return heads.token_losses(
                lambda x: x @ kernel, hidden, targets, weights,
                z_loss=0.1, label_smoothing=0.1, predictions=predictions,
            )  # fmt: skip

        return of(weights, None), of(groups[1], None), of(groups, None), of(groups, 16)

    whole, second, in_full, gathered = sums(weights, groups)
    for total, one, *several in zip(whole, second, in_full, gathered, strict=True):
        for by_group in several:
            assert by_group.shape == (3,)
            np.testing.assert_allclose(by_group.sum(), total, rtol=1e-5)
            np.testing.assert_allclose(by_group[1], one, rtol=1e-5)


# --- hooks and errors ------------------------------------------------------------------------

PREFIX, REST = np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)


@pytest.mark.parametrize(
    ("objective", "architecture", "inputs", "targets"),
    [
        (UL2(), "encoder_decoder", [S, 5, 6, 7, EOS], [8, 9, EOS]),
        (UL2(), "decoder", [S, 5, 6, 7], [8, 9, EOS]),
        (UL2(s_sentinel=True), "decoder", [S, 5, 6, 7, 999], [999, 8, 9, EOS]),
        (UL2(mode_tokens=None), "decoder", [5, 6, 7], [8, 9, EOS]),
        (PrefixLM(), "encoder_decoder", [5, 6, 7, EOS], [8, 9, EOS]),
        (PrefixLM(loss_on_inputs=True), "decoder", [5, 6, 7], [8, 9, EOS]),
        (CausalLM(), "decoder", [5, 6, 7], [8, 9, EOS]),
    ],
)
def test_continuations(setting, objective, architecture, inputs, targets):
    bound = objective.bind(setting(architecture, 64))
    example = bound.continuation(PREFIX, REST)
    assert example.inputs.tolist() == inputs and example.targets.tolist() == targets
    assert not example.loss_on_inputs
    if architecture == "decoder":
        assert example.bidirectional_inputs == bound.reads_both_ways
        assert bound.reads_both_ways == (not isinstance(objective, CausalLM))


def test_hooks(setting):
    bound = UL2().bind(setting("decoder", 64))
    assert bound.named_tokens == {R: "[R]", S: "[S]", X: "[X]"}
    assert UL2(mode_tokens=None).bind(setting(length=64)).named_tokens == {}
    spans = UL2(denoisers=[("R", 3, 0.15)], rates=None).bind(setting(length=64))
    assert spans.continuation(PREFIX, REST) is None
    assert not spans.reads_both_ways  # an encoder-decoder
    assert bound.keeps_documents_apart is False
    apart = UL2(cut="document").bind(setting(length=64))
    assert apart.keeps_documents_apart
    assert all(isinstance(part.unit, Document) for part in parts(apart))


def test_a_prefix_lm_with_a_sentinel_fills_its_rows(setting, record):
    for architecture, raw in (("encoder_decoder", 63), ("decoder", 62)):
        bound = PrefixLM(sentinel=True).bind(setting(architecture, 64))
        assert bound.unit.raw_length == raw
        sizes = {"inputs": 0, "targets": 0, "both": 0}
        for seed in range(300):
            example = bound.corrupt(record(raw), generator(seed, "x"))
            size = {"inputs": len(example.inputs), "targets": len(example.targets)}
            size["both"] = sum(size.values())
            sizes = {name: max(most, size[name]) for name, most in sizes.items()}
        most = sizes["inputs" if architecture == "encoder_decoder" else "both"]
        assert most == 64 and sizes["targets"] == bound.targets_needed - (architecture == "decoder")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"denoisers": [("R", 3)], "rates": None}, "UL2.denoisers has .'R', 3"),
        ({"denoisers": [("Q", 3, 0.1)], "rates": None}, "UL2.denoisers has .'Q'"),
        ({"denoisers": [("S", 3, 0.1)], "rates": None}, "UL2.denoisers has .'S'"),
        ({"denoisers": [("X", None, 0.1)], "rates": None}, "UL2.denoisers has .'X'"),
        ({"denoisers": [("X", 0.5, 0.1)], "rates": None}, "UL2.denoisers has .'X'"),
        ({"denoisers": [], "rates": None}, "UL2.denoisers is"),
        ({"denoisers": [("R", 3, 0.15)] * 2, "rates": None}, "all different"),
        ({"rates": [1, 2]}, "UL2.rates is .*each of the 7 UL2.denoisers"),
        ({"rates": [0] * 7}, "UL2.rates is .*positive"),
        ({"mode_tokens": {"R": "[R]", "X": "[X]"}}, "UL2.mode_tokens is .*'S'"),
        ({"mode_tokens": dict.fromkeys("RSX", "[R]")}, "UL2.mode_tokens is .*token of its own"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        UL2(**fields)


def test_rows_that_are_too_short_are_named(setting):
    with pytest.raises(UserError, match=r"train.length is 4, too short for UL2's R\(3, 0.15\)"):
        UL2().bind(setting(length=4))
    with pytest.raises(UserError, match="targets_length is 60; UL2's X.*set it to 63"):
        UL2().bind(setting(length=64, targets_length=60))


def test_seqio_is_given_one_denoiser_at_a_time():
    vocabulary = types.SimpleNamespace(vocab_size=400, eos_id=1, pad_id=0, extra_ids=100)
    feature = types.SimpleNamespace(vocabulary=vocabulary)
    preprocess = objective_preprocessor(UL2())
    with pytest.raises(UserError, match="UL2 draws each example from 7 parts"):
        preprocess(None, {"inputs": 64, "targets": 64}, {"inputs": feature, "targets": feature})


@pytest.mark.parametrize(
    ("page", "shares"),
    [
        ("ul2", {"R": 0.4, "X": 0.4, "S": 0.2}),
        ("ul2r", {"R": 0.25, "X": 0.25, "S": 0.5}),
        ("ul2_t5gemma", {"R": 0.125, "X": 0.375, "S": 0.5}),
    ],
)
def test_pages(page, shares):
    from launch import config

    files = ["gin_configs/runs/quickstart.gin", f"gin_configs/objectives/{page}.gin"]
    objective = config.load(files, []).run.objective
    assert isinstance(objective, UL2) and isinstance(objective.denoisers[0], Denoiser)
    found = dict.fromkeys("RXS", 0.0)
    for denoiser, rate in zip(objective.denoisers, objective.rates, strict=True):
        found[denoiser.mode] += rate / sum(objective.rates)
    assert found == pytest.approx(shares)
    if page == "ul2":
        assert objective == UL2(denoisers=UL2().denoisers, rates=[*UL2().rates])
    if page == "ul2_t5gemma":
        assert objective.denoisers == UL2(denoisers=T5GEMMA, rates=None).denoisers
