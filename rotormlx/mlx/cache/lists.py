"""The caches of a model, compressed in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.host_caches import GROWING, is_exactly, list_of, parts


def compress_plain(caches: list[Any], own: Iterator[Any]) -> int:
    """Compress a host's growing caches in place, and give others the class that the model needs.

    Args:
        caches: The caches of a model.
        own: The leaves of the list that the model makes itself, which say how.

    Returns:
        How many were compressed.
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
            caches[index] = cache if type(cache) is type(like) else type(like).of(cache)
        elif is_exactly(cache, GROWING):
            # Layer by layer, so that a plain layer is freed before the next one is packed.
            packed = type(like).from_kv_cache(cache, like.config, like.layer, like.calibrated)
            mx.eval(packed.state)
            caches[index] = packed
            count += 1
    return count
