"""Where devices stand in a mesh: hosts of GPUs, slices of TPUs, one slice of any shape."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from t5like.errors import UserError
from t5like.training.device_grid import device_grid
from t5like.training.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Device:
    """What jax says of a device, as far as the order of a mesh depends on it."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def gpus(hosts: int, each: int) -> list[Device]:
    return [Device(each * host + i, host, host) for host in range(hosts) for i in range(each)]


def tpus(slices: int, shape: tuple[int, int, int]) -> list[Device]:
    places = list(itertools.product(*map(range, shape)))
    return [
        Device(len(places) * number + i, number, number, "tpu", "TPU v5", place)
        for number in range(slices)
        for i, place in enumerate(places)
    ]


def sizes(devices: int, **axes) -> tuple[int, ...]:
    return Sharding(**axes)._sizes(devices)


@pytest.mark.parametrize("replica", [1, 2, 4])
def test_tensor_and_sequence_stay_within_a_host_of_gpus(replica):
    devices = gpus(4, 8)
    shape = sizes(32, replica=replica, data=1, fsdp=-1, sequence=2, tensor=4)
    shuffled = [devices[i] for i in np.random.default_rng(0).permutation(32)]
    grid = device_grid(shape, shuffled)
    assert grid.shape == shape and set(grid.flat) == set(devices)
    hosts = np.vectorize(lambda device: device.process_index)(grid)
    assert (hosts == hosts[..., :1, :1]).all()
    assert (np.diff(hosts[..., 0, 0].ravel()) >= 0).all()


def test_processes_of_one_gpu_are_kept_by_host():
    """Numbered in turn over two hosts, as Slurm's cyclic distribution does."""
    devices = [Device(i, i, slice_index=i % 2) for i in range(8)]
    grid = device_grid(sizes(8, tensor=4), devices)
    hosts = np.vectorize(lambda device: device.slice_index)(grid).reshape(2, 4)
    assert hosts.tolist() == [[0] * 4, [1] * 4]


def test_slices_of_tpus_meet_along_replica_only():
    grid = device_grid(sizes(32, replica=4, data=1, fsdp=-1, tensor=2), tpus(2, (2, 2, 4)))
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    assert [set(part.flat) for part in slices] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize("replica", [1, 3])
def test_a_replica_that_slices_do_not_divide_is_told(replica):
    with pytest.raises(UserError, match=f"replica={replica} .*2 slices.*multiple of 2"):
        device_grid(sizes(24, replica=replica), tpus(2, (2, 2, 3)))


def test_an_axis_may_be_a_part_of_a_dimension_of_the_torus():
    devices = tpus(1, (4, 4, 4))
    grid = device_grid(sizes(64, data=1, fsdp=32, tensor=2), devices)
    assert grid.shape == (1, 1, 32, 1, 2) and set(grid.flat) == set(devices)
    pairs = grid.reshape(32, 2)
    apart = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in pairs]
    assert set(apart) == {1}


def test_a_part_of_a_slice_that_is_no_torus_is_told_in_one_line():
    with pytest.raises(UserError, match="cannot be laid on these 3 TPUs") as told:
        device_grid(sizes(3), tpus(1, (2, 2, 1))[1:])
    assert "\n" not in str(told.value)
