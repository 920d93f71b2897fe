"""Runs of several tracks: what a track leaves alone, one compilation each, exact counts."""

import collections
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.data.mixture import Mixture
from t5like.data.plans import Always, Interleaved, Successive
from t5like.errors import UserError
from t5like.training import optimizers as O, signals, state as state_lib, step as step_lib
from t5like.training.budget import Budget
from t5like.training.evaluation import HeldOut
from t5like.training.schedules import Constant
from t5like.training.terms import Term
from t5like.training.tracks import Track, paths_of, spent

from .test_loop import lines


def full():
    """Parameters that Muon, Adafactor and the rest treat in all their ways."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def network():
        return {
            "embedder": {"embedding": normal(16, 8)},
            "layers": {"mlp": {"kernel": normal(3, 8, 12), "bias": normal(3, 12)}},
            "norm": {"scale": normal(8)},
        }

    heads = {"head_a": {"kernel": -normal(130, 140)}, "head_b": {"kernel": normal(130, 140)}}
    return {"model": network(), "other": network(), **heads}


def shared_and(head):
    """The parameters that a network with this head declares."""
    return {name: tree for name, tree in full().items() if name in ("model", head)}


def squares(params, frozen, batch, key, train):
    goal = jnp.mean(batch["goal"])
    total = sum(jnp.sum(jnp.square(x - goal)) for x in jax.tree.leaves(params))
    return {"squares": Term(total, jnp.float32(1))}


def bits(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    "cls, accumulate", [(O.AdamW, 1), (O.AdamW, 2), (O.Adafactor, 1), (O.Lion, 1), (O.Muon, 1)]
)
def test_what_a_track_does_not_declare_keeps_its_bits(cls, accumulate):
    """Parameters and moments alike, -0.0 too; counts and all else move."""
    optimizer = cls(learning_rate=Constant(0.1), weight_decay=0.5)
    transform = optimizer.build(10)
    update = step_lib.make_train_step(
        squares, transform, optimizer.schedule(10), accumulate=accumulate,
        declares=paths_of(shared_and("head_a")),
    )  # fmt: skip
    params = full()
    params["head_b"]["kernel"] = params["head_b"]["kernel"].at[0, 0].set(-0.0)
    state = state_lib.create(params, transform)
    in_use = lambda x: x + 0.25 if x.dtype == jnp.float32 else x  # noqa: E731
    state = state.replace(opt_state=jax.tree.map(in_use, state.opt_state))
    before = bits(state)
    batch = {"goal": jnp.full(2, 0.5)}
    after = bits(update(state, batch, step_lib.run_key(0, step_lib.STEP_STREAM))[0])
    moved = {name for name in before if before[name] != after[name]}
    alone = {name for name in before if "['head_b']" in name or "['other']" in name}
    assert len(alone) >= 10 and not alone & moved
    assert {n for n in before if n.startswith(".params")} - alone <= moved
    assert {n for n in before if n.endswith(("count", ".step"))} <= moved
    moments = {n for n in moved if n.startswith(".opt_state") and "['head_a']" in n}
    assert moments


def test_moments_of_other_tracks_do_not_change_an_update():
    """A track's update is that of a run which has its parameters alone."""
    optimizer = O.AdamW(learning_rate=Constant(0.1))
    transform = optimizer.build(10)
    part = shared_and("head_a")
    batch, key = {"goal": jnp.float32(0.5)}, step_lib.run_key(0, step_lib.STEP_STREAM)
    results = []
    for params, declares in ((full(), paths_of(part)), (part, None)):
        update = step_lib.make_train_step(
            squares, transform, optimizer.schedule(10), declares=declares
        )
        state = state_lib.create(params, transform)
        for _ in range(2):
            state, metrics = update(state, batch, key)
        results.append((state.params, metrics.scalars))
    (union, union_scalars), (alone, scalars) = results
    jax.tree.map(
        np.testing.assert_array_equal, {name: union[name] for name in alone}, alone
    )
    for name in ("gradient_norm", "update_norm"):
        np.testing.assert_allclose(union_scalars[name], scalars[name], rtol=1e-6)


# --- fit -------------------------------------------------------------------------------------

TURNS = Interleaved(Mixture((1.0, 1.0), 0), (Always("a"), Always("b")))


