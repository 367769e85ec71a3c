"""Fixtures of the kernel tests."""

import os

import mlx.core as mx
import pytest

from tests.support.runners import runner

__all__ = ["runner"]


@pytest.fixture(autouse=True, scope="session")
def _a_device_if_nothing_is_emulated() -> None:
    """A run with the emulator off that skips every kernel must not be green."""
    has_device = mx.metal.is_available() or mx.cuda.is_available()
    if os.environ.get("ROTORMLX_EMULATOR") == "off" and not has_device:
        pytest.fail("ROTORMLX_EMULATOR=off requires a Metal or a CUDA GPU, but MLX finds none.")
