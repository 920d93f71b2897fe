"""SIGKILL at any moment of saving leaves verified checkpoints only."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from t5like.training import state as state_lib
from t5like.training.checkpoints import Checkpoints, steps_in

SAVING = """
import sys
import numpy as np, optax
from t5like.training import state as state_lib
from t5like.training.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
for step in range(1, 10_000):
    params = {"w": np.random.default_rng(step).normal(size=(300, 1000)).astype("f")}
    state = state_lib.TrainState(step=np.int32(step), params=params, opt_state={})
    checkpoints.save(state, {"step": step}, "config")
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_a_kill_while_saving_leaves_the_checkpoint_before(seed, tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path)], env=env)
    deadline = time.monotonic() + 60
    while len(steps_in(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    seen = steps_in(tmp_path)[-1]
    time.sleep(random.Random(seed).uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {"w": jax.ShapeDtypeStruct((300, 1000), np.float32, sharding=sharding)}
    step = jax.ShapeDtypeStruct((), np.int32, sharding=sharding)
    checkpoints = Checkpoints(tmp_path)
    state, info = checkpoints.restore_latest(state_lib.TrainState(step, params, {}))
    checkpoints.close()
    assert info["step"] == int(state.step) >= seen
    wanted = np.random.default_rng(info["step"]).normal(size=(300, 1000)).astype("f")
    np.testing.assert_array_equal(state.params["w"], wanted)
    assert all(path.name.isdigit() for path in tmp_path.iterdir())
