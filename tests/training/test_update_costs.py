"""What an update must not cost: a second copy of the state, a wait for a save, a failed option."""

import threading

import jax
import pytest

from t5like.errors import UserError
from t5like.training import compiling, manifest, optimizers, state as state_lib, step as step_lib
from t5like.training.checkpoints import steps_in


def test_an_update_takes_over_the_states_memory(toy_parts):
    optimizer = optimizers.AdamW()
    transform = optimizer.build(10)
    update = step_lib.make_train_step(toy_parts.loss_fn, transform, optimizer.schedule(10))
    before = state_lib.create(toy_parts.init(jax.random.key(0)), transform)
    after, _ = update(before, toy_parts.batch_of(0), step_lib.run_key(0, step_lib.STEP_STREAM))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_updates_go_on_while_a_checkpoint_is_written(toy, toy_parts, monkeypatch):
    go_on, finished, write = threading.Event(), [], manifest.write

    def held_back(*arguments):
        assert go_on.wait(60), "the updates waited for the save"
        write(*arguments)

    def batches(start):
        for step, batch in toy_parts.batches(start):
            if step == 5:  # The save after update 3 has begun, and cannot end before this.
                finished.append(steps_in(toy.workdir / "checkpoints"))
                go_on.set()
            yield step, batch

    monkeypatch.setattr(manifest, "write", held_back)
    toy.fit(6, batches=batches)
    assert finished == [[]] and steps_in(toy.workdir / "checkpoints") == [3, 6]


def test_unknown_compiler_options_are_named_and_left_out(toy, make_toy, assert_same_bits, caplog):
    options = {"xla_tpu_overlap_compute_collective_tc": True, "xla_no_such_option": 3}
    state = toy.fit(2, compiler_options=options).state
    assert_same_bits(state, make_toy("plain").fit(2).state)
    assert "xla_tpu_overlap_compute_collective_tc, xla_no_such_option" in caplog.text


def test_a_known_compiler_option_with_a_wrong_value_is_refused():
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    with pytest.raises(UserError, match=r"train.compiler_options\['xla_cpu_enable_fast_math'\]"):
        compiling.compile_with(lowered, {"xla_cpu_enable_fast_math": "perhaps"})
