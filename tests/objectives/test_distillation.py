"""Distillation: known values of its divergence, what reaches whom, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from objectives import heads, heads_distillation, teacher as teacher_lib
from objectives.causal_lm import CausalLM
from objectives.distillation import Distillation
from objectives.heads_distillation import kl_divergence, unit_distance
from objectives.mlm import MaskedLM
from t5like.data.layout import lay_out
from t5like.data.rng import generator
from t5like.errors import UserError
from t5like.models.config import ModelConfig
from t5like.models.flops import forward_flops
from t5like.training.step import total_loss
from tests.launch.runs import fail, metrics, succeed, tiny, write_text

V = 1000


def config(architecture, width=16, layers=1, **changes):
    return ModelConfig(
        architecture=architecture, vocab_size=V, num_layers=layers, d_model=width, d_ff=32,
        num_heads=2, head_dim=8, **changes,
    )  # fmt: skip


def parameters(network, batch, seed):
    """Drawn here: an initialiser takes seconds to compile."""
    shapes = nn.unbox(jax.eval_shape(network.init, {"params": jax.random.key(0)}, batch))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.normal(scale=0.3, size=x.shape)), shapes)


@pytest.fixture(scope="module")
def batches(setting, record):
    """architecture -> (bound student, a batch of it)."""

    def make(student, architecture):
        bound = student.bind(setting(architecture, 32))
        raw = getattr(bound.unit, "raw_length", 32)
        rows = [[bound.corrupt(record(raw, r), generator(r, "x"))] for r in range(3)]
        return bound, lay_out(rows, architecture=architecture, length=32, bos_id=0, pad_id=0)

    return {"encoder": make(MaskedLM(), "encoder"), "decoder": make(CausalLM(), "decoder")}


def taught_by(bound, teacher_config, **fields):
    """A bound Distillation whose teacher is known without any file."""
    wrapped = Distillation(student=bound, teacher_from="unread", **fields)
    wrapped = dataclasses.replace(wrapped, setting=bound.setting)
    wrapped.__dict__["_teacher"] = teacher_lib._Teacher("unread", {}, teacher_config)
    return wrapped


def terms_of(objective, network, params, taught, batch):
    return jax.jit(
        lambda params, taught: objective.losses(
            network.apply, params, taught, batch, jax.random.key(0), True
        )
    )(params, taught)


# --- known values ----------------------------------------------------------------------------


def test_divergence_by_hand():
    student, teacher = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    expected = 0.25 * math.log(0.5) + 0.5 * math.log(2)
    np.testing.assert_allclose(kl_divergence(student, teacher, 1.0), expected, rtol=1e-6)
    # A temperature of 2 takes square roots: 1 : 1 : sqrt(2) against sqrt(2) : 1 : 1.
    p = np.array([1, 1, math.sqrt(2)]) / (2 + math.sqrt(2))
    expected = (p * np.log(p / p[::-1])).sum()
    np.testing.assert_allclose(kl_divergence(student, teacher, 2.0), expected, rtol=1e-5)


def test_hot_divergence_matches_logits():
    """Hinton et al. 2015, section 2.1: the squared distance of centred logits over 2 V."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 50)).astype(np.float32)
    hot = 30.0**2 * kl_divergence(student, teacher, 30.0)
    difference = student - teacher
    limit = ((difference - difference.mean(-1, keepdims=True)) ** 2).mean(-1) / 2
    np.testing.assert_allclose(hot, limit, rtol=0.1)


def test_gradient_of_divergence():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 7)).astype(np.float32)
    for_student, for_teacher = jax.grad(kl_divergence, (0, 1))(student, teacher, 2.0)
    expected = (jax.nn.softmax(student / 2) - jax.nn.softmax(teacher / 2)) / 2
    np.testing.assert_allclose(for_student, expected, atol=1e-6)
    assert not np.asarray(for_teacher).any()


