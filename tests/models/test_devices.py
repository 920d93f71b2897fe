"""Long rows on four devices: each computes its own rows, whatever the backend's loops look like."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import dataclasses
import jax, numpy as np
from kernels import masks
from t5like.models.config import ModelConfig
from t5like.models.transformer import Transformer, init_parameters
from t5like.training.mesh import make_mesh, over_data, put_batch, put_replicated

assert jax.device_count() == 4
config = ModelConfig(
    architecture="encoder", vocab_size=32, num_layers=1, d_model=16, d_ff=16, num_heads=2,
    head_dim=8, attention_pattern=masks.SlidingWindow(64, 64) | masks.GlobalTokens(count=1),
)
params = init_parameters(config, jax.random.key(0))
tokens = np.random.default_rng(0).integers(0, 32, (4, 600)).astype(np.int32)
segments = 1 + (np.arange(600) > 250 + 50 * np.arange(4)[:, None])
positions = np.where(segments == 1, np.arange(600), np.arange(600) - 251)
batch = {"encoder_input_tokens": tokens, "encoder_segment_ids": segments.astype(np.int32),
         "encoder_positions": positions.astype(np.int32)}

def loss(params, batch):
    return (Transformer(config).apply({"params": params}, batch) ** 2).mean()

def both(mesh):
    with jax.set_mesh(mesh):
        arguments = put_replicated(params, mesh), put_batch(batch, mesh)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
        return compiled.as_text(), jax.device_get(compiled(*arguments))

_, one = both(make_mesh(jax.devices()[:1]))
text, four = both(make_mesh())
assert "all-gather" not in text and "all-reduce" in text
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
print("same")
"""


def test_four_devices_compute_their_own_rows():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout == "same\n"
