"""A trial run of a model: what can be compressed, and does all of it reach our attention?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from rotormlx.codec.counts import max_blocks
from rotormlx.config import RotorConfig
from rotormlx.mlx import hook
from rotormlx.mlx.cache import windows
from rotormlx.mlx.cache.chunked import ChunkedRotorKVCache
from rotormlx.mlx.cache.lists import leaves
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.sliding import SlidingRotorKVCache
from rotormlx.mlx.cache.view import KVView
from rotormlx.report import LayerReport, Report

# Prefill and decode: some models take another path for a single token.
PROBE_TOKENS = (3, 1)


def probe(
    model: Module, caches: list[Any], config: RotorConfig, *, sliding_windows: bool = True
) -> Report:
    """Run the model once without computing, since MLX is lazy, and see who meets whom.

    The hook must be installed.

    Args:
        model: The model.
        caches: Its own caches, empty; they are the pattern and stay empty.
        config: How keys and values would be compressed.
        sliding_windows: Whether sliding windows and chunked attention are to be compressed; they
            are left alone too where only a model without them can be.

    Returns:
        What would be compressed, layer by layer.

    Raises:
        ValueError: If there is nothing to compress, or a cache's keys and values do not reach
            mlx-lm's attention as they were handed out.
    """
    if sliding_windows and any(windows.is_compressible(c) for _, _, c in leaves(caches)):
        try:
            return _probe(model, copy.deepcopy(caches), config, _probe_windows(config))
        except ValueError as error:
            with suppress(ValueError):
                return _probe(model, caches, config, None)
            raise error from error.__cause__
    return _probe(model, caches, config, None)


def _probe(
    model: Module, caches: list[Any], config: RotorConfig, of_windows: windows.WindowMaker | None
) -> Report:
    model_type = str(getattr(model, "model_type", type(model).__name__))
    # Shapes and bits are the same with a calibration, which needs what is measured here.
    caches = compress(caches, lambda layer: _ProbeCache(config.uncalibrated, layer), of_windows)
    if not any(isinstance(cache, RotorKVCache) for _, _, cache in leaves(caches)):
        has = ", ".join(sorted({label for _, label, _ in leaves(caches)})) or "nothing"
        reason = f"it must have at least one KVCache, but all it has is {has}"
        raise _refusal(model_type, reason)
    for tokens in PROBE_TOKENS:
        _probe_step(model, model_type, caches, tokens)
    return Report(config, model_type, tuple(_layer_reports(caches)))


def _probe_step(model: Module, model_type: str, caches: list[Any], tokens: int) -> None:
    probes = [(i, cache) for i, _, cache in leaves(caches) if isinstance(cache, _Remembering)]
    try:
        with hook.record_attention(pretend=True) as attended:
            model(mx.zeros((1, tokens), dtype=mx.int32), cache=caches)
    except Exception as error:  # a model may use the handle in any way, so anything may come
        refused = next((f"layer {i}: {p.refusal}" for i, p in probes if p.refusal), "")
        touched = f"mlx-lm's attention must get its keys and values untouched, but {brief(error)}"
        raise _refusal(model_type, refused or touched) from error
    handed_out = {(id(k), id(v)) for _, probe in probes for k, v in probe.handed_out}
    if any((id(keys), id(values)) not in handed_out for _, keys, values in attended):
        raise _refusal(model_type, "its attention must take keys with their values, but mixes them")
    reached = {(id(keys), id(values)) for _, keys, values in attended}
    for index, probe in probes:
        if not any((id(keys), id(values)) in reached for keys, values in probe.handed_out):
            raise _refusal(model_type, f"layer {index} must use mlx-lm's attention, but does not")


def compress(
    caches: list[Any],
    make: Callable[[int], RotorKVCache],
    of_windows: windows.WindowMaker | None = None,
) -> list[Any]:
    """The same caches with every plain growing one replaced by what ``make(layer)`` gives.

    Args:
        caches: Those that a model makes itself.
        make: Gives the compressed cache of a layer, by its index.
        of_windows: Gives it for a sliding window or chunked attention; None leaves them alone.
    """
    return [_replace(cache, layer, make, of_windows) for layer, cache in enumerate(caches)]


def _replace(
    cache: Any,
    layer: int,
    make: Callable[[int], RotorKVCache],
    of_windows: windows.WindowMaker | None,
) -> Any:
    # Exactly this class: what derives from it may promise more than a compressed cache keeps.
    if type(cache) is KVCache:
        return make(layer)
    if type(cache) is CacheList:
        return CacheList(*(_replace(part, layer, make, of_windows) for part in cache.caches))
    made = None if of_windows is None else of_windows(layer, cache)
    return cache if made is None else made


class _Remembering(RotorKVCache):
    """Remembers what it handed out, to see whether it reaches the attention."""

    stands_for: type

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.handed_out: list[tuple[KVView, KVView]] = []
        self.refusal = ""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[KVView, KVView]:
        try:
            views = super().update_and_fetch(keys, values)
        except ValueError as error:
            # What is required and what came; what to do is said by the one who asks.
            self.refusal = str(error).partition("] ")[2].partition(";")[0].rstrip(".")
            raise
        self.handed_out.append(views)
        return views

    def keys_and_values(self) -> tuple[KVView, KVView]:
        views = super().keys_and_values()
        self.handed_out.append(views)
        return views


class _ProbeCache(_Remembering):
    """Stands for a ``KVCache``."""

    stands_for = KVCache


class _ProbeSliding(_Remembering, SlidingRotorKVCache):
    """Stands for a ``RotatingKVCache``."""

    stands_for = RotatingKVCache


class _ProbeChunked(_Remembering, ChunkedRotorKVCache):
    """Stands for a ``ChunkedKVCache``."""

    stands_for = ChunkedKVCache


def _probe_windows(config: RotorConfig) -> windows.WindowMaker:
    def make(layer: int, cache: Any) -> RotorKVCache | None:
        if not windows.is_compressible(cache):
            return None
        kind = _ProbeSliding if isinstance(cache, RotatingKVCache) else _ProbeChunked
        return kind(windows.size(cache), config.uncalibrated, layer)

    return make


def _refusal(model_type: str, reason: str) -> ValueError:
    return ValueError(
        f"[apply] {model_type} cannot be compressed: {reason}; use the model without rotormlx."
    )


def brief(error: Exception) -> str:
    """Kind and first sentence of an error; of a view's refusal what came."""
    if str(error).startswith("[KVView]"):
        return str(error).partition("but ")[2].partition(";")[0]
    # Only the first sentence: a wrong argument to mx makes it list all signatures.
    first = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first}"


