"""Runs of several objectives: phases and mixtures, from the pages to the checkpoints."""

import dataclasses
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import assemble, config as config_lib, networks, training
from t5like.data.plans import PlannedBatches
from t5like.errors import UserError
from t5like.training.budget import Budget
from t5like.training.state import Frozen
from t5like.training.tracks import spent
from tests.launch.runs import ROOT, environment, metrics, tiny, write_text
from tests.launch.test_train import arrays, same_run

BIPHASIC = "--gin_file=gin_configs/objectives/biphasic.gin"
MIXTURE = "--gin_file=gin_configs/objectives/mixture.gin"


def pages_and_bindings(flags):
    """Command-line flags as `config.load` and `training.train` take them."""
    pages = [flag.partition("=")[2] for flag in flags if flag.startswith("--gin_file")]
    bindings = [f[len("--gin.") :].replace("=", " = ", 1) for f in flags if f.startswith("--gin.")]
    return pages, bindings


def train(flags, workdir) -> None:
    """launch/train.py without a process of its own."""
    assert training.train(*pages_and_bindings(flags), str(workdir)) == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags of tiny runs of 8 steps over one text, with one cache."""
    home = tmp_path_factory.mktemp("tracks")
    text = write_text(home / "text.txt", 3000)
    return [
        *tiny(text), f"--gin.train.cache_dir='{home / 'cache'}'", "--gin.train.steps=8",
        "--gin.train.batch_hashes=True", "--gin.train.checkpoint_every_steps=1",
        "--gin.train.keep=20", "--gin.WarmupStableDecay.warmup=2",
        "--gin.WarmupStableDecay.decay=0.25", "--gin.WarmupStableDecay.peak=0.01",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def biphasic(base, tmp_path_factory):
    """Flags and workdir of an undisturbed run: 4 causal steps, 4 masked ones, evaluated."""
    workdir = tmp_path_factory.mktemp("biphasic")
    flags = [*base, BIPHASIC, "--gin.Phases.until=[0.5]"]
    source = next(flag for flag in base if "TextSource.paths" in flag).partition("=")[2]
    evals = [
        "--gin.train.evals={'held': @held/TextSource()}", f"--gin.held/TextSource.paths={source}",
        "--gin.train.eval_every=2", "--gin.train.eval_batches=1",
        "--gin.train.keep_best='held/MaskedLM'",
    ]  # fmt: skip
    train([*flags, *evals], workdir)
    return flags, workdir


def assembled(flags):
    run = config_lib.load(*pages_and_bindings(flags)).run
    return run, assemble.assemble_data(run, None, progress=False)


# --- the run ---------------------------------------------------------------------------------


def test_the_phases_log_their_own_terms_at_one_schedule(biphasic):
    _, workdir = biphasic
    lines = metrics(workdir)
    phase = ["CausalLM" if "CausalLM/loss" in line else "MaskedLM" for line in lines]
    assert phase == ["CausalLM"] * 4 + ["MaskedLM"] * 4
    for line, name in zip(lines, phase, strict=True):
        assert line["loss"] == line[f"{name}/loss"]
    rates = [line["learning_rate"] for line in lines]
    np.testing.assert_allclose(rates, [0.005, *[0.01] * 6, 0.005], rtol=1e-6)
    assert [m["step"] for m in metrics(workdir, "held/CausalLM")] == [2, 4]
    assert [m["step"] for m in metrics(workdir, "held/MaskedLM")] == [6, 8]


def test_the_switch_changes_neither_parameters_nor_the_optimisers_state(biphasic, tmp_path):
    """The causal phase alone, under the whole run's schedule, ends at what the masked one gets."""
    flags, workdir = biphasic
    train([*flags, "--gin.Phases.until=[100]", "--gin.train.steps=8"], tmp_path)
    alone, before = arrays(tmp_path, 4), arrays(workdir, 4)
    assert alone.keys() == before.keys()
    for name in alone:
        np.testing.assert_array_equal(alone[name], before[name], str(name))
    first, second = (metrics(w)[4] for w in (workdir, tmp_path))
    assert "MaskedLM/loss" in first and "CausalLM/loss" in second


