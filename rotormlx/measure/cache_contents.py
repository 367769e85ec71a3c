"""The content of a cache of any kind: its vectors, bits per value and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from numpy.typing import NDArray

from rotormlx.codec import reference
from rotormlx.codec.format import BLOCK, Packed
from rotormlx.measure.baselines import SimulatedCache
from rotormlx.mlx.backends import backend
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView
from rotormlx.mlx.host_caches import leaves


def decoded(cache: Any) -> tuple[mx.array, mx.array]:
    """Return all keys and values of any cache as attention reads them, ``[B, K, S, D]``."""
    keys, values = cache.keys_and_values()
    if isinstance(cache, QuantizedKVCache):
        size, bits = cache.group_size, cache.bits

        def back(words: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
            return mx.dequantize(words, scales, biases, group_size=size, bits=bits)

        return back(*keys), back(*values)
    return _of_view(keys), _of_view(values)


def score_noise(cache: Any, queries: NDArray[np.float32], scale: float) -> NDArray[np.float64]:
    """Return the numbers that attention subtracts from the scores ``[B, H, L, S]`` of the queries.

    They are zero for exact tokens, and in every cache that is not rotormlx's.
    """
    keys, _ = cache.keys_and_values()
    if not isinstance(keys, KVView) or keys.packed is None or not keys.packed_tokens:
        return np.zeros((1, 1, 1, 1))
    packed = Packed(*(None if a is None else np.array(a) for a in keys.packed))
    own = None if keys.channel_scale is None else np.array(keys.channel_scale)
    found = reference.score_noise(queries, packed, keys.codec, scale=scale, channel_scale=own)
    around = (keys.sink, keys.exact_tokens - keys.sink)
    return np.pad(found[..., : keys.packed_tokens], [(0, 0)] * 3 + [around])


def bits_per_value(caches: Sequence[Any]) -> float:
    """Return the bits per compressed value, or per value of exact caches; the mean over layers."""
    return float(np.mean([_bits(c) for _, _, c in leaves(caches) if _bits(c)]))


def used_bytes(caches: Sequence[Any]) -> int:
    """Return the bytes of the tokens that caches hold, without room for growth."""
    return sum(_used(cache) for _, _, cache in leaves(caches))


def exact_tokens(cache: Any) -> tuple[int, int]:
    """Return the numbers of first and latest tokens that a cache never packs: sink and window."""
    rule = getattr(cache, "config", cache)
    return getattr(rule, "sink", 0), getattr(rule, "window", 0)


def block_tokens(cache: Any) -> int:
    """Return the number of tokens that a cache packs together."""
    return cache.codec.block if isinstance(cache, SimulatedCache) else BLOCK


def compressed(caches: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Yield the growing caches of a model, compressed or exact, with the index of their layer."""
    kinds = (RotorKVCache, SimulatedCache, QuantizedKVCache)
    for index, _, held in leaves(caches):
        if isinstance(held, kinds) or type(held) is KVCache:
            yield index, held


def _of_view(view: Any) -> mx.array:
    if not isinstance(view, KVView):
        return view
    if view.packed is None or not view.packed_tokens:
        return view.exact[:, :, : view.tokens]
    packed = backend().decode(view.packed, view.codec, channel_scale=view.channel_scale)
    exact = view.exact[:, :, : view.exact_tokens].astype(mx.float32)
    parts = [exact[:, :, : view.sink], packed[:, :, : view.packed_tokens], exact[:, :, view.sink :]]
    return mx.concatenate(parts, axis=2)


def _bits(cache: Any) -> float | None:
    if isinstance(cache, (RotorKVCache, SimulatedCache)):
        return cache.bits_per_value
    keys: Any = getattr(cache, "keys", None)
    if isinstance(cache, QuantizedKVCache):
        return float(cache.bits + 2 * 8 * keys[1].itemsize / cache.group_size)  # scale and bias
    if type(cache) is KVCache:
        return float(8 * keys.itemsize)
    return None


def _used(cache: Any) -> int:
    if isinstance(cache, RotorKVCache):
        return cache.used_bytes
    if not isinstance(cache, (KVCache, QuantizedKVCache)):
        return int(cache.nbytes)
    used: Any = cache.keys_and_values()  # type: ignore[no-untyped-call]
    arrays: Any = tree_flatten(used)
    return sum(leaf.nbytes for _, leaf in arrays if isinstance(leaf, mx.array))