def _layer_reports(caches: list[Any]) -> list[LayerReport]:
    reports = []
    for index, label, cache in leaves(caches):
        shape = dims(cache) or (0, 0, 0)
        if isinstance(cache, _Remembering):
            keys, values = cache.keys_and_values()
            name = label.replace(type(cache).__name__, cache.stands_for.__name__)
            sliding = isinstance(cache, SlidingRotorKVCache)
            reports.append(
                LayerReport(
                    index,
                    name,
                    True,
                    "",
                    *shape,
                    key_bits=keys.codec.bits_per_value,
                    value_bits=values.codec.bits_per_value,
                    exact_bytes=keys.dtype.size,
                    max_tokens=windows.size(cache),
                    max_blocks=max_blocks(cache.max_size, cache.config) if sliding else None,
                )
            )
        elif (limit := windows.size(cache)) is not None:
            reason = windows.reason_alone(cache)
            reports.append(LayerReport(index, label, False, reason, *shape, max_tokens=limit))
        elif isinstance(cache, ArraysCache):
            reason = "a state of constant size, no keys and values"
            reports.append(LayerReport(index, label, False, reason, state_bytes=cache.nbytes))
        else:
            reason = "a kind of cache that rotormlx does not know"
            reports.append(LayerReport(index, label, False, reason, *shape))
    return reports


def dims(cache: Any) -> tuple[int, int, int] | None:
    """KV heads, key dimension and value dimension of a filled cache that has them."""
    if isinstance(cache, RotorKVCache):
        pair: tuple[Any, Any] = (None, None) if cache.empty() else cache.keys_and_values()
    else:
        pair = getattr(cache, "keys", None), getattr(cache, "values", None)
    keys, values = pair
    if keys is None or values is None or len(keys.shape) != 4:
        return None
    return keys.shape[1], keys.shape[3], values.shape[3]
