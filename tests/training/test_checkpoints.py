"""Checkpoints are complete or do not count, come back bit by bit, and fail loudly."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from t5like.errors import UserError
from t5like.training import manifest, optimizers, state as state_lib
from t5like.training.checkpoints import Checkpoints
from t5like.training.init_from import InitFrom, find, restore_params

TRANSFORM = optimizers.AdamW().build(10)


def make_state(step=0, size=8):
    rng = np.random.default_rng(step)
    params = {
        "model": {"kernel": jnp.asarray(rng.normal(size=(size, 8)), jnp.float32)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(8, 8)), jnp.bfloat16)},
    }
    state = state_lib.create(params, TRANSFORM)
    _, opt_state = TRANSFORM.update(params, state.opt_state, params)
    return state.replace(step=jnp.int32(step), opt_state=opt_state)


def template_of(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def save_all(directory, steps, metrics=None, **kwargs):
    checkpoints = Checkpoints(directory, **kwargs)
    for step in steps:
        info = {"step": step, "metrics": (metrics or {}).get(step, {})}
        checkpoints.save(make_state(step), info, f"text of {step}")
    checkpoints.close()


def restore(directory, template=None):
    checkpoints = Checkpoints(directory)
    try:
        return checkpoints.restore_latest(template or template_of(make_state()))
    finally:
        checkpoints.close()


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_round_trip_is_exact(tmp_path, assert_same_bits):
    save_all(tmp_path, [3])
    state, info = restore(tmp_path)
    assert_same_bits(state, make_state(3))
    assert info["step"] == 3
    assert (tmp_path / "3" / "config.gin").read_text() == "text of 3"


@pytest.mark.parametrize("cls", [optimizers.Adafactor, optimizers.Lion, optimizers.Muon])
def test_every_optimizers_state_comes_back(cls, tmp_path, assert_same_bits):
    params = {"layer": {"kernel": np.ones((130, 140), "f"), "bias": np.ones(140, "f")}}
    transform = cls().build(10)
    state = jax.jit(lambda p: state_lib.create(p, transform))(params)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"step": 0}, "")
    assert_same_bits(checkpoints.restore_latest(template_of(state))[0], state)
    checkpoints.close()


def test_frozen_trees_are_saved(tmp_path, assert_same_bits):
    state = make_state(1).replace(frozen={"teacher": jnp.arange(4.0)})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"step": 1}, "")
    assert_same_bits(checkpoints.restore_latest(template_of(state))[0], state)
    checkpoints.close()


def test_a_save_under_way_does_not_see_later_updates(tmp_path, assert_same_bits):
    state = make_state(1, size=200_000)
    wanted = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"step": 1}, "")
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    restored, _ = checkpoints.restore_latest(template_of(make_state(size=200_000)))
    checkpoints.close()
    assert_same_bits(restored, wanted)


def test_the_newest_and_the_best_are_kept(tmp_path):
    metrics = {1: {"val/loss": 3.0}, 2: {"val/loss": 1.0}, 3: {}, 4: {"val/loss": np.nan}}
    save_all(tmp_path, [1, 2, 3, 4, 5], metrics, keep=2, best_metric="val/loss")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4", "5"]


def test_an_empty_folder_restores_nothing(tmp_path):
    assert restore(tmp_path / "new") is None


def test_an_unfinished_save_does_not_count(tmp_path):
    save_all(tmp_path, [1, 2])
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "0.deleted").mkdir()
    assert restore(tmp_path)[1]["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]


def truncate(folder):
    data = largest_file(folder)
    data.write_bytes(data.read_bytes()[:-7])


def flip(folder):
    data = largest_file(folder)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def lose_chunk(folder):
    largest_file(folder).unlink()


def lose_arrays_metadata(folder):
    (folder / "_METADATA").unlink()


def lose_manifest(folder):
    (folder / manifest.NAME).unlink()


def cut_manifest(folder):
    text = (folder / manifest.NAME).read_text()
    (folder / manifest.NAME).write_text(text[: len(text) // 2])


DAMAGES = [truncate, flip, lose_chunk, lose_arrays_metadata, lose_manifest, cut_manifest]


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_all(folder, [1, 2])
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_reported_and_the_one_before_is_used(
    damage, two_saved, tmp_path, assert_same_bits, caplog
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    damage(folder / "2")
    state, _ = restore(folder)
    assert_same_bits(state, make_state(1))
    assert f"checkpoint {folder / '2'} is damaged" in caplog.text
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2.damaged"]
    save_all(folder, [2])
    assert restore(folder)[1]["step"] == 2


def test_only_damaged_checkpoints_are_an_error_and_stay_where_they_are(two_saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    truncate(folder / "2")
    lose_manifest(folder / "1")
    with pytest.raises(UserError, match="all of 2 are damaged"):
        restore(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


def test_another_models_checkpoint_is_refused_by_name(two_saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    with pytest.raises(UserError, match=r"params/model/kernel is float32\[8, 8\] there and"):
        restore(folder, template_of(make_state(size=9)))
    smaller = make_state()
    smaller = smaller.replace(params={"model": smaller.params["model"]})
    with pytest.raises(UserError, match="it has, and the model lacks, params/head/kernel"):
        restore(folder, template_of(smaller))
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_path_and_loses_nothing(
    error, tmp_path, monkeypatch, assert_same_bits
):
    save_all(tmp_path, [1])
    checkpoints = Checkpoints(tmp_path)

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", fail)
        checkpoints.save(make_state(2), {"step": 2}, "")
        with pytest.raises(UserError, match="disk is full") as raised:
            checkpoints.wait()
    checkpoints.close()
    assert str(tmp_path) in str(raised.value)
    assert_same_bits(restore(tmp_path)[0], make_state(1))


# --- init_from -------------------------------------------------------------------------------


def test_parameters_of_another_run_by_name(two_saved, assert_same_bits):
    template = template_of(make_state()).params
    for path in (two_saved, two_saved / "2"):
        assert_same_bits(restore_params(path, template), make_state(2).params)
    assert_same_bits(restore_params(two_saved / "1", template), make_state(1).params)


def test_prefixes_leave_the_rest_fresh(two_saved, assert_same_bits):
    fresh = make_state(7).params
    fresh["new_head"] = {"kernel": jnp.ones(3)}
    taken = restore_params(two_saved, template_of(fresh), ("model/",), fresh)
    assert_same_bits(taken["model"], make_state(2).params["model"])
    assert_same_bits({**taken, "model": 0}, {**fresh, "model": 0})


def test_strict_names_what_is_missing_and_what_is_too_much(two_saved):
    params = make_state().params
    params["extra"] = params.pop("head")
    with pytest.raises(UserError) as raised:
        restore_params(two_saved, template_of(params))
    assert "it lacks extra/kernel" in str(raised.value)
    assert "the model lacks, head/kernel" in str(raised.value)


def test_a_parameter_of_another_shape_is_named_under_a_prefix_too(two_saved):
    params = make_state(size=9).params
    with pytest.raises(UserError, match="model/kernel is"):
        restore_params(two_saved, template_of(params), ("model",), params)


def test_a_prefix_that_matches_nothing_is_an_error(two_saved):
    params = make_state().params
    with pytest.raises(UserError, match="starts with 'modle/'"):
        restore_params(two_saved, template_of(params), ("modle/",), params)


def test_nothing_to_start_from_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint"):
        restore_params(tmp_path, template_of(make_state()).params)


def test_optimizer_and_step_are_reset_unless_asked(two_saved, assert_same_bits):
    fresh = make_state(0)
    template = template_of(fresh)
    reset = InitFrom(str(two_saved)).apply(fresh, template)
    assert_same_bits((reset.step, reset.opt_state), (fresh.step, fresh.opt_state))
    assert_same_bits(reset.params, make_state(2).params)
    whole = InitFrom(str(two_saved), keep_optimizer=True).apply(fresh, template)
    assert_same_bits(whole, make_state(2))
    with pytest.raises(UserError, match="train.init_reset.*train.init_prefixes"):
        InitFrom(str(two_saved), ("model",), keep_optimizer=True).apply(fresh, template)


def test_another_vocabulary_is_refused_unless_prefixes_choose(two_saved):
    path, info = find(two_saved)
    (path / manifest.NAME).write_text(json.dumps({**info, "vocabulary": "theirs"}))
    fresh = make_state(0)
    template = template_of(fresh)
    with pytest.raises(UserError, match="theirs.*ours"):
        InitFrom(str(two_saved)).apply(fresh, template, "ours")
    InitFrom(str(two_saved)).apply(fresh, template, "theirs")
    InitFrom(str(two_saved), ("model",)).apply(fresh, template, "ours")


def test_leftovers_that_cannot_be_removed_are_an_error_that_names_the_path(tmp_path, monkeypatch):
    def refuse(self, missing_ok=False):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "3.deleted").mkdir()
    monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", refuse)
    with pytest.raises(UserError, match=str(tmp_path)):
        Checkpoints(tmp_path)


def test_a_damaged_checkpoint_that_cannot_be_renamed_is_named(tmp_path, monkeypatch):
    save_all(tmp_path, [1, 2])
    (tmp_path / "2" / manifest.NAME).unlink()
    checkpoints = Checkpoints(tmp_path)

    def refuse(self, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(checkpoints.directory), "rename", refuse)
    with pytest.raises(UserError, match=str(tmp_path / "2")):
        checkpoints.restore_latest(template_of(make_state()))
    checkpoints.close()


def test_metrics_found_later_are_added_and_the_checkpoint_stays_good(tmp_path):
    save_all(tmp_path, [2])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.add_metrics(2, {"held_out/loss": 0.5})
    checkpoints.close()
    assert manifest.verify(tmp_path / "2")["metrics"]["held_out/loss"] == 0.5


def test_the_manifest_lists_arrays_for_people_and_tools(two_saved):
    info = json.loads((two_saved / "2" / manifest.NAME).read_text())
    assert info["arrays"]["params/head/kernel"] == [[8, 8], "bfloat16"]
