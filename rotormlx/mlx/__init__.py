"""The package's MLX side: backends, caches and what is built into its hosts."""

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

# Hosts make a batch by ``type(cache).merge(caches)``, and single caches again from its rows, so
# each class makes the other. They meet here, where everyone comes by who imports either.
RotorKVCache.batch = BatchRotorKVCache
DecodedRotorKVCache.batch = BatchDecodedRotorKVCache
LatentKVCache.batch = BatchLatentKVCache
DecodedLatentKVCache.batch = BatchDecodedLatentKVCache
SlidingRotorKVCache.batch = BatchSlidingRotorKVCache
