"""The package's MLX side: backends, caches and what is built into mlx-lm."""

from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.sliding import BatchSlidingRotorKVCache, SlidingRotorKVCache

# mlx-lm makes a batch by ``type(cache).merge(caches)``, and single caches again from its rows, so
# each class makes the other. They meet here, where everyone comes by who imports either.
RotorKVCache.merge = BatchRotorKVCache.merge
SlidingRotorKVCache.merge = BatchSlidingRotorKVCache.merge