KILLED = """
import os, signal, sys
from launch import training
load, when = training.load, int(sys.argv[1])

def killing(batches, start, **kwargs):
    for step, batch in load(batches, start, **kwargs):
        if step == when:
            os.kill(os.getpid(), signal.SIGKILL)
        yield step, batch

training.load = killing
pages, bindings, workdir = eval(sys.argv[2])
training.train(pages, bindings, workdir)
"""


def test_killed_in_both_phases_it_resumes_to_the_same_bits(biphasic, tmp_path):
    flags, straight = biphasic
    arguments = repr((*pages_and_bindings(flags), str(tmp_path)))
    for when in (3, 6):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(when), arguments], env=environment(), cwd=ROOT,
            capture_output=True, text=True,
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    train(flags, tmp_path)
    same_run(tmp_path, straight, 8)


def test_a_mixture_trains_each_of_its_objectives_at_its_rate(base, tmp_path):
    flags = [*base, MIXTURE, "--gin.train.log_every=8"]
    train(flags, tmp_path)
    run, data = assembled(flags)
    counts = data.objective.plan(8, run.seed).counts(8)
    [line] = metrics(tmp_path)
    losses = [line[f"{name}/loss"] for name in ("clm", "mlm")]
    mean = np.dot(losses, [counts["clm"], counts["mlm"]]) / 8
    assert min(counts.values()) > 0 and line["loss"] == pytest.approx(mean)


def test_continued_pretraining_from_another_objectives_checkpoint(base, biphasic, tmp_path):
    """A decoder trained as a causal model goes on as a masked one, by the names of its backbone."""
    _, causal = biphasic
    train(
        [
            *base, "--gin_file=gin_configs/objectives/mlm.gin",
            "--gin.ModelConfig.architecture='decoder'",
            "--gin.ModelConfig.relative_bidirectional=True", "--gin.train.steps=1",
            f"--gin.train.init_from='{causal / 'checkpoints' / '4'}'",
            "--gin.train.init_prefixes=['model/']", "--gin.WarmupStableDecay.peak=0.0",
        ],
        tmp_path,
    )  # fmt: skip
    taken, given = arrays(tmp_path, 1), arrays(causal, 4)
    names = [name for name in given if name[0] == "params"]
    assert len(names) > 10
    for name in names:
        np.testing.assert_array_equal(taken[name], given[name])
    assert np.isfinite(metrics(tmp_path)[0]["loss"])


def test_a_best_checkpoint_needs_a_split_that_there_is(base, tmp_path):
    flags = [
        *base, BIPHASIC, "--gin.train.evals={'held': @TextSource()}",
        "--gin.train.keep_best='held'",
    ]  # fmt: skip
    with pytest.raises(UserError, match="'held' is no eval .* it has held/CausalLM, held/MaskedLM"):
        training.train(*pages_and_bindings(flags), str(tmp_path))


# --- its parts -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(biphasic):
    """(run, data, networks, parameters) of the biphasic run, not trained."""
    run, data = assembled(biphasic[0])
    found = networks.assemble_networks(data)
    return run, data, found, networks.union_of(found)(jax.random.key(0))


def test_every_track_has_a_pipeline_and_all_share_the_order_of_the_corpus(parts):
    _, data, _, _ = parts
    assert list(data.pipelines) == list(data.tracks) == ["CausalLM", "MaskedLM"]
    assert data.pipeline is data.pipelines["CausalLM"]
    names, orders = zip(
        *((c.name, c.order) for p in data.pipelines.values() for c in p.components), strict=True
    )
    assert len(set(names)) == 2 and len(set(orders)) == 1 and None not in orders


def test_labels_are_shifted_before_the_switch_and_unshifted_after(parts):
    run, data, _, _ = parts
    batches = PlannedBatches(data.pipelines, data.objective.plan(8, run.seed))
    causal, masked = batches.batch(3), batches.batch(4)
    np.testing.assert_array_equal(
        causal["decoder_target_tokens"][:, :-1], causal["decoder_input_tokens"][:, 1:]
    )
    seen, said = masked["decoder_input_tokens"], masked["decoder_target_tokens"]
    hidden = masked["decoder_loss_weights"] > 0
    assert 0.2 < hidden.mean() < 0.6
    assert (seen[hidden] == data.vocabulary.mask_id).all()
    np.testing.assert_array_equal(seen[~hidden], said[~hidden])


