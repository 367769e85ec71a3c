"""Calibrations for models of transformers: see :mod:`rotormlx.storage.calibration`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from rotormlx.codec.derived import derived
from rotormlx.storage import calibration
from rotormlx.storage.calibration import Calibration
from rotormlx.torch.fingerprint import weights
from rotormlx.torch.parallel import own_heads
from rotormlx.torch.store import Calibrated


def load_calibration(path: str | Path, model: PreTrainedModel) -> Calibration:
    """Read a file of ``rotormlx calibrate``, for :class:`rotormlx.torch.RotorCache`.

    If a model is spread over ranks, every rank must call this, and gets its own KV heads.

    Args:
        path: The file.
        model: The model that the file must belong to.

    Raises:
        ValueError: If there is no such file, it is damaged, or it belongs to another model.

    Source: docs/FORMAT.md, section 11.
    """
    return calibration.load(path, weights(model)).share(*own_heads(model))


@derived
def arrays_of(made: Calibration, layer: int) -> Calibrated:
    """Return channel scales or matrices of a layer, shared by all its caches."""
    keys, values = made.of(layer)
    return torch.from_numpy(keys), torch.from_numpy(values)
