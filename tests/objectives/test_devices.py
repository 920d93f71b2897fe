"""Losses that sample within a step, or compare members, are the same on one device and on four."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np

from objectives.base import Setting
from objectives.electra import Electra
from objectives.ernie_gram import ErnieGram
from objectives.prop import PROP
from t5like.data.examples import Record
from t5like.data.layout import lay_out
from t5like.data.rng import generator
from t5like.models.config import ModelConfig
from t5like.training.sharding import Sharding, put_replicated
from tests import many_devices
from tests.objectives.toy_corpus import VOCABULARY, toy_corpus

OBJECTIVES = {
    "Electra": Electra(),
    "PROP": PROP(max_set_tokens=4),
    "ErnieGram": ErnieGram(bigrams=50, trigrams=10, min_count=1),
}
LENGTH, ROWS = 32, 8


def terms_on(objective, devices):
    """{name: (sum, weight)} of one batch, over so many devices."""
    corpus = toy_corpus()
    bound = objective.bind(Setting("encoder", VOCABULARY, LENGTH, corpus=corpus))
    records = (corpus.record(i) for i in range(ROWS))
    short = (Record(r.tokens[:20], r.documents[:20]) for r in records)
    batch = lay_out(
        [[bound.corrupt(record, generator(0, "x", i))] for i, record in enumerate(short)],
        architecture="encoder", length=LENGTH, bos_id=0, pad_id=0,
        features=bound.features, members=bound.members,
    )  # fmt: skip
    config = ModelConfig(
        architecture="encoder", vocab_size=1024, num_layers=1, d_model=16, d_ff=32, num_heads=2,
        head_dim=8,
    )  # fmt: skip
    network = bound.network(config)
    shapes = nn.unbox(jax.eval_shape(network.init, {"params": jax.random.key(0)}, batch))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(scale=0.3, size=x.shape)), shapes)

    def losses(params, batch, key):
        terms = bound.losses(network.apply, params, None, batch, key, False)
        return {name: (term.sum, term.weight) for name, term in terms.items()}

    sharding = Sharding()
    mesh = sharding.mesh(jax.devices()[:devices])
    with sharding.in_force(mesh):
        put = sharding.put_batch(mesh, batch)
        assert put["encoder_input_tokens"].addressable_shards[0].data.shape[0] == ROWS // devices
        inputs = put_replicated((params, jax.random.key(3)), mesh)
        quick = {"xla_backend_optimization_level": 0}
        return jax.device_get(jax.jit(losses, compiler_options=quick)(inputs[0], put, inputs[1]))


def compare():
    assert jax.device_count() == 4
    for name, objective in OBJECTIVES.items():
        one, four = (terms_on(objective, devices) for devices in (1, 4))
        for term, values in one.items():
            assert np.isfinite(values).all() and values[1] > 0
            np.testing.assert_allclose(four[term], values, rtol=1e-5, err_msg=f"{name}: {term}")
        print(name, *one)


def test_one_device_equals_four():
    run = many_devices.run(4, __file__)
    assert run.returncode == 0, run.stderr
    said = {name: terms for name, *terms in map(str.split, run.stdout.splitlines())}
    assert said.keys() == OBJECTIVES.keys()
    assert "replaced_fraction" in said["Electra"] and "ranking" in said["PROP"]
    assert {"replaced_fraction", "fine_cross_entropy"} <= set(said["ErnieGram"])


if __name__ == "__main__":
    compare()
