"""The compressed caches of layers that see only a part of the sequence.

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

# Takes the index and the cache of a layer; returns its compressed cache, or None to leave it alone.
WindowMaker = Callable[[int, Any], RotorKVCache | None]


def size(cache: Any) -> int | None:
    """Return the most tokens that a token sees; None for a cache without such a limit."""
    if isinstance(cache, SlidingRotorKVCache):
        return cache.sliding_window
    if is_a(cache, ROTATING):
        return int(cache.max_size)
    if isinstance(cache, ChunkedRotorKVCache) or is_a(cache, CHUNKED):
        return int(cache.chunk_size)
    return None


def is_compressible(cache: Any) -> bool:
    """Whether a compressed cache can take the place of a host's window or chunk."""
    # Exactly these classes, because a derived one may promise more. With ``keep``, a
    # RotatingKVCache is a cache with a limit, not a sliding window.
    if is_exactly(cache, ROTATING):
        return bool(cache.keep == 0 and cache.max_size >= LEAST_SLIDING_WINDOW)
    return is_exactly(cache, CHUNKED) and bool(cache.chunk_size >= LEAST_SLIDING_WINDOW)


def reason_alone(cache: Any) -> str:
    """Return the reason why a host's window or chunk is left alone."""
    tokens = size(cache) or 0
    if tokens < LEAST_SLIDING_WINDOW:
        return f"its window of {tokens} tokens is below {LEAST_SLIDING_WINDOW}"
    if is_compressible(cache):
        return f"its window of {tokens} tokens stays exact (sliding_windows is off)"
    return f"it keeps {tokens} tokens in a way that rotormlx does not support"


def maker(config: RotorConfig, max_kv_size: int | None = None) -> WindowMaker:
    """Return a function that makes the compressed caches of such layers.

    Args:
        config: The compression settings; its calibration is for other layers and not used.
        max_kv_size: The most tokens of a cache; it replaces a wider window.

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
    """Compress a filled cache of a host like another compressed cache; the source is unchanged.

    Args:
        cache: The cache of the host.
        like: A compressed cache of the same layer, whose settings are used.

    Returns:
        The compressed cache; None if the kinds differ, or if a sliding window has dropped tokens.
    """
    if is_exactly(cache, ROTATING) and isinstance(like, SlidingRotorKVCache):
        # Only then is every token still where it was appended.
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
