"""What prefix stores of servers do to compressed caches."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from rotormlx.config import RotorConfig
from rotormlx.mlx import prefix_stores
from rotormlx.mlx.cache.single import RotorKVCache

B, K, D = 1, 2, 32
CONFIG = RotorConfig(key_bits=4, value_bits=3, window=0)


def tokens(count, seed):
    return mx.random.normal((B, K, count, D), key=mx.random.key(seed))


def filled(count, cache=None):
    cache = RotorKVCache(CONFIG) if cache is None else cache
    cache.update_and_fetch(tokens(count, 1), tokens(count, 2))
    return cache


def same(a, b):
    pairs = zip(a.state, b.state, strict=True)
    return all(mx.array_equal(x, y) if isinstance(x, mx.array) else x == y for x, y in pairs)


def own_trim(caches, count):
    """As a server does it with caches of mlx-lm."""
    made = []
    for cache in caches:
        assert type(cache) is KVCache
        twin = copy.copy(cache)
        twin.offset -= count
        made.append(twin)
    return made


def test_a_trimmed_prefix_has_fewer_tokens_and_the_stored_one_keeps_its_own():
    caches = [filled(300), filled(300, KVCache()), filled(300)]
    before = copy.deepcopy(caches[0])
    made = prefix_stores.trimmed(own_trim, caches, 130)
    assert [type(cache) for cache in made] == [RotorKVCache, KVCache, RotorKVCache]
    assert [cache.offset for cache in made] == [170, 170, 170]
    assert [cache.offset for cache in caches] == [300, 300, 300]
    before.trim(130)
    assert same(made[0], before)
    filled(200, made[0])  # the next prompt goes on behind it
    assert same(caches[0], filled(300))


def test_caches_of_others_may_be_refused():
    assert prefix_stores.trimmed(lambda caches, count: None, [filled(100)], 3) is None


def test_a_cache_that_evicted_is_not_trimmed():
    limited = RotorKVCache(CONFIG, max_size=200)
    filled(500, limited)
    with pytest.raises(ValueError, match=r"^\[prefix store\] A cache that can be trimmed by 9 "):
        prefix_stores.trimmed(own_trim, [limited], 9)


def test_a_stored_copy_stays_as_it_is_when_the_other_goes_on():
    caches = [filled(300), filled(70, KVCache())]
    taken = []

    def own_copy(others, _eval_targets=None):
        taken.append(_eval_targets)
        return [copy.deepcopy(cache) for cache in others]

    made = prefix_stores.copied(own_copy, caches, _eval_targets=["targets"])
    assert [type(cache) for cache in made] == [RotorKVCache, KVCache]
    assert taken == [["targets"]]
    assert same(made[0], caches[0])
    assert made[0].used_bytes == caches[0].used_bytes
    filled(100, caches[0])
    assert made[0].offset == 300
    assert same(made[0], filled(300))


def test_a_limit_of_a_server_holds_for_compressed_caches_too():
    caches = [RotorKVCache(CONFIG, layer=1), KVCache()]
    made = prefix_stores.limited(lambda given, size: [given[0], size], caches, 200)
    assert (made[0].max_size, made[0].layer, made[1]) == (200, 1, 200)
    assert filled(500, made[0]).size() <= 200 < 500
    assert same(made[0], filled(500, RotorKVCache(CONFIG, layer=1, max_size=200)))
    smaller = RotorKVCache(CONFIG, max_size=150)  # as a sliding window has it
    assert prefix_stores.limited(lambda given, _: given, [smaller], 200)[0].max_size == 150
    with pytest.raises(ValueError, match="10"):
        prefix_stores.limited(lambda given, size: given, [RotorKVCache(CONFIG)], 10)


@pytest.mark.parametrize("size", [None, 200])
def test_a_batch_generator_limits_the_caches_that_it_makes(size):
    generator = SimpleNamespace(max_kv_size=size)
    made = prefix_stores.made_anew(lambda of: [RotorKVCache(CONFIG), of], generator)
    assert (made[0].max_size, made[1]) == (size, generator)


def test_a_paged_store_is_for_exact_caches():
    made = []

    def own(store, model, manager, size=1):
        made.append((store, model, manager, size))

    exact, plain = SimpleNamespace(make_cache=lambda: [KVCache()]), SimpleNamespace()
    for model in (exact, plain):
        prefix_stores.paged(own, "store", model, "manager", size=3)
    assert made == [("store", exact, "manager", 3), ("store", plain, "manager", 3)]
    compressed = SimpleNamespace(make_cache=lambda: [KVCache(), RotorKVCache(CONFIG)])
    with pytest.raises(ValueError, match="leave --use-paged-cache out"):
        prefix_stores.paged(own, "store", compressed, "manager")


def test_who_copies_keys_and_values_is_refused():
    """A server of another version gets an error, and no cache without its tokens."""
    with pytest.raises(AttributeError, match=r"copy it with copy\.deepcopy"):
        filled(300).values  # noqa: B018
    with pytest.raises(ValueError, match="The cache is empty"):
        RotorKVCache(CONFIG).values = mx.zeros(3)
