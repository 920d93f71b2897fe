"""The TPU kernels, interpreted, against the definition."""

from __future__ import annotations

from tests.kernels.backends import BackendTests


class TestTpu(BackendTests):
    backend = "tpu"
