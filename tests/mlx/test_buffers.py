"""How the buffers of a cache lie in memory: kernels count on rows without gaps in each KV head."""

import math

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.config import RotorConfig
from rotormlx.mlx.cache.single import RotorKVCache

K, D = 2, 64
LONGER_THAN_ITS_ROOM = 500


def turned(count, seed=0, rows=1):
    """Tokens as a model gives them: ``[B, S, K, D]``, seen as ``[B, K, S, D]``."""
    x = np.random.default_rng(seed).normal(size=(rows, count, K, D)).astype(np.float16)
    return mx.swapaxes(mx.array(x), 1, 2)


def filled(*counts):
    cache = RotorKVCache(RotorConfig())
    for seed, count in enumerate(counts):
        cache.update_and_fetch(turned(count, seed), turned(count, seed))
    return cache


def trimmed():
    cache = filled(LONGER_THAN_ITS_ROOM, 1)
    cache.trim(20)
    return cache


def restored():
    made = filled(LONGER_THAN_ITS_ROOM, 1)
    cache = RotorKVCache(RotorConfig())
    cache.state = made.state
    return cache


def batch():
    made = RotorKVCache.merge([filled(300), filled(90), filled(LONGER_THAN_ITS_ROOM)])
    for seed in range(70):
        made.update_and_fetch(turned(1, seed, rows=3), turned(1, seed, rows=3))
    return made


def kept_of_batch():
    made = batch()
    made.filter([2, 0])
    return made


CACHES = {
    "first chunk": lambda: filled(3),
    "long chunk": lambda: filled(LONGER_THAN_ITS_ROOM),
    "packed": lambda: filled(LONGER_THAN_ITS_ROOM, 1),
    "packed later": lambda: filled(100, *[1] * 150),
    "trimmed": trimmed,
    "restored": restored,
    "batch": batch,
    "kept of a batch": kept_of_batch,
    "one of a batch": lambda: batch().extract(2),
}


def lie_row_by_row(a):
    """Whether what is behind the first two axes, batch and KV heads, has no gaps."""
    array = np.asarray(a)
    strides = [stride // array.itemsize for stride in array.strides[2:]]
    inner = array.shape[2:]
    expected = [math.prod(inner[i + 1 :]) for i in range(len(inner))]
    return all(n == 1 or s == e for n, s, e in zip(inner, strides, expected, strict=True))


@pytest.mark.parametrize("made", CACHES.values(), ids=CACHES)
def test_buffers_lie_row_by_row_in_each_kv_head(made):
    for view in made().keys_and_values():
        buffers = [view.exact, *(view.packed or ())]
        assert all(lie_row_by_row(a) for a in buffers if a is not None)
        # Of a channel scale, the rows of a batch too.
        assert view.channel_scale is None or lie_row_by_row(view.channel_scale[None, None])
        assert view.row(0).packed is None or lie_row_by_row(view.row(0).packed.words)


def test_what_does_not_lie_so_is_seen():
    assert not lie_row_by_row(turned(3))
    assert not lie_row_by_row(mx.zeros((1, K, 9, 8))[..., ::2])
    assert lie_row_by_row(mx.zeros((1, K, 9, 8))[:, :, :4])