def test_nothing_leaks_from_the_right_before_the_switch_and_all_is_seen_after(parts):
    _, data, found, params = parts
    for name, leaks in (("CausalLM", False), ("MaskedLM", True)):
        batch = data.pipelines[name].batch(0)
        changed = {k: v.copy() for k, v in batch.items()}
        changed["decoder_input_tokens"][:, 40] += 1
        apply = jax.jit(found[name].module.apply)
        logits, other = (apply({"params": params}, b) for b in (batch, changed))
        assert bool(jnp.any(logits[:, :40] != other[:, :40])) == leaks
        assert jnp.any(logits[:, 40:] != other[:, 40:])


def test_the_tokens_of_a_budget_do_not_depend_on_the_split(biphasic):
    flags, _ = biphasic
    seen = set()
    for until in ("[0.25]", "[0.5]", "[0.75]"):
        run, data = assembled([*flags, f"--gin.Phases.until={until}"])
        found = networks.assemble_networks(data)
        tracks = {name: training.make_track(data, found, name) for name in found}

        def cost(steps, data=data, tracks=tracks):
            return spent(tracks, data.objective.plan(steps, 0).counts(steps))

        total = Budget(tokens=100_000).total_steps(cost)
        seen.add((total, cost(total)[0]))
        # Of FLOPs a split may have more than another: logits of masked positions alone.
        by_flops = Budget(flops=1e12).total_steps(cost)
        assert cost(by_flops - 1)[1] < 1e12 <= cost(by_flops)[1]
    assert len(seen) == 1


def test_the_first_parameters_are_those_of_each_network_alone(parts):
    _, _, found, params = parts
    key = jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, found["MaskedLM"].init(key), params)
    headed = with_head(found["CausalLM"], 3)
    union = networks.union_of({"headed": headed, "CausalLM": found["CausalLM"]})(key)
    own = jax.jit(headed.init)(key)
    assert union.keys() == own.keys() == {"model", "head"}
    jax.tree.map(np.testing.assert_array_equal, union, own)
    jax.tree.map(np.testing.assert_array_equal, union["model"], params["model"])


def with_head(network, width):
    """The network with a head of so many outputs beside its backbone."""

    def init(key):
        head = nn.Dense(width).init(jax.random.fold_in(key, 1), jnp.ones((1, 8)))["params"]
        return {"model": network.init(key)["model"], "head": head}

    return dataclasses.replace(network, init=init)


def test_networks_that_disagree_about_a_parameter_are_refused(parts):
    _, _, found, _ = parts
    heads = {name: with_head(found["CausalLM"], width) for name, width in (("a", 3), ("b", 4))}
    with pytest.raises(UserError, match="'a' and 'b' both have a parameter head/bias, .* \\[3\\]"):
        networks.union_of(heads)


def test_each_track_reads_its_own_frozen_trees(parts):
    @dataclasses.dataclass
    class Taught:
        tree: object

        def frozen(self, config):
            return None if self.tree is None else Frozen.of(self.tree)

    _, data, found, _ = parts

    def frozen(**trees):
        """What a run of tracks with such trees has, read to this device."""
        tracks = {name: Taught(tree) for name, tree in trees.items()}
        made = networks.assemble_frozen(dataclasses.replace(data, tracks=tracks))
        if made is None:
            return None
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
        return made.read(jax.tree.map(placed, made.shapes))

    teacher = {"teacher": np.float32(1)}
    assert frozen(a=teacher) == teacher
    assert frozen(a=None) is None and frozen(a=None, b=None) is None
    both = frozen(CausalLM=None, MaskedLM=teacher)
    reading = {
        name: dataclasses.replace(network, loss=lambda params, frozen, *rest: frozen)
        for name, network in found.items()
    }
    seen = {n: training.make_track(data, reading, n).loss_fn({}, both) for n in found}
    assert seen == {"CausalLM": None, "MaskedLM": teacher}
