"""The list of caches that a model makes, some of them lists again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache

from rotormlx.mlx.cache.single import RotorKVCache


def leaves(caches: Sequence[Any]) -> Iterator[tuple[int, str, Any]]:
    """Each cache that holds something itself: index in the list, label, cache."""
    for index, cache in enumerate(caches):
        if isinstance(cache, CacheList):
            for place, (_, label, leaf) in enumerate(leaves(cache.caches)):
                yield index, f"{label} [{place}]", leaf
        else:
            yield index, type(cache).__name__, cache


def with_leaves(caches: Sequence[Any], new: Iterator[Any]) -> list[Any]:
    """The list with other leaves, taken from ``new`` in the order of :func:`leaves`."""
    return [
        CacheList(*with_leaves(cache.caches, new)) if isinstance(cache, CacheList) else next(new)
        for cache in caches
    ]


def compress_plain(caches: list[Any], own: Iterator[Any]) -> int:
    """Compress mlx-lm's growing caches in place.

    Args:
        caches: The caches of a model.
        own: The leaves of the list that the model makes itself, which say how.

    Returns:
        How many were compressed.
    """
    count = 0
    for index, cache in enumerate(caches):
        if isinstance(cache, CacheList):
            parts = list(cache.caches)
            count += compress_plain(parts, own)
            cache.caches = tuple(parts)
            continue
        like = next(own)
        if type(cache) is KVCache and isinstance(like, RotorKVCache):
            # Layer by layer, so that a plain layer is freed before the next one is packed.
            made = type(like).from_kv_cache(cache, like.config, like.layer, like.calibrated)
            mx.eval(made.state)
            caches[index] = made
            count += 1
    return count
