"""Traces of updates: whole ones, where TensorBoard looks, by setting and by signal."""

import os
import signal

import jax
import pytest

from t5like.errors import UserError
from t5like.training import profiling


def traced(workdir):
    """{folder: updates whose marks its only trace holds}, read as TensorBoard's plugin would."""
    found = {}
    for folder in (workdir / "tensorboard" / "plugins" / "profile").iterdir():
        [path] = folder.glob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = [e for plane in planes for line in plane.lines for e in line.events]
        steps = [dict(e.stats)["step_num"] for e in events if e.name == "train"]
        assert len(events) > 3 * len(steps)  # There is something in them.
        found[folder.name] = sorted(steps)
    return found


def test_chosen_updates_are_traced_and_train_to_the_same_bits(make_toy, assert_same_bits):
    plain = make_toy("plain").fit(8)
    toy = make_toy("traced")
    assert_same_bits(toy.fit(8, profile=(3, 5)).state, plain.state)
    assert traced(toy.workdir) == {"updates_3_5": [3, 4, 5]}


def test_a_resumed_run_traces_what_is_left_and_never_again(make_toy):
    toy = make_toy("resumed")
    toy.fit(3, profile=(2, 5))
    toy.fit(6, profile=(2, 5))
    toy.fit(8, profile=(2, 5))
    assert traced(toy.workdir) == {"updates_2_3": [2, 3], "updates_4_5": [4, 5]}


def test_a_signal_traces_the_next_updates(make_toy, toy_parts):
    def batches(start):
        for step, batch in toy_parts.batches(start):
            if step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield step, batch

    toy, before = make_toy("signalled"), signal.getsignal(signal.SIGUSR1)
    toy.fit(12, batches=batches)
    [(folder, steps)] = traced(toy.workdir).items()
    # The signal comes while the batch of update 3 is fetched.
    assert folder == "updates_3_7" and steps == [3, 4, 5, 6, 7]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_trace_that_cannot_be_written_stops_nothing(make_toy, assert_same_bits, caplog):
    toy = make_toy("blocked")
    toy.workdir.mkdir()
    (toy.workdir / "tensorboard").write_text("a file where the folder should be")
    state = toy.fit(6, profile=(2, 3)).state
    assert_same_bits(state, make_toy("plain").fit(6).state)
    assert "no trace of updates is recorded" in caplog.text


@pytest.mark.parametrize("updates", [(0, 3), (5, 4), (1,), 7, (1.0, 2.0), ("a", "b"), (True, 2)])
def test_a_setting_that_is_no_range_is_refused(updates):
    with pytest.raises(UserError, match=r"train.profile is .*such as \(100, 104\)"):
        profiling.checked(updates)
