"""The list of caches that a model makes, some of them lists again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache

from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.windows import compressed


def leaves(caches: Sequence[Any]) -> Iterator[tuple[int, str, Any]]:
    """Each cache that holds something itself: index in the list, label, cache."""
    for index, cache in enumerate(caches):
        if isinstance(cache, CacheList):
            for place, (_, label, leaf) in enumerate(leaves(cache.caches)):
                yield index, f"{label} [{place}]", leaf
        else:
            yield index, type(cache).__name__, cache


def compress_plain(caches: list[Any], own: Iterator[Any]) -> int:
    """Compress mlx-lm's caches in place, where the model's own are compressed.

    A sliding window that has dropped tokens stays as it is: some are missing that a compressed
    cache holds.

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
        # Layer by layer, so that a plain layer is freed before the next one is packed.
        made: RotorKVCache | None
        if type(cache) is KVCache:
            made = RotorKVCache.from_kv_cache(cache, like.config, like.layer, like.calibrated)
        else:
            made = compressed(cache, like)
        if made is None:
            continue
        mx.eval(made.state)
        caches[index] = made
        count += 1
    return count
