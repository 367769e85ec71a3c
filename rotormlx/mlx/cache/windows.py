"""Layers that see a part of the sequence only: which are compressed, and by which cache.

Hosts keep a sliding window in a ``RotatingKVCache`` and chunked attention in a
``ChunkedKVCache``; both hold a bounded number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rotormlx.codec.counts import LEAST_SLIDING_WINDOW
from rotormlx.config import RotorConfig
from rotormlx.mlx.cache.chunked import ChunkedRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.sliding import SlidingRotorKVCache
from rotormlx.mlx.host_caches import CHUNKED, ROTATING, is_a, is_exactly

# What takes the place of a cache of a layer, by its index; None where it is left alone.
WindowMaker = Callable[[int, Any], RotorKVCache | None]


def size(cache: Any) -> int | None:
    """The tokens that a token sees at most; None of a cache without such a number."""
    if isinstance(cache, SlidingRotorKVCache):
        return cache.sliding_window
    if is_a(cache, ROTATING):
        return int(cache.max_size)
    if isinstance(cache, ChunkedRotorKVCache) or is_a(cache, CHUNKED):
        return int(cache.chunk_size)
    return None


def is_compressible(cache: Any) -> bool:
    """Whether a cache of a host is such that a compressed one can take its place."""
    # Exactly these classes: what derives from one may promise more. With ``keep``, a
    # RotatingKVCache is no sliding window but a cache with a limit.
    if is_exactly(cache, ROTATING):
        return bool(cache.keep == 0 and cache.max_size >= LEAST_SLIDING_WINDOW)
    return is_exactly(cache, CHUNKED) and bool(cache.chunk_size >= LEAST_SLIDING_WINDOW)


def reason_alone(cache: Any) -> str:
    """Why a cache of a host with such a number is left alone."""
    tokens = size(cache) or 0
    if tokens < LEAST_SLIDING_WINDOW:
        return f"its window of {tokens} tokens is below {LEAST_SLIDING_WINDOW}"
    if is_compressible(cache):
        return f"its window of {tokens} tokens stays exact (sliding_windows is off)"
    return f"it keeps {tokens} tokens in a way that rotormlx does not support"


def maker(config: RotorConfig, max_kv_size: int | None = None) -> WindowMaker:
    """Return a function that makes the compressed caches of such layers.

    Args:
        config: How to compress. What is calibrated is for the other layers.
        max_kv_size: The most tokens of a cache; a wider window gives way to it.

    Raises:
        ValueError: When a cache is made, if ``max_kv_size`` has no room for a block.
    """
    config = config.uncalibrated

    def make(layer: int, cache: Any) -> RotorKVCache | None:
        if not is_compressible(cache):
            return None
        tokens = size(cache) or 0
        if max_kv_size is not None and max_kv_size < tokens:
            return RotorKVCache(config, layer, max_kv_size)
        if is_exactly(cache, ROTATING):
            return SlidingRotorKVCache(tokens, config, layer)
        return ChunkedRotorKVCache(tokens, config, layer)

    return make


def compressed(cache: Any, like: RotorKVCache) -> RotorKVCache | None:
    """A filled cache of a host as one like this; None if it is of another kind or dropped tokens.

    The source is left as it is.
    """
    if is_exactly(cache, ROTATING) and isinstance(like, SlidingRotorKVCache):
        # Then every token is where it was appended.
        if cache.keep or cache.offset != cache._idx:
            return None
        made: RotorKVCache = SlidingRotorKVCache(cache.max_size, like.config, like.layer)
        start, stop = 0, cache.offset
    elif is_exactly(cache, CHUNKED) and isinstance(like, ChunkedRotorKVCache):
        made = like.begun_for(cache.offset)
        start, stop = (n - cache.start_position for n in (made.offset, cache.offset))
    else:
        return None
    if not cache.empty():
        made.append_all(cache.keys, cache.values, start, stop)
    return made
