"""Fixtures of the kernel tests."""

import pytest

from tests.support.runners import RUNNERS


def pytest_configure(config: pytest.Config) -> None:
    """Markers that only these tests have."""
    config.addinivalue_line("markers", "mutation: a kernel with one change must fail a check")


@pytest.fixture
def runner(request):
    """The platform of this name, ready to run: ``parametrize`` it with ``indirect=["runner"]``."""
    chosen = RUNNERS[request.param]
    if missing := chosen.missing():
        pytest.skip(missing)
    with chosen.kernels():
        yield chosen
