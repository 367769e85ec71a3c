"""One tiny checkpoint, loaded by transformers and by mlx-lm, and what both save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model

from rotormlx.codec.format import ROLES
from rotormlx.codec.learned_rotors import learned_size
from rotormlx.storage.calibration import Calibration
from rotormlx.storage.fingerprint import Fingerprint
from tests.support.torch_models import build

# mlx-lm's Qwen2 has no head_dim of its own.
CHANGES: dict[str, dict[str, Any]] = {"qwen2": {"head_dim": 16}}


def assert_same_state(found: Any, expected: Any) -> None:
    """Every entry that a torch layer and an MLX cache would save, bit for bit."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.numpy().tobytes() == np.array(b).tobytes()
            assert tuple(a.shape) == b.shape
        else:
            assert a == b


def written(
    directory: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """A directory with a checkpoint in this dtype; ``options`` are those of ``build``."""
    build(name, **CHANGES.get(name, {}), **options).to(dtype).save_pretrained(directory)
    return directory


def by_mlx(directory: Path) -> Any:
    """The model as mlx-lm loads it."""
    model, _ = load_model(directory)
    mx.eval(model.parameters())
    return model


def by_torch(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def calibration(
    transform: str,
    model: Fingerprint,
    *,
    heads: int,
    dims: tuple[int, int],
    layers: tuple[int, ...] = (0, 1),
    losses: list[tuple[float, float]] | None = None,
    seed: int = 0,
) -> Calibration:
    """A calibration of random numbers, such as ``rotormlx.calibrate`` could have found.

    Args:
        transform: One of ``TRANSFORMS``.
        model: Of which model.
        heads: K.
        dims: D of keys and of values.
        layers: The indices of the layers.
        losses: Of keys and values of each layer, or None.
        seed: Of the numbers.
    """
    rng = np.random.default_rng(seed)
    numbers = {}
    for place, layer in enumerate(layers):
        for role, head_dim in zip(ROLES, dims, strict=True):
            name, scale = f"{layer}.{role}", np.exp(rng.normal(size=(heads, head_dim)) * 0.5)
            if transform == "klt":
                turned = np.linalg.qr(rng.normal(size=(heads, head_dim, head_dim)))[0]
                numbers[name] = scale[..., None] * turned
            else:
                numbers[name] = scale
            if transform == "rotors":
                numbers[f"{name}.rotors"] = rng.normal(size=(heads, learned_size(head_dim)))
            if losses is not None:
                numbers[f"{name}.loss"] = np.array([losses[place][ROLES.index(role)]])
    return Calibration(transform, model, {n: x.astype(np.float32) for n, x in numbers.items()}, 512)
