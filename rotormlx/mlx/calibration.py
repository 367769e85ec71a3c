"""Calibrations of MLX models; see :mod:`rotormlx.storage.calibration`."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from mlx.nn.layers.base import Module

from rotormlx.codec.derived import derived
from rotormlx.mlx.cache.store import Calibrated
from rotormlx.mlx.fingerprint import weights
from rotormlx.storage import calibration
from rotormlx.storage.calibration import Calibration


def load(path: str | Path, model: Module) -> Calibration:
    """Load a calibration; see :func:`rotormlx.storage.calibration.load`."""
    return calibration.load(path, weights(model))


def find(model: Module, transform: str | None = None) -> Calibration | None:
    """Find a stored calibration; see :func:`rotormlx.storage.calibration.find`."""
    return calibration.find(weights(model), transform)


def default_path(model: Module, transform: str) -> Path:
    """Return the path where the calibration of a model is stored and looked up."""
    return calibration.default_path(weights(model), transform)


@derived
def arrays_of(made: Calibration, layer: int) -> Calibrated:
    """Return the channel scales or matrices that all caches of a layer share."""
    keys, values = made.of(layer)
    return mx.array(keys), mx.array(values)
