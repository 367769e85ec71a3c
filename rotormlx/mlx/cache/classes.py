"""The classes of compressed caches by name, for files and hosts that look them up."""

from __future__ import annotations

from typing import Any

from rotormlx.mlx.cache.base import StoredCache
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.chunked import ChunkedRotorKVCache
from rotormlx.mlx.cache.decoded import BatchDecodedRotorKVCache, DecodedRotorKVCache
from rotormlx.mlx.cache.latent import (
    BatchDecodedLatentKVCache,
    BatchLatentKVCache,
    DecodedLatentKVCache,
    LatentKVCache,
)
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.sliding import BatchSlidingRotorKVCache, SlidingRotorKVCache

CLASSES: dict[str, type[StoredCache[Any]]] = {
    kind.__name__: kind
    for kind in (
        *(RotorKVCache, BatchRotorKVCache),
        *(DecodedRotorKVCache, BatchDecodedRotorKVCache),
        *(LatentKVCache, BatchLatentKVCache),
        *(DecodedLatentKVCache, BatchDecodedLatentKVCache),
        *(SlidingRotorKVCache, BatchSlidingRotorKVCache, ChunkedRotorKVCache),
    )
}
