"""What all tests of the torch companion use."""

import pytest

import rotormlx.torch.cache  # noqa: F401  (makes the attention function known by its name)


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None:
    """See :func:`tests.conftest.one_thread`."""
