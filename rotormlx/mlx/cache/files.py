"""The part of writing and reading cache files that needs MLX."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from rotormlx.mlx.cache.base import StoredCache
from rotormlx.mlx.cache.classes import CLASSES
from rotormlx.mlx.cache.saved import DTYPE_NAMES
from rotormlx.mlx.host_caches import LIST, held, parts, refilled
from rotormlx.storage import cache_file
from rotormlx.storage.cache_file import SavedCaches
from rotormlx.storage.tensor_file import Array


def write(path: str | Path, caches: Sequence[Any], metadata: Mapping[str, str]) -> None:
    """Write caches to a file; a save either completes or leaves the old file.

    Args:
        path: A ``.safetensors`` file; a missing suffix is appended.
        caches: The caches of a model.
        metadata: Texts to keep with them.

    Raises:
        ValueError: If a file cannot hold the content of a cache, or ``path`` cannot be a file.
        OSError: If the disk is full, or the directory is read-only.
    """
    classes = [_name(cache) for cache in caches]
    states = [_state(cache) for cache in caches]
    cache_file.write(cache_file.with_suffix(path), classes, states, metadata, _tensor)


def read(saved: SavedCaches, host_caches: ModuleType) -> list[Any]:
    """Read the caches of a file whose header was checked.

    Args:
        saved: The file.
        host_caches: The module of the host's cache classes.

    Raises:
        ValueError: If the content differs from what was written.
    """
    states = saved.read(_array)
    pairs = zip(saved.classes, states, strict=True)
    return [_restored(name, state, host_caches) for name, state in pairs]


def _name(cache: Any) -> str:
    return type(cache).__name__ if parts(cache) is None else LIST


def _state(cache: Any) -> Any:
    """Return the state of a cache; for a list, the state and class name of each part."""
    inner = parts(cache)
    if inner is not None:
        return [(_state(part), _name(part)) for part in inner]
    return cache.state if isinstance(cache, StoredCache) else held(cache)


def _restored(name: str, state: Any, host_caches: ModuleType) -> Any:
    if name == LIST:
        inner = [_restored(part_name, part, host_caches) for part, part_name in state]
        return vars(host_caches)[LIST](*inner)
    if name in CLASSES:
        return CLASSES[name].from_state(state)
    return refilled(vars(host_caches)[name], state)


def _tensor(array: mx.array) -> tuple[str, tuple[int, ...], Callable[[], Array]]:
    """Return the dtype and shape of an array, and a function that returns its content."""
    if not isinstance(array, mx.array) or array.dtype not in DTYPE_NAMES:
        raise ValueError(
            "[prompt cache] A cache must hold arrays, numbers, texts and None to be saved, but one "
            f"holds {array!r:.80}; keep it in memory."
        )

    def give() -> Array:
        is_wide = array.dtype == mx.bfloat16  # numpy has no bfloat16
        whole = mx.contiguous(array)
        return np.array(whole.view(mx.uint16) if is_wide else whole, copy=False)

    return DTYPE_NAMES[array.dtype], array.shape, give


def _array(array: Array, dtype: str) -> mx.array:
    made = mx.array(array)
    return made.view(mx.bfloat16) if dtype == "BF16" else made
