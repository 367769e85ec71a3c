"""Prompt caches in files: whole, of this format, and of the model that is to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.lists import compress_plain, leaves
from rotormlx.mlx.cache.saved import DTYPE_NAMES
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.store import same_calibrated
from rotormlx.mlx.fingerprint import fingerprint
from rotormlx.mlx.integration import model_report
from rotormlx.mlx.probe import dims
from rotormlx.report import LayerReport, Report
from rotormlx.storage import cache_file
from rotormlx.storage.cache_file import SavedCaches
from rotormlx.storage.cache_rules import Shape
from rotormlx.storage.tensor_file import Array

# The entry of a file's metadata that tells which model's keys and values it holds.
FINGERPRINT = "rotormlx_model"

# What a file may name, besides CacheList: rotormlx/storage/cache_rules.py has a rule for each.
_CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(KVCache, RotatingKVCache, ChunkedKVCache, ArraysCache),
        *(RotorKVCache, BatchRotorKVCache),
    )
}


def save_prompt_cache(
    path: str, model: Module, caches: list[Any], metadata: dict[str, str] | None = None
) -> None:
    """Write caches to a file that only the same model takes back.

    mlx-lm reads it too, and its own ``save_prompt_cache`` writes the same layout, but without the
    model's fingerprint and a checksum. The file appears whole or not at all: an interrupt, a full
    disk or a crash leaves what was there before.

    Args:
        path: A ``.safetensors`` file; that suffix is appended where it is missing.
        model: The model that filled the caches.
        caches: Its caches.
        metadata: Texts to keep with them.

    Raises:
        ValueError: If a cache holds what no file can hold, or ``path`` is no place for a file.
        OSError: If the disk is full, or the directory is read-only.
    """
    kept = {**(metadata or {}), FINGERPRINT: fingerprint(model)}
    classes = [type(cache).__name__ for cache in caches]
    path = path if path.endswith(".safetensors") else f"{path}.safetensors"
    cache_file.write(path, classes, [cache.state for cache in caches], kept, _tensor)


def load_prompt_cache(path: str, model: Module) -> tuple[list[Any], dict[str, str]]:
    """Read caches from a file for a compressed model; plain ones in it are compressed.

    Nothing of the file is believed: its header, its classes, their configuration, shapes and
    counts, and the model are checked before an array is read, and no more memory is taken than the
    arrays have bytes.

    Args:
        path: A file of :func:`save_prompt_cache` or of mlx-lm's function of that name.
        model: A model that :func:`rotormlx.apply` was given.

    Returns:
        The caches and the metadata.

    Raises:
        ValueError: If the file is missing, damaged or of another format version, or belongs to
            another model or configuration.
    """
    report = model_report(model)
    with cache_file.opened(path) as saved:
        check_fingerprint(path, saved.metadata, model, report.model_type)
        caches = _read(saved, model, report)
    adopt_prompt_cache(model, caches)
    return caches, saved.metadata


def check_fingerprint(path: str, metadata: dict[str, str], model: Module, model_type: str) -> None:
    """Refuse a file whose caches other weights have filled; one that does not say is taken."""
    saved = metadata.get(FINGERPRINT)
    if saved is not None and saved != (own := fingerprint(model)):
        raise ValueError(
            f"[prompt cache] {path} must be of this {model_type} with fingerprint {own[:12]}, but "
            f"other weights, with fingerprint {saved[:12]!a}, made it; use that model, or make it "
            "again."
        )


def read_metadata(path: str) -> dict[str, str]:
    """Check the header of a file of caches, and read the texts in it.

    Raises:
        ValueError: If the file is missing, incomplete, no prompt cache, or of another version.
    """
    with cache_file.opened(path) as saved:
        return saved.metadata


def read_prompt_cache(path: str, model: Module) -> tuple[list[Any], dict[str, str]]:
    """As :func:`load_prompt_cache`, but plain caches stay so, and no weight of the model is read.

    What is left to do is :func:`check_fingerprint` and :func:`adopt_prompt_cache`.
    """
    with cache_file.opened(path) as saved:
        return _read(saved, model, model_report(model)), saved.metadata


def _read(saved: SavedCaches, model: Module, report: Report) -> list[Any]:
    _check_model(report, model.make_cache(), saved.shapes)
    states = saved.read(_array)
    return [_restored(name, state) for name, state in zip(saved.classes, states, strict=True)]


def _restored(name: str, state: list[Any]) -> Any:
    if name == CacheList.__name__:
        return CacheList(*(_restored(part_name, part) for part, part_name in state))
    return _CLASSES[name].from_state(state)


def _tensor(array: mx.array) -> tuple[str, tuple[int, ...], Callable[[], Array]]:
    """Dtype, shape and bytes of an array, which are made when their turn comes."""
    if not isinstance(array, mx.array) or array.dtype not in DTYPE_NAMES:
        raise ValueError(
            "[prompt cache] A cache must hold arrays, numbers, texts and None to be saved, but one "
            f"holds {array!r:.80}; keep it in memory."
        )

    def give() -> Array:
        is_wide = array.dtype == mx.bfloat16  # numpy has none
        whole = mx.contiguous(array)
        return np.array(whole.view(mx.uint16) if is_wide else whole, copy=False)

    return DTYPE_NAMES[array.dtype], array.shape, give


def _array(array: Array, dtype: str) -> mx.array:
    made = mx.array(array)
    return made.view(mx.bfloat16) if dtype == "BF16" else made


def adopt_prompt_cache(model: Module, caches: list[Any]) -> int:
    """Check that caches fit a compressed model, and compress plain ones in place.

    Args:
        model: A model that :func:`apply` was given.
        caches: What :func:`read_prompt_cache` returned.

    Returns:
        How many plain caches were compressed.

    Raises:
        ValueError: If they belong to another model or another configuration; ``caches`` is
            unchanged then.
    """
    report = model_report(model)
    shapes = [(index, _shape(cache)) for index, _, cache in leaves(caches)]
    fresh = model.make_cache()
    _check_model(report, fresh, shapes)
    _check_calibration(report, fresh, caches)
    return compress_plain(caches, (own for _, _, own in leaves(fresh)))


def _check_calibration(report: Report, fresh: list[Any], caches: list[Any]) -> None:
    """Refuse caches of another calibration than the model's; those that are empty take it."""
    pairs = [
        (own, cache)
        for (_, _, own), (_, _, cache) in zip(leaves(fresh), leaves(caches), strict=True)
        if isinstance(own, RotorKVCache) and isinstance(cache, RotorKVCache)
    ]
    if not all(c.empty() or same_calibrated(own.calibrated, c.calibrated) for own, c in pairs):
        raise _mismatch(report, "its own", "another one", "the calibration")
    for own, cache in pairs:
        cache.calibrated = own.calibrated


