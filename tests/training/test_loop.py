"""`fit` from end to end on a toy: resuming, saving, logging, stopping."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5like.errors import UserError
from t5like.training import signals
from t5like.training.init_from import InitFrom
from t5like.training.meter import NonFiniteLoss
from t5like.training.optimizers import AdamW
from t5like.training.schedules import Cosine
from t5like.training.sharding import Sharding
from t5like.training.state import Frozen
from t5like.training.terms import Term

TIMINGS = ("tokens_per_second", "mfu")


def lines(toy, split="train"):
    """Log lines of a split, without what depends on the clock."""
    text = (toy.workdir / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in text]
    return [
        {k: v for k, v in line.items() if k not in TIMINGS}
        for line in parsed
        if line["split"] == split
    ]


def saved_steps(toy):
    return sorted(int(p.name) for p in (toy.workdir / "checkpoints").iterdir())


def held_out(toy_parts, count=3):
    return {"held_out": lambda: [toy_parts.batch_of(1000 + i) for i in range(count)]}


def sigterm_at(toy_parts, when):
    """Batches during which, before the batch of step `when`, the process gets a SIGTERM."""

    def batches(start):
        for step, batch in toy_parts.batches(start):
            if step == when:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step, batch

    return batches


@pytest.fixture(scope="module")
def eight_updates(toy_in, tmp_path_factory):
    """(state, log lines) of an uninterrupted run of 8 updates."""
    toy = toy_in(tmp_path_factory.mktemp("eight"))
    return toy.fit(8).state, lines(toy)


def test_it_learns_and_logs_every_field(toy, toy_parts):
    result = toy.fit(60, log_every=20, evals=held_out(toy_parts))
    train = lines(toy)
    assert [line["step"] for line in train] == [20, 40, 60]
    assert train[-1]["error"] < 0.3 * train[0]["error"]
    fields = {"step", "split", "loss", "error", "size", "size_unscaled", "tokens", "flops"}
    fields |= {"learning_rate", "gradient_norm", "update_norm", "parameter_norm", "batch_hash"}
    assert set(train[-1]) == fields
    assert train[-1]["tokens"] == 60 * 8 and train[-1]["flops"] == 60e3
    assert result.stopped_by == "budget" and int(result.state.step) == 60
    assert result.metrics["held_out"]["loss"] == lines(toy, "held_out")[-1]["loss"]


def test_a_line_is_the_exact_mean_over_its_interval(toy, toy_parts):
    """With a learning rate of 0, the sums can be made again by hand."""
    frozen_rate = AdamW(learning_rate=Cosine(peak=0.0))
    result = toy.fit(5, log_every=5, optimizer=frozen_rate)
    total = weight = 0.0
    for step in range(5):
        batch = toy_parts.batch_of(step)
        term = toy_parts.loss_fn(result.state.params, None, batch, None, False)["size_unscaled"]
        total, weight = total + float(term.sum), weight + float(term.weight)
    [line] = lines(toy)
    assert abs(line["size_unscaled"] / (total / weight) - 1) < 0.2  # dropout moves it a little
    np.testing.assert_allclose(line["loss"], line["error"] + 0.01 * line["size"], rtol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_run(make_toy, toy_parts, assert_same_bits):
    whole, parts = make_toy("whole"), make_toy("parts")
    wanted = whole.fit(10, evals=held_out(toy_parts), eval_every=4)
    for when in (5, 7):
        with pytest.raises(signals.Preempted):
            parts.fit(
                10, evals=held_out(toy_parts), eval_every=4, batches=sigterm_at(toy_parts, when)
            )
    got = parts.fit(10, evals=held_out(toy_parts), eval_every=4)
    assert_same_bits(got.state, wanted.state)
    assert lines(parts) == lines(whole)  # losses, norms and batch hashes, to the last bit
    assert lines(parts, "held_out") == lines(whole, "held_out")


def test_sigterm_saves_at_the_step_and_exits_143(toy, toy_parts):
    with pytest.raises(signals.Preempted) as raised:
        toy.fit(10, batches=sigterm_at(toy_parts, 3), checkpoint_every_steps=None)
    assert raised.value.exit_status == 143 and raised.value.step == 4
    assert saved_steps(toy) == [4]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_while_evaluating_saves_and_evaluates_on_resume(toy, toy_parts):
    def evaluation():
        for index, batch in enumerate(held_out(toy_parts)["held_out"]()):
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def interrupted(step):
        with pytest.raises(signals.Preempted):
            toy.fit(8, evals={"held_out": evaluation}, eval_every=step)
        assert saved_steps(toy)[-1] == step

    interrupted(4)
    assert not lines(toy, "held_out")
    with pytest.raises(signals.Preempted):
        toy.fit(8, evals=held_out(toy_parts), eval_every=4, batches=sigterm_at(toy_parts, 5))
    interrupted(8)
    toy.fit(8, evals=held_out(toy_parts), eval_every=4)
    assert [line["step"] for line in lines(toy, "held_out")] == [4, 8]


def test_the_loss_function_is_traced_once(toy, toy_parts):
    traces = []

    def counting(*args):
        traces.append(args[-1])
        return toy_parts.loss_fn(*args)

    toy.fit(6, loss_fn=counting, evals=held_out(toy_parts), eval_every=2)
    assert sorted(traces) == [False, True]


def test_metrics_are_fetched_once_a_log_line(toy, monkeypatch):
    fetches = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetches.append(1) or device_get(tree))
    toy.fit(12, log_every=4, checkpoint_every_steps=4)
    assert len(fetches) == 3


def test_an_implicit_host_transfer_in_a_step_is_an_error(toy, monkeypatch):
    monkeypatch.setattr(Sharding, "put_batch", lambda self, mesh, batch: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        toy.fit(3)


def test_a_non_finite_loss_stops_the_run_and_is_not_saved(toy, toy_parts):
    def batches(start):
        for step, batch in toy_parts.batches(start):
            if step == 6:
                batch["x"][0, 0] = np.nan
            yield step, batch

    with pytest.raises(NonFiniteLoss, match="'error' is nan at step 7.*another --workdir"):
        toy.fit(20, batches=batches, log_every=10, checkpoint_every_steps=4)
    assert saved_steps(toy) == [4]
    assert int(toy.fit(5).state.step) == 5  # goes on from there


def test_overflow_of_the_gradient_stops_the_run_too(toy):
    def loss_fn(params, frozen, batch, key, train):
        kernel = params["layer"]["kernel"]
        return {"loss": Term(jnp.sum(jnp.sqrt(kernel - kernel)), jnp.float32(1))}  # slope inf - inf

    with pytest.raises(NonFiniteLoss, match="gradient norm is nan at step 1"):
        toy.fit(3, loss_fn=loss_fn)
    assert saved_steps(toy) == []


def test_a_finished_run_has_nothing_to_do_and_a_raised_budget_extends_it(
    toy, eight_updates, assert_same_bits, caplog
):
    toy.fit(5)
    before = lines(toy)
    again = toy.fit(5)
    assert again.stopped_by == "nothing to do" and lines(toy) == before
    assert_same_bits(toy.fit(8).state, eight_updates[0])
    assert "depends on that" not in caplog.text


def test_a_schedule_that_depends_on_the_budget_says_so(toy, caplog):
    optimizer = AdamW(learning_rate=Cosine(peak=0.1))
    toy.fit(4, optimizer=optimizer)
    toy.fit(6, optimizer=optimizer)
    assert "now 6 updates long, not 4: Cosine depends on that" in caplog.text


def test_another_identity_or_vocabulary_is_refused(toy):
    toy.fit(3, identity={"AdamW.b1": "0.9"}, vocabulary_fingerprint="abc")
    with pytest.raises(UserError, match="AdamW.b1 was 0.9 and is now 0.8"):
        toy.fit(6, identity={"AdamW.b1": "0.8"}, vocabulary_fingerprint="abc")
    with pytest.raises(UserError, match="another vocabulary"):
        toy.fit(6, identity={"AdamW.b1": "0.9"}, vocabulary_fingerprint="xyz")


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(
    toy, eight_updates, assert_same_bits, caplog
):
    toy.fit(6)
    (toy.workdir / "checkpoints" / "6" / "manifest.ocdbt").write_bytes(b"")
    assert_same_bits(toy.fit(8).state, eight_updates[0])
    assert "is damaged and is not used" in caplog.text
    assert lines(toy)[-1] == eight_updates[1][-1]


def test_init_from_starts_at_step_0_with_the_others_parameters(make_toy, assert_same_bits):
    source, toy = make_toy("source"), make_toy("toy")
    wanted = source.fit(5).state
    still = AdamW(learning_rate=Cosine(peak=0.0))
    got = toy.fit(1, optimizer=still, init_from=InitFrom(str(source.workdir))).state
    assert int(got.step) == 1
    assert_same_bits(got.params, wanted.params)


def test_a_start_past_the_end_names_both_steps(make_toy):
    source, toy = make_toy("source"), make_toy("toy")
    source.fit(5)
    start = InitFrom(str(source.workdir), keep_optimizer=True)
    with pytest.raises(UserError, match="at step 5, .* run of 5 steps .*train.init_reset=True"):
        toy.fit(5, init_from=start)
    assert int(toy.fit(6, init_from=start).state.step) == 6


def test_evaluations_that_were_missed_are_made_up_for_once(toy, toy_parts):
    one, two = held_out(toy_parts), {"longer": held_out(toy_parts, 5)["held_out"]}
    toy.fit(3, evals=one)
    assert toy.fit(3, evals=one | two).metrics.keys() == {"longer"}
    assert toy.fit(3, evals=one | two).stopped_by == "nothing to do"
    for split in ("held_out", "longer"):
        assert [line["step"] for line in lines(toy, split)] == [3]


def test_a_final_evaluation_cut_short_twice_leaves_one_line_a_split(toy, toy_parts):
    def cut():
        os.kill(os.getpid(), signal.SIGTERM)
        yield toy_parts.batch_of(0)
        yield toy_parts.batch_of(1)

    whole = held_out(toy_parts)["held_out"]
    for evals in ({"a": whole, "b": cut}, {"b": whole, "c": cut}, {"b": whole, "c": cut}):
        with pytest.raises(signals.Preempted):
            toy.fit(3, evals=evals)
    toy.fit(3, evals={"a": whole, "b": whole, "c": whole})
    assert toy.fit(3, evals={"a": whole, "b": whole}).stopped_by == "nothing to do"
    for split in "abc":
        assert [line["step"] for line in lines(toy, split)] == [3]


def test_checkpoints_by_the_clock_and_the_best(toy, toy_parts):
    toy.fit(4, checkpoint_every_steps=None, checkpoint_every_minutes=0.0, keep=2)
    assert saved_steps(toy) == [3, 4]


def test_the_best_is_kept_though_no_save_was_due_when_it_was_measured(toy, toy_parts):
    scales = iter([1.0, 50.0, 90.0])

    def harder_every_time():
        batch = toy_parts.batch_of(1000)
        return [batch | {"y": batch["y"] * next(scales)}]

    toy.fit(
        6, checkpoint_every_steps=None, eval_every=2, keep=1, keep_best="held_out/loss",
        evals={"held_out": harder_every_time},
    )  # fmt: skip
    losses = [line["loss"] for line in lines(toy, "held_out")]
    assert losses == sorted(losses)
    assert saved_steps(toy) == [2, 6]


def test_changed_training_text_is_refused(toy):
    toy.fit(1)
    toy.fit(2, data_fingerprint="before")  # the first part had none: nothing to compare
    toy.fit(3, data_fingerprint="before")
    toy.fit(3)
    with pytest.raises(UserError, match="training text"):
        toy.fit(4, data_fingerprint="after")


def test_frozen_trees_reach_the_loss_and_survive_a_resume(toy, toy_parts):
    def loss_fn(params, frozen, batch, key, train):
        distance = jnp.sum(jnp.square(params["layer"]["kernel"] - frozen["teacher"]))
        return {"distance": Term(distance, jnp.float32(1))}

    def follow(state):
        teacher = 0.5 * (state.frozen["teacher"] + state.params["layer"]["kernel"])
        return state.replace(frozen={"teacher": teacher})

    frozen = Frozen.of({"teacher": np.ones((4, 3), "f")})
    options = dict(loss_fn=loss_fn, frozen=frozen, after_step=follow)
    halfway = toy.fit(3, **options).state.frozen["teacher"]
    assert not np.array_equal(halfway, np.ones((4, 3)))
    toy.fit(6, **options)
    distances = [line["distance"] for line in lines(toy)]
    assert distances == sorted(distances, reverse=True)


def test_a_loader_that_skips_is_caught(toy, toy_parts):
    with pytest.raises(ValueError, match="batch of step 1, not of 0"):
        toy.fit(3, batches=lambda start: toy_parts.batches(start + 1))


def test_a_loader_that_ends_is_caught(toy, toy_parts):
    with pytest.raises(ValueError, match="ended at step 2 of 3"):
        toy.fit(3, batches=lambda start: iter([(s, toy_parts.batch_of(s)) for s in range(2)]))


def test_a_metric_that_is_not_finite_is_no_reason_to_stop(toy, toy_parts):
    def loss_fn(*args):
        return toy_parts.loss_fn(*args) | {"odd": Term(jnp.float32(np.nan), jnp.float32(1), 0.0)}

    toy.fit(2, loss_fn=loss_fn)
    [line] = lines(toy)
    assert line["odd"] is None and np.isfinite(line["loss"])


def test_accumulated_runs_agree_with_whole_batches(make_toy, toy_parts):
    def loss_fn(params, frozen, batch, key, train):
        return toy_parts.loss_fn(params, frozen, batch, key, False)

    whole = make_toy("whole").fit(4, loss_fn=loss_fn).state.params
    parts = make_toy("parts").fit(4, loss_fn=loss_fn, accumulate=4).state.params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), parts, whole)
