"""Tests of `make hardware`: real compilers, absent devices."""

from __future__ import annotations

import pytest

from tests.hardware import topologies


@pytest.fixture(autouse=True)
def _compiler(request: pytest.FixtureRequest) -> None:
    """Skips a module whose PLATFORM has no compiler in this environment."""
    reason = topologies.missing(request.module.PLATFORM)
    if reason:
        pytest.skip(reason)
