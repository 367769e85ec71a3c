"""The script that allots bits to layers: the best allotment, and the error it counts with."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def explore() -> Any:
    path = Path(__file__).parent.parent / "scripts" / "explore.py"
    spec = importlib.util.spec_from_file_location("explore", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Max, Quantizing for minimum distortion, 1960, table 1: 4, 8 and 16 levels.
@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_squared_error_is_the_published_one(explore: Any, bits: int, error: float) -> None:
    assert explore.squared_error(bits) == pytest.approx(error, rel=1e-3)


def test_allotted_is_the_best_of_all_allotments(explore: Any) -> None:
    loss = np.random.default_rng(5).gamma(0.5, size=6)
    choices = (2, 3, 4)
    error = {bits: explore.squared_error(bits) for bits in choices}

    def total(bits: Any) -> float:
        return sum(one * error[width] for one, width in zip(loss, bits, strict=True))

    every = [bits for bits in itertools.product(choices, repeat=6) if sum(bits) == 18]
    best = min(every, key=total)
    found = explore.allotted(loss, 3, choices)
    assert len(set(best)) == 3  # the example gives every width to someone
    assert list(found) == list(best)


def test_allotted_gives_as_many_bits_as_there_are(explore: Any) -> None:
    loss = np.random.default_rng(1).gamma(1, size=(30, 2)) * [5, 1]
    found = explore.allotted(loss, 3.5, (2, 3, 4))
    assert found.shape == loss.shape
    assert found.mean() == 3.5
    assert found[:, 0].mean() > found[:, 1].mean()