def halves(total_steps):
    return Successive((Always("a"), Always("b")), (total_steps // 2,))


@pytest.fixture
def two(toy_parts):
    """The toy as two tracks, `b` with a layer of its own; traces[name, train] counts traces."""
    traces = collections.Counter()

    def loss(name):
        def loss_fn(params, frozen, batch, key, train):
            traces[name, train] += 1
            terms = toy_parts.loss_fn(params, frozen, batch, key, train)
            if name == "b":
                own = jnp.sum(jnp.square(params["own"] - 1.0))
                terms["own"] = Term(own, jnp.float32(1))
            return terms

        return loss_fn

    def init(key):
        return toy_parts.init(key) | {"own": jnp.zeros(3)}

    layer = {"kernel": 0, "bias": 0}
    tracks = {
        "a": Track(loss("a"), 8, 1e3, {"layer": layer}),
        "b": Track(loss("b"), 24, 5e3, {"layer": layer, "own": 0}),
    }
    evals = {
        f"held_out/{name}": HeldOut(name, lambda: [toy_parts.batch_of(1000)]) for name in tracks
    }
    return dict(init_fn=init, tracks=tracks, evals=evals), traces


@pytest.fixture
def fit(two):
    """(toy, total_steps, plan, ...) -> FitResult of a run of the two tracks, not evaluated."""
    options = {name: value for name, value in two[0].items() if name != "evals"}

    def run(toy, total_steps, plan, **kwargs):
        return toy.fit(total_steps, plan=plan, **options, **kwargs)

    return run


def test_each_track_compiles_once_and_reports_under_its_name(make_toy, two, monkeypatch):
    options, traces = two
    compiled, compile_ = [], jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda *a, **k: compiled.append(1) or compile_(*a, **k)
    )
    toy = make_toy("turns")
    toy.fit(12, plan=lambda total: TURNS, log_every=4, eval_every=6, **options)
    assert len(compiled) == 2
    assert traces == {(name, train): 1 for name in "ab" for train in (True, False)}
    counts = dict.fromkeys("ab", 0)
    for line in lines(toy):
        before, counts = counts, TURNS.counts(line["step"])
        assert line["tokens"] == 8 * counts["a"] + 24 * counts["b"]
        assert line["flops"] == 1e3 * counts["a"] + 5e3 * counts["b"]
        updates = {t: counts[t] - before[t] for t in "ab" if counts[t] > before[t]}
        mean = sum(line[f"{t}/loss"] * n for t, n in updates.items()) / sum(updates.values())
        np.testing.assert_allclose(line["loss"], mean, rtol=1e-6)
        assert ("b/own" in line) == ("b" in updates) and "a/own" not in line
    for name in "ab":
        assert [m["step"] for m in lines(toy, f"held_out/{name}")] == [6, 12]


def test_phases_are_evaluated_while_they_last(toy, two):
    options, _ = two
    result = toy.fit(8, plan=halves, eval_every=2, keep_best="held_out/b/loss", **options)
    assert [m["step"] for m in lines(toy, "held_out/a")] == [2, 4]
    assert [m["step"] for m in lines(toy, "held_out/b")] == [6, 8]
    assert toy.fit(8, plan=halves, **options).stopped_by == "nothing to do"
    assert int(result.state.step) == 8


def test_a_run_killed_in_either_phase_or_at_the_switch_is_the_uninterrupted_run(
    make_toy, fit, toy_parts, assert_same_bits
):
    whole, parts = make_toy("whole"), make_toy("parts")
    wanted = fit(whole, 8, halves).state

    def stopping(when):
        def batches(start):
            for step, batch in toy_parts.batches(start):
                if step == when:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield step, batch

        return batches

    for when in (1, 3, 5):
        with pytest.raises(signals.Preempted):
            fit(parts, 8, halves, batches=stopping(when))
    assert_same_bits(fit(parts, 8, halves).state, wanted)
    assert lines(parts) == lines(whole)


def test_a_budget_that_moves_the_switch_behind_what_is_done_says_so(toy, fit, caplog):
    fit(toy, 8, halves)
    assert lines(toy)[-1]["tokens"] == 4 * 8 + 4 * 24
    fit(toy, 12, halves, log_every=1)
    assert "now 12 updates long, not 8" in caplog.text
    assert "4 trained a where 6 should have" in caplog.text
    # What was done is counted as it was done: all four updates since were b's.
    assert lines(toy)[-1]["tokens"] == 4 * 8 + 8 * 24


def test_a_budget_that_moves_no_step_that_is_done_says_nothing(toy, fit, caplog):
    fit(toy, 4, lambda total: Successive((Always("a"), Always("b")), (6,)))
    fit(toy, 8, lambda total: Successive((Always("a"), Always("b")), (6,)))
    assert "phases" not in caplog.text
    assert lines(toy)[-1]["tokens"] == 6 * 8 + 2 * 24


# --- budgets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [halves, lambda total: TURNS], ids=["phases", "turns"])
@pytest.mark.parametrize("limit", [1, 999, 1e5, 123_456_789])
def test_a_budget_is_counted_by_the_plan(two, plan, limit):
    tracks = two[0]["tracks"]
    total = Budget(tokens=limit).total_steps(lambda n: spent(tracks, plan(n).counts(n)))
    for_fewer, for_all = (spent(tracks, plan(n).counts(n))[0] for n in (total - 1, total))
    assert for_fewer < limit <= for_all
    shorter = Budget(tokens=limit, steps=3)
    assert shorter.total_steps(lambda n: spent(tracks, plan(n).counts(n))) == min(total, 3)


def test_a_budget_still_needs_a_limit():
    with pytest.raises(UserError, match="the run has no end"):
        Budget().total_steps(lambda n: (n, n))