def test_unit_distance():
    a, b = np.array([3.0, 0.0]), np.array([[7.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    np.testing.assert_allclose(unit_distance(a, b), [0, 2, 4], atol=1e-5)


# --- terms of a batch ------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
def test_terms_are_the_students_and_the_divergence(batches, architecture):
    bound, batch = batches[architecture]
    bigger = config(architecture, width=24, layers=2)
    objective = taught_by(bound, bigger, temperature=2.0, weight=0.25)
    network = objective.network(config(architecture))
    params = parameters(network, batch, 0)
    teacher = heads.LanguageModel(bigger)
    taught = parameters(teacher, batch, 1)
    terms = terms_of(objective, network, params, taught, batch)
    alone = terms_of(bound, network, params, None, batch)

    weights = batch[f"{architecture}_loss_weights"]
    logits, soft = (
        np.asarray(jax.jit(n.apply)({"params": p}, batch), np.float64)
        for n, p in ((network, params), (teacher, taught))
    )
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (soft / 2, logits / 2))
    divergence = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(
        terms["distillation"].sum, 4 * (divergence * weights).sum(), rtol=1e-4
    )
    for name, term in alone.items():
        np.testing.assert_allclose(terms[name].sum, term.sum, rtol=1e-5)
        assert terms[name].coefficient == 0.75 * term.coefficient
    assert {name: term.coefficient for name, term in terms.items() if name not in alone} == {
        "distillation": 0.25, "teacher_cross_entropy": 0.0,
    }  # fmt: skip
    assert all(term.weight == weights.sum() for term in terms.values())


def test_logits_of_the_teacher_are_gathered_too(batches):
    bound, batch = batches["encoder"]
    objective = taught_by(bound, config("encoder"))
    network = objective.network(config("encoder"))
    params = parameters(network, batch, 0)
    asked = objective.usual_predictions
    assert asked == bound.usual_predictions < 32

    def loss(params):
        return total_loss(
            objective.losses(network.apply, params, params, batch, jax.random.key(0), True)
        )

    program = str(jax.make_jaxpr(loss)(params))
    assert program.count(f"f32[3,{asked},{V}]") >= 2


def test_equal_models_and_no_gradient_for_the_teacher(batches):
    """With its own parameters as teacher and weight 1, there is nothing to learn."""
    bound, batch = batches["decoder"]
    same = config("decoder")
    objective = taught_by(
        bound, same, weight=1.0, hidden_weight=3.0, hidden_layers=[(0, 0), (1, -1)]
    )
    network = objective.network(same)
    params = parameters(network, batch, 0)

    @jax.jit
    def loss_and_gradients(params, taught):
        def loss(params, taught):
            terms = objective.losses(network.apply, params, taught, batch, jax.random.key(0), True)
            return total_loss(terms), terms

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, taught)

    (loss, terms), (ours, theirs) = loss_and_gradients(params, params)
    assert abs(loss) < 1e-9 and terms["hidden_distance"].coefficient == 3
    np.testing.assert_allclose(
        terms["cross_entropy"].sum, terms["teacher_cross_entropy"].sum, rtol=1e-5
    )
    assert max(np.abs(g).max() for g in jax.tree.leaves(ours)) < 1e-6

    other = parameters(network, batch, 1)
    (loss, _), (ours, theirs) = loss_and_gradients(params, other)
    assert loss > 0.1 and max(np.abs(g).max() for g in jax.tree.leaves(ours)) > 1e-3
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(theirs))


def test_states_of_two_widths_are_compared_through_a_projection(batches):
    bound, batch = batches["encoder"]
    wide = config("encoder", width=24)
    objective = taught_by(bound, wide, hidden_weight=1.0)
    network = objective.network(config("encoder"))
    params = parameters(network, batch, 0)
    assert params["hidden_projection"]["kernel"].shape == (16, 24)
    teacher = heads_distillation.ComparedModel(wide)
    taught = parameters(teacher, batch, 1)
    terms = terms_of(objective, network, params, taught, batch)

    ours, theirs = (
        np.asarray(jax.jit(functools.partial(n.apply, method="hidden"))({"params": p}, batch))
        for n, p in ((network, params), (teacher, taught))
    )
    ours = ours @ params["hidden_projection"]["kernel"]
    cosine = (ours * theirs).sum(-1)
    cosine /= np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    mean = terms["hidden_distance"].sum / terms["hidden_distance"].weight
    np.testing.assert_allclose(mean, (2 - 2 * cosine).mean(), rtol=1e-4)


def test_a_student_learns_a_teacher_faster_than_its_samples():
    """Soft labels say in one example what hard ones say in many (Hinton et al. 2015, section 1).

    One linear layer, 64 inputs, each seen with one label drawn from the teacher.
    """
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(64, 8)).astype(np.float32)
    held_out = rng.normal(size=(256, 8)).astype(np.float32)
    teacher = rng.normal(size=(8, 20)).astype(np.float32)
    labels = np.argmax(inputs @ teacher + rng.gumbel(size=(64, 20)), -1)

    def trained(weight):
        def loss(student):
            logits = inputs @ student
            hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            soft = kl_divergence(logits, inputs @ teacher, 2.0).mean() * 4
            return (1 - weight) * hard + weight * soft

        step = jax.jit(lambda student: student - 0.3 * jax.grad(loss)(student))
        student = jnp.zeros((8, 20))
        for _ in range(200):
            student = step(student)
        return float(kl_divergence(held_out @ student, held_out @ teacher, 1.0).mean())

    hard, mixed, soft = map(trained, (0.0, 0.5, 1.0))
    assert soft < 0.1 and soft < mixed < hard / 3


# --- the objective ---------------------------------------------------------------------------


