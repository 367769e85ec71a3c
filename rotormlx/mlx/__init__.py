"""The MLX part of the package: backends, caches and the integration into hosts."""

from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.decoded import BatchDecodedRotorKVCache, DecodedRotorKVCache
from rotormlx.mlx.cache.latent import (
    BatchDecodedLatentKVCache,
    BatchLatentKVCache,
    DecodedLatentKVCache,
    LatentKVCache,
)
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.sliding import BatchSlidingRotorKVCache, SlidingRotorKVCache

# Hosts make a batch with ``type(cache).merge(caches)``, and single caches from its rows, so each
# class needs the other. They are connected here, because importing either runs this file.
RotorKVCache.batch = BatchRotorKVCache
DecodedRotorKVCache.batch = BatchDecodedRotorKVCache
LatentKVCache.batch = BatchLatentKVCache
DecodedLatentKVCache.batch = BatchDecodedLatentKVCache
SlidingRotorKVCache.batch = BatchSlidingRotorKVCache
