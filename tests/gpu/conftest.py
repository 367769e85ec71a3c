"""Fixtures of the kernel tests."""

import pytest

from tests.support.runners import runner

__all__ = ["runner"]


def pytest_configure(config: pytest.Config) -> None:
    """Markers that only these tests have."""
    config.addinivalue_line("markers", "mutation: a kernel with one change must fail a check")
