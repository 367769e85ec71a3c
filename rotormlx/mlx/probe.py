"""A trial run of a model: what can be compressed, and does all of it reach our attention?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from rotormlx.config import RotorConfig
from rotormlx.mlx import hook, hosts
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.host_caches import (
    ARRAYS,
    CHUNKED,
    GROWING,
    ROTATING,
    is_a,
    is_exactly,
    leaves,
    list_of,
    parts,
)
from rotormlx.report import LayerReport, Report

# Prefill and decode: some models take another path for a single token.
PROBE_TOKENS = (3, 1)


def probe(host: hosts.Host, model: Module, caches: list[Any], config: RotorConfig) -> Report:
    """Run the model once without computing, since MLX is lazy, and see who meets whom.

    The host must be changed to read compressed caches.

    Args:
        host: What the model is of.
        model: The part of the model that takes tokens and caches; it stays as it is.
        caches: Its own caches, empty; they are the pattern and stay empty.
        config: How keys and values would be compressed.

    Returns:
        What would be compressed, layer by layer.

    Raises:
        ValueError: If there is nothing to compress, or a cache's keys and values do not reach
            the host's attention as they were handed out.
    """
    model_type = str(getattr(model, "model_type", type(model).__name__))
    # Shapes and bits are the same with a calibration, which needs what is measured here.
    caches = compress(caches, lambda layer: _ProbeCache(config.uncalibrated, layer))
    if not any(isinstance(cache, RotorKVCache) for _, _, cache in leaves(caches)):
        has = ", ".join(sorted({label for _, label, _ in leaves(caches)})) or "nothing"
        reason = f"it must have at least one KVCache, but all it has is {has}"
        raise _refusal(model_type, reason)
    for tokens in PROBE_TOKENS:
        with _unchanged(model):
            _probe_step(host, model, model_type, caches, tokens)
    return Report(config, model_type, tuple(_layer_reports(caches)))


def _probe_step(
    host: hosts.Host, model: Module, model_type: str, caches: list[Any], tokens: int
) -> None:
    probes = [(i, cache) for i, _, cache in leaves(caches) if isinstance(cache, _ProbeCache)]
    try:
        with hook.record_attention(pretend=True) as attended:
            model(mx.zeros((1, tokens), dtype=mx.int32), cache=caches)
    except Exception as error:  # a model may use the handle in any way, so anything may come
        refused = next((f"layer {i}: {p.refusal}" for i, p in probes if p.refusal), "")
        touched = (
            f"{host.name}'s attention must get its keys and values untouched, but {brief(error)}"
        )
        raise _refusal(model_type, refused or touched) from error
    handed_out = {(id(k), id(v)) for _, probe in probes for k, v in probe.handed_out}
    if any((id(keys), id(values)) not in handed_out for _, keys, values in attended):
        raise _refusal(model_type, "its attention must take keys with their values, but mixes them")
    reached = {(id(keys), id(values)) for _, keys, values in attended}
    for index, probe in probes:
        if not any((id(keys), id(values)) in reached for keys, values in probe.handed_out):
            raise _refusal(
                model_type, f"layer {index} must use {host.name}'s attention, but does not"
            )


@contextmanager
def _unchanged(model: Module) -> Iterator[None]:
    """Undo what a run leaves on the parts of a model: positions of a prompt, say."""
    kept = [(d, dict(d)) for part in model.modules() for d in (part, vars(part))]
    try:
        yield
    finally:
        for now, before in kept:
            for name in now.keys() - before.keys():
                dict.pop(now, name)
            changed = {k: v for k, v in before.items() if k not in now or now[k] is not v}
            dict.update(now, changed)


def compress(caches: list[Any], make: Callable[[int], RotorKVCache]) -> list[Any]:
    """The same caches with every plain growing one replaced by what ``make(layer)`` gives."""
    return [_replace(cache, layer, make) for layer, cache in enumerate(caches)]


def _replace(cache: Any, layer: int, make: Callable[[int], RotorKVCache]) -> Any:
    # Exactly this class: what derives from it may promise more than a compressed cache keeps.
    if is_exactly(cache, GROWING):
        return make(layer)
    inner = parts(cache)
    return cache if inner is None else list_of(cache, [_replace(c, layer, make) for c in inner])


class _ProbeCache(RotorKVCache):
    """Remembers what it handed out, to see whether it reaches the attention."""

    def __init__(self, config: RotorConfig, layer: int) -> None:
        super().__init__(config, layer)
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
        if isinstance(cache, RotorKVCache):
            keys, values = cache.keys_and_values()
            name = label.replace(type(cache).__name__, GROWING)
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
                )
            )
        elif is_a(cache, ROTATING, CHUNKED):
            limit = cache.max_size if is_a(cache, ROTATING) else cache.chunk_size
            reason = f"it never keeps more than {limit} tokens"
            reports.append(LayerReport(index, label, False, reason, *shape, max_tokens=limit))
        elif is_a(cache, ARRAYS):
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
