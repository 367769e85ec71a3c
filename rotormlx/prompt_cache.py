"""Prompt caches in files: whole, of this format, and of the model that is to read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

from rotormlx import hook
from rotormlx.cache import RotorKVCache
from rotormlx.config import RotorConfig
from rotormlx.fingerprint import fingerprint
from rotormlx.integration import model_report
from rotormlx.probe import brief, dims
from rotormlx.report import LayerReport, Report, leaves

# The entry of a file's metadata that tells which model's keys and values it holds.
FINGERPRINT = "rotormlx_model"


def save_prompt_cache(
    path: str, model: Module, caches: list[Any], metadata: dict[str, str] | None = None
) -> None:
    """Write caches to a file that only the same model takes back.

    mlx-lm's ``save_prompt_cache`` writes the same file without the model's fingerprint.

    Args:
        path: A ``.safetensors`` file.
        model: The model that filled the caches.
        caches: Its caches.
        metadata: Texts to keep with them.
    """
    kept = {**(metadata or {}), FINGERPRINT: fingerprint(model)}
    mlx_lm_cache.save_prompt_cache(path, caches, kept)


def load_prompt_cache(path: str, model: Module) -> tuple[list[Any], dict[str, str]]:
    """Read caches from a file for a compressed model; plain ones in it are compressed.

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
    caches, metadata = read_prompt_cache(path)
    check_fingerprint(path, metadata, model, report.model_type)
    adopt_prompt_cache(model, caches)
    return caches, metadata


def check_fingerprint(path: str, metadata: dict[str, str], model: Module, model_type: str) -> None:
    """Refuse a file whose caches other weights have filled; one that does not say is taken."""
    saved = metadata.get(FINGERPRINT)
    if saved is not None and saved != (own := fingerprint(model)):
        raise ValueError(
            f"[prompt cache] {path} must be of this {model_type} with fingerprint {own[:12]}, but "
            f"other weights, with fingerprint {saved[:12]}, made it; use that model, or make it "
            "again."
        )


def read_prompt_cache(path: str) -> tuple[list[Any], dict[str, str]]:
    """Read a file of ``save_prompt_cache``, compressed caches or not.

    Args:
        path: A ``.safetensors`` file.

    Returns:
        The caches and the metadata.

    Raises:
        ValueError: If the file is missing, incomplete, no prompt cache, or of another version.
    """
    _check_complete(path)
    hook.install()
    try:
        caches, metadata = mlx_lm_cache.load_prompt_cache(path, return_metadata=True)
    except Exception as error:  # whatever a foreign or damaged file trips over
        raise ValueError(
            f"[prompt cache] {path} must be a prompt cache that the installed mlx-lm and rotormlx "
            f"can read, but {brief(error)}; make it again."
        ) from error
    return caches, metadata


def adopt_prompt_cache(model: Module, caches: list[Any]) -> int:
    """Check that caches from a file fit a compressed model, and compress plain ones in place.

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
    expected = list(leaves(model.make_cache()))
    given = list(leaves(caches))
    if len(given) != len(expected):
        raise _mismatch(report, f"{len(expected)} caches", f"{len(given)}")
    for layer, (index, _, want), (_, _, cache) in zip(report.layers, expected, given, strict=True):
        _check_fits(report, layer, index, want, cache)
    return _convert(caches, report.config)


def _convert(caches: list[Any], config: RotorConfig, layer: int | None = None) -> int:
    count = 0
    for index, cache in enumerate(caches):
        place = index if layer is None else layer
        if type(cache) is KVCache:
            # Layer by layer, so that a plain layer is freed before the next one is packed.
            caches[index] = RotorKVCache.from_kv_cache(cache, config, place)
            mx.eval(caches[index].state)
            count += 1
        elif isinstance(cache, CacheList):
            parts = list(cache.caches)
            count += _convert(parts, config, place)
            cache.caches = tuple(parts)
    return count


def _check_fits(report: Report, layer: LayerReport, index: int, want: Any, cache: Any) -> None:
    if isinstance(cache, RotorKVCache) and isinstance(want, RotorKVCache):
        if cache.config != report.config:
            raise _mismatch(
                report, report.config.to_json(), cache.config.to_json(), "the configuration"
            )
        if cache.layer != index:
            raise _mismatch(report, f"layer {index} at position {index}", f"layer {cache.layer}")
    elif type(cache) is not (KVCache if layer.compressed else type(want)):
        raise _mismatch(report, f"{layer.cache} in layer {index}", type(cache).__name__)
    elif isinstance(cache, RotatingKVCache) and cache.max_size != want.max_size:
        raise _mismatch(
            report, f"a window of {want.max_size} tokens in layer {index}", str(cache.max_size)
        )
    found = dims(cache)
    if found is not None and found != (layer.kv_heads, layer.head_dim_k, layer.head_dim_v):
        raise _mismatch(
            report,
            f"{layer.kv_heads} KV heads of {layer.head_dim_k} and {layer.head_dim_v} dimensions "
            f"in layer {index}",
            f"{found[0]} of {found[1]} and {found[2]}",
        )


def _mismatch(report: Report, wanted: str, came: str, what: str = "the model") -> ValueError:
    return ValueError(
        f"[prompt cache] {what.capitalize()} {report.model_type} requires {wanted}, but the prompt "
        f"cache has {came}; use it with {what} that it was made with, or make it again."
    )


def _check_complete(path: str) -> None:
    """Raise unless a file is a whole safetensors file with the metadata of a prompt cache."""
    if not Path(path).is_file():
        raise ValueError(
            f"[prompt cache] An existing file is required, but {path} is none; check the path."
        )
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= size else b""
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"[prompt cache] A safetensors file is required, but {path} has no readable header; "
            "it is damaged or something else: make it again."
        ) from error
    if size != 8 + length + end:
        raise ValueError(
            f"[prompt cache] {path} must have {8 + length + end} bytes, but it has {size}; "
            "it is damaged: make it again."
        )
    if "1.0" not in metadata:  # where mlx-lm writes the class of the first cache
        raise ValueError(
            f"[prompt cache] A file of mlx_lm's save_prompt_cache is required, but {path} is "
            "another safetensors file; check the path."
        )
