"""In-place compression of a model's list of caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from rotormlx.mlx.cache import windows
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.host_caches import GROWING, is_exactly, list_of, parts
from rotormlx.storage.cache_fields import LAYOUTS, SINGLE


def compress_plain(caches: list[Any], own: Iterator[Any]) -> int:
    """Compress a host's caches in place, and give compressed ones the class that the model needs.

    A sliding window that has dropped tokens stays as it is, because it lacks tokens that a
    compressed cache would hold.

    Args:
        caches: The caches of a model.
        own: The leaves of the list that the model makes itself, whose settings are used.

    Returns:
        The number of caches compressed.
    """
    count = 0
    for index, cache in enumerate(caches):
        inner = parts(cache)
        if inner is not None:
            made = list(inner)
            count += compress_plain(made, own)
            caches[index] = list_of(cache, made)
            continue
        like = next(own)
        if not isinstance(like, RotorKVCache):
            continue
        if isinstance(cache, RotorKVCache):
            if {LAYOUTS.get(type(c).__name__) for c in (cache, like)} == {SINGLE}:
                caches[index] = cache if type(cache) is type(like) else type(like).of(cache)
            continue
        # One layer at a time, so that a plain layer is freed before the next one is packed.
        packed: RotorKVCache | None
        if is_exactly(cache, GROWING):
            packed = type(like).from_kv_cache(cache, like.config, like.layer, like.calibrated)
        else:
            packed = windows.compressed(cache, like)
        if packed is not None:
            mx.eval(packed.state)
            caches[index] = packed
            count += 1
    return count
