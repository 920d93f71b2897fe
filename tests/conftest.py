"""Fixtures shared by every room: where the small real data lies, and a quiet, pinned JAX."""

from __future__ import annotations

import os
import pathlib

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# `make hardware` runs these, in environments of their own.
collect_ignore = ["hardware"]

# Compilation and busy machines make the first example of a property slow.
hypothesis.settings.register_profile("t5like", deadline=None, print_blob=True)
hypothesis.settings.load_profile("t5like")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of small real data: $T5LIKE_SHARED_DATA, else ../shared/data beside the clone."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    path = pathlib.Path(os.environ.get("T5LIKE_SHARED_DATA", beside))
    if not path.is_dir():
        pytest.skip("shared data is not on this machine (set T5LIKE_SHARED_DATA)")
    return path
