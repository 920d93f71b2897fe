"""The static schedules of the TPU kernels against those of jax's splash attention.

In a process of its own: libtpu dumps the schedules of everything or of nothing, and that is slow.
"""

from __future__ import annotations

import functools

import pytest

from benchmarks import attention_static as static
from benchmarks.tpu_schedules import Schedule

PLATFORM = "tpu"
CASES = {case.name: case for case in static.cases(static.WINDOW)}


@functools.cache
def schedules(name: str) -> tuple[dict[str, Schedule], dict[str, Schedule]]:
    case = CASES[name]
    return static.by_kind(static.compile_ours(case)), static.by_kind(static.compile_splash(case))


@pytest.mark.parametrize("kind", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_no_more_bundles_than_splash(name, kind):
    ours, theirs = (found[kind] for found in schedules(name))
    assert max(path.bundles for path in ours.paths) <= 1.1 * theirs.bundles


@pytest.mark.parametrize("kind", ["forward", "dq", "dkv"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_spills_no_more_registers_than_splash(name, kind):
    ours, theirs = (found[kind] for found in schedules(name))
    full, *partial = ours.paths
    assert full.spills <= theirs.paths[0].spills
    # One register more is what the mask of a window and globals costs dq.
    assert all(path.spills <= theirs.paths[0].spills + (kind == "dq") for path in partial)


@pytest.mark.parametrize("kind", ["forward", "dq", "dkv"])
def test_a_full_block_keeps_the_matrix_units_as_busy_as_splash(kind):
    # The same products in as many bundles. Slots in use would say less: splash turns more operands
    # around on their way into the units, which takes slots.
    ours, theirs = (found[kind].paths[0].block for found in schedules("full"))
    assert ours <= 1.05 * theirs
