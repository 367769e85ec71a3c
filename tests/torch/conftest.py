"""What all tests of the torch companion use."""

import pytest


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None:
    """See :func:`tests.conftest.one_thread`."""