def _shape(cache: Any) -> Shape:
    """What of a cache must fit a model."""
    name = type(cache).__name__
    if isinstance(cache, RotorKVCache):
        return Shape(name, cache.config, cache.layer, dims=dims(cache))
    window = cache.max_size if isinstance(cache, RotatingKVCache) else None
    return Shape(name, window=window, dims=dims(cache) if name in _CLASSES else None)


def _check_model(report: Report, wanted: list[Any], shapes: Sequence[tuple[int, Shape]]) -> None:
    """Refuse caches of these shapes unless they are such as the model makes itself."""
    expected = list(leaves(wanted))
    if len(shapes) != len(expected):
        raise _mismatch(report, f"{len(expected)} caches", f"{len(shapes)}")
    for layer, (index, _, want), (place, shape) in zip(
        report.layers, expected, shapes, strict=True
    ):
        if place != index:
            raise _mismatch(report, f"layer {index} in its place", f"a cache of layer {place}")
        _check_fits(report, layer, index, want, shape)


def _check_fits(report: Report, layer: LayerReport, index: int, want: Any, shape: Shape) -> None:
    if isinstance(want, RotorKVCache) and shape.name == RotorKVCache.__name__:
        if shape.config is not None and shape.config != want.config:
            raise _mismatch(
                report, want.config.to_json(), shape.config.to_json(), "the configuration"
            )
        if shape.layer != index:
            raise _mismatch(report, f"layer {index} at position {index}", f"layer {shape.layer}")
    elif shape.name != (KVCache if layer.compressed else type(want)).__name__:
        raise _mismatch(report, f"{layer.cache} in layer {index}", shape.name)
    elif shape.window is not None and shape.window != want.max_size:
        raise _mismatch(
            report, f"a window of {want.max_size} tokens in layer {index}", str(shape.window)
        )
    came = shape.dims
    if came is not None and came != (layer.kv_heads, layer.head_dim_k, layer.head_dim_v):
        raise _mismatch(
            report,
            f"{layer.kv_heads} KV heads of {layer.head_dim_k} and {layer.head_dim_v} dimensions "
            f"in layer {index}",
            f"{came[0]} of {came[1]} and {came[2]}",
        )


def _mismatch(report: Report, wanted: str, came: str, what: str = "the model") -> ValueError:
    return ValueError(
        f"[prompt cache] {what.capitalize()} {report.model_type} requires {wanted}, but the prompt "
        f"cache has {came}; use it with {what} that it was made with, or make it again."
    )