def test_examples_are_the_students(batches, record):
    bound, _ = batches["encoder"]
    objective = Distillation(student=MaskedLM(), teacher_from="x").bind(bound.setting)
    a, b = (o.corrupt(record(32), generator(1, "y")) for o in (objective, bound))
    assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.weights, b.weights)
    assert (objective.unit, objective.lengths) == (bound.unit, bound.lengths)
    ((_, (component, rate)),) = objective.components().items()
    assert (component, rate) == (bound, 1.0)
    held_out = Distillation(student=MaskedLM(rate=0.3), teacher_from="x").bind(bound.setting)
    assert held_out.evaluation().student.rate == 0.15


def test_flops_count_the_teachers_forward_pass(batches):
    bound, batch = batches["encoder"]
    spec = {name: (array.shape, array.dtype) for name, array in batch.items()}
    student, teacher = config("encoder"), config("encoder", width=64, layers=3)
    expected = bound.train_flops(student, spec)
    expected += forward_flops(teacher, spec, bound.usual_predictions)
    assert taught_by(bound, teacher).train_flops(student, spec) == expected
    projecting = taught_by(bound, teacher, hidden_weight=1.0)
    assert projecting.train_flops(student, spec) == expected + 3 * (2 * 3 * 32 * 16 * 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"student": "MaskedLM"}, "Distillation.student"),
        ({"temperature": 0.0}, "Distillation.temperature is 0.0"),
        ({"weight": 1.5}, "Distillation.weight is 1.5"),
        ({"hidden_layers": [(1, 2, 3)]}, "Distillation.hidden_layers"),
        ({"hidden_layers": []}, "Distillation.hidden_layers"),
    ],
)
def test_refused_fields(fields, message):
    with pytest.raises(UserError, match=message):
        Distillation(**{"student": MaskedLM(), "teacher_from": "x"} | fields)


@pytest.mark.parametrize(
    ("teacher", "info", "fields", "message"),
    [
        (
            {"vocab_size": 1024},
            {},
            {},
            "predicts 1024 ids, the student 1000: set ModelConfig.vocab",
        ),
        ({"architecture": "decoder"}, {}, {}, "architecture 'decoder', the student of 'encoder'"),
        ({}, {"vocabulary": "other"}, {}, "another vocabulary .fingerprint other, now toy.*: bind"),
        ({"position": "learned", "max_length": 16}, {}, {}, "16 tokens, but rows hold 32"),
        ({"num_layers": 3}, {}, {"hidden_layers": [(1, 3), (2, 3)]}, "student has 1 layers"),
        ({}, {}, {"hidden_layers": [(1, -3)]}, "teacher has 1 layers: name 0 to 1"),
    ],
)
def test_teachers_that_cannot_teach_this_student(batches, teacher, info, fields, message):
    bound, _ = batches["encoder"]
    objective = taught_by(bound, None, **fields)
    model = dataclasses.replace(config("encoder"), **teacher)
    objective.__dict__["_teacher"] = teacher_lib._Teacher("runs/big", info, model)
    with pytest.raises(UserError, match=message) as error:
        objective.frozen(config("encoder"))
    assert error.match("teacher_from: runs/big|hidden_layers")


def test_no_teacher_there(batches, tmp_path):
    bound, _ = batches["encoder"]
    objective = Distillation(student=MaskedLM(), teacher_from=str(tmp_path)).bind(bound.setting)
    with pytest.raises(UserError, match="teacher_from: there is no finished checkpoint"):
        objective.frozen(config("encoder"))


# --- from the command line -------------------------------------------------------------------


def test_a_smaller_student_of_a_finished_run(tmp_path):
    text = write_text(tmp_path / "a.txt")
    page = "--gin_file=gin_configs/objectives/{}.gin"

    def arguments(name, objective, *more):
        run = (*tiny(text), page.format(objective), f"--workdir={tmp_path / name}")
        return (*run, "--gin.train.steps=2", *more)

    succeed("train", *arguments("teacher", "causal_lm", "--gin.ModelConfig.num_layers=2"))
    taught = f"--gin.Distillation.teacher_from='{tmp_path / 'teacher'}'"
    student = arguments("student", "distillation_causal_lm", taught)
    succeed("train", *student, "--gin.ModelConfig.d_model=16")
    last = metrics(tmp_path / "student")[-1]
    loss = 0.5 * (last["cross_entropy"] + last["z_loss"] + last["distillation"])
    assert last["loss"] == pytest.approx(loss) and last["distillation"] > 0
    # It has learned something, and is read with the depth that its own run recorded.
    assert last["teacher_cross_entropy"] < metrics(tmp_path / "teacher")[0]["cross_entropy"]

    other = arguments("other", "distillation", taught)
    assert "is of architecture 'decoder', the student of 'encoder'" in fail("train", *other)
