"""Who the processes of a run are, by flags and surroundings, and what they agree upon."""

import importlib.util
import os
import random
import threading
import time

import pytest

from t5like.errors import UserError
from t5like.training import distributed
from t5like.training.lifeline import Hub, Lifeline

LAUNCHERS = ("SLURM_", "OMPI_", "JAX_COORD", "KUBERNETES_", "TPU_", "MEGASCALE_", "CUDA_VISIBLE")


@pytest.fixture
def around(monkeypatch):
    """Sets the surroundings of a launcher, and no other's."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def place(*given):
    return distributed._given(*(given or (None,) * 3), timeout=1)


def slurm(tasks="8", per_node="4(x2)", task="6", node="1", local="2"):
    return {
        "SLURM_JOB_ID": "1234",
        "SLURM_STEP_NODELIST": "node[007-008],other3",
        "SLURM_NTASKS": tasks,
        "SLURM_PROCID": task,
        "SLURM_LOCALID": local,
        "SLURM_NODEID": node,
        "SLURM_STEP_TASKS_PER_NODE": per_node,
    }


def test_a_laptop_is_one_process(around):
    assert place() is None
    distributed.initialize()
    assert distributed.process_count() == 1 and distributed.process_index() == 0
    assert distributed.gather("anything", 7) == [7]


def test_slurm_is_detected(around):
    around(**slurm())
    found = place()
    host, port = found.coordinator.split(":")
    assert (host, found.count, found.process, found.devices) == ("node007", 8, 6, (2,))
    assert 1024 < int(port) < 65536


@pytest.mark.parametrize(
    "changes, devices",
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),  # Slurm has shared them out.
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,1,3"}, None),  # Alone on its node: all devices.
    ],
)
def test_each_process_has_its_devices(around, changes, devices):
    around(**{**slurm(), **changes})
    assert place().devices == devices


def test_one_task_of_slurm_is_one_process(around):
    around(**slurm(tasks="1", per_node="1", task="0", node="0", local="0"))
    assert place() is None


def test_open_mpi_is_detected(around):
    around(
        OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
        OMPI_COMM_WORLD_SIZE="4",
        OMPI_COMM_WORLD_RANK="3",
        OMPI_COMM_WORLD_LOCAL_RANK="1",
        OMPI_COMM_WORLD_LOCAL_SIZE="2",
    )
    found = place()
    assert found.coordinator.startswith("10.96.0.1:")
    assert (found.count, found.process, found.devices) == (4, 3, (1,))


def test_flags_come_before_what_is_detected(around):
    around(**slurm())
    assert place("here:1234", 2, 1) == distributed.Place("here:1234", 2, 1)
    assert place(None, 1, None) is None


@pytest.mark.parametrize(
    "given, message",
    [
        (("here:1234", 2, None), "--process_id missing"),
        ((None, None, 1), "--coordinator and --num_processes missing"),
        (("here", 2, 0), "names no port"),
        (("here:1234", 2, 2), "numbered from 0"),
        (("here:1234", 0, 0), "numbered from 0"),
    ],
)
def test_flags_that_do_not_fit_together_are_told(given, message):
    with pytest.raises(UserError, match=message):
        place(*given)


@pytest.mark.skipif(importlib.util.find_spec("kubernetes") is not None, reason="it would be asked")
def test_a_pod_of_an_indexed_job_never_trains_alone_by_mistake(around):
    around(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="1")
    with pytest.raises(UserError, match="indexed Job"):
        place()


@pytest.mark.parametrize("seed", range(3))
def test_all_processes_stop_at_the_same_check(seed):
    """However fast each is, and whichever and however many of them ask for it."""
    count, rng = 4, random.Random(seed)
    hub = Hub(count)
    hub.start()
    lines = [
        Lifeline(("localhost", hub.port), hub.token, i, count, "here", hub if i == 0 else None)
        for i in range(count)
    ]
    for line in lines:
        line.start()
    stopped, saved = {}, {i: [] for i in range(count)}

    def work(i: int, pauses: random.Random, at: int | None) -> None:
        for check in range(1, 2000):
            if check == at:
                lines[i].wanted["stop"] = True
            if i == 0 and check % 40 == 0:
                lines[i].wanted["save"] = True
            if lines[i].agreements["save"].check():
                saved[i].append(check)
            if lines[i].agreements["stop"].check():
                stopped[i] = check
                return
            time.sleep(pauses.random() * 0.004)

    asking = {i: rng.randrange(100, 200) for i in rng.sample(range(count), rng.randrange(1, 4))}
    threads = [
        threading.Thread(target=work, args=(i, random.Random(rng.random()), asking.get(i)))
        for i in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for line in lines:
        line.leave()
    assert len(stopped) == count and len(set(stopped.values())) == 1
    assert min(asking.values()) < stopped[0]
    assert saved[0] and all(saves == saved[0] for saves in saved.values())
