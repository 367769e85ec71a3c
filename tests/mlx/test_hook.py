import inspect
from types import CodeType

import mlx.core as mx
import mlx_lm
import mlx_lm.models.base as base
import mlx_lm.models.cache as mlx_lm_cache
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import (
    CacheList,
    KVCache,
    QuantizedKVCache,
    load_prompt_cache,
    save_prompt_cache,
)

from rotormlx.config import RotorConfig
from rotormlx.mlx import hook, hosts
from rotormlx.mlx.cache.single import RotorKVCache
from tests.support.mlx_lm_versions import since_0_32

B, H, K, L, S, D = 1, 6, 3, 5, 11, 64
SCALE = D**-0.5


@pytest.fixture(autouse=True)
def original_code():
    """mlx-lm as it came, before and after each test."""
    hosts.MLX_LM.remove()
    yield base.scaled_dot_product_attention.__code__
    hosts.MLX_LM.remove()


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def filled(cache):
    return cache.update_and_fetch(random(B, K, S, D, seed=1), random(B, K, S, D, seed=2))


def test_install_reaches_modules_that_bound_the_function_before(original_code: CodeType) -> None:
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention
    hosts.MLX_LM.install()
    assert hosts.MLX_LM.installed()
    assert llama.scaled_dot_product_attention.__code__ is not original_code


def test_remove_restores_the_very_code_object(original_code: CodeType) -> None:
    hosts.MLX_LM.install()
    hosts.MLX_LM.install()
    hosts.MLX_LM.remove()
    assert base.scaled_dot_product_attention.__code__ is original_code
    assert not hasattr(mlx_lm_cache, "RotorKVCache")
    assert not hasattr(mlx_lm_cache, "BatchRotorKVCache")
    assert not hosts.MLX_LM.installed()
    hosts.MLX_LM.remove()
    assert base.scaled_dot_product_attention.__code__ is original_code


@pytest.mark.parametrize("kind", [KVCache, QuantizedKVCache])
def test_other_caches_give_the_same_bits_as_before(kind: type) -> None:
    queries, cache = random(B, H, L, D), kind()
    keys, values = filled(cache)

    def attend() -> mx.array:
        # The quantized path scales the queries in place.
        arguments = (queries + 0, keys, values, cache)
        return llama.scaled_dot_product_attention(*arguments, scale=SCALE, mask="causal")

    before = attend()
    hosts.MLX_LM.install()
    assert mx.array_equal(attend(), before).item()


@pytest.mark.parametrize("with_sinks", [False, True])
def test_compressed_keys_are_known_by_their_type_without_a_cache(with_sinks: bool) -> None:
    queries = random(B, H, L, D)
    sinks = random(H, seed=3) if with_sinks else None
    want = mx.fast.scaled_dot_product_attention(
        queries, *filled(KVCache()), scale=SCALE, mask="causal", sinks=sinks
    )
    views = filled(RotorKVCache(RotorConfig(), layer=0))
    with pytest.raises(TypeError):
        llama.scaled_dot_product_attention(queries, *views, None, SCALE, "causal", sinks)
    hosts.MLX_LM.install()
    got = llama.scaled_dot_product_attention(queries, *views, None, SCALE, "causal", sinks)
    # All 11 tokens are exact; float32 sums over 64 terms in another order.
    assert mx.allclose(got, want, atol=1e-5).item()


def test_record_attention_collects_views_only_inside() -> None:
    hosts.MLX_LM.install()
    queries = random(B, H, L, D)
    views, arrays = filled(RotorKVCache(RotorConfig(), layer=0)), filled(KVCache())

    def attend(pair) -> None:
        llama.scaled_dot_product_attention(queries, *pair, None, SCALE, "causal")

    with hook.record_attention() as seen:
        attend(arrays)
        attend(views)
        with hook.record_attention() as inner:
            attend(views)
    attend(views)
    assert len(seen) == len(inner) == 1
    assert seen[0].queries is queries
    assert (seen[0].keys, seen[0].values) == views


@since_0_32("holds arrays only in files of its own")
@pytest.mark.parametrize("in_list", [False, True])
def test_prompt_cache_files_know_the_class_while_installed(tmp_path, in_list: bool) -> None:
    cache = RotorKVCache(RotorConfig(key_bits=3, seed=5), layer=7)
    filled(cache)
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, [CacheList(KVCache(), cache) if in_list else cache])
    with pytest.raises(KeyError):
        load_prompt_cache(path)
    hosts.MLX_LM.install()
    (loaded,) = load_prompt_cache(path)
    loaded = loaded[1] if in_list else loaded
    assert type(loaded) is RotorKVCache
    assert (loaded.config, loaded.layer, loaded.offset) == (cache.config, 7, S)


@pytest.mark.parametrize("in_list", [False, True])
def test_every_version_saves_and_loads_compressed_caches(tmp_path, in_list: bool) -> None:
    cache, plain = RotorKVCache(RotorConfig(key_bits=3, seed=5), layer=7), KVCache()
    filled(cache)
    filled(plain)
    path = str(tmp_path / "cache.safetensors")
    with hosts.MLX_LM.in_place():
        save_prompt_cache(
            path, [CacheList(plain, cache)] if in_list else [plain, cache], {"a": "b"}
        )
        loaded, metadata = load_prompt_cache(path, return_metadata=True)
    exact, packed = loaded[0].caches if in_list else loaded
    assert metadata == {"a": "b"}
    assert (type(exact), type(packed)) == (KVCache, RotorKVCache)
    assert exact.offset == packed.offset == S
    assert mx.array_equal(exact.keys[:, :, :S], plain.keys[:, :, :S])
    same = zip(packed.state, cache.state, strict=True)
    assert all(mx.array_equal(a, b) if isinstance(a, mx.array) else a == b for a, b in same)


def test_files_of_plain_caches_are_the_hosts_own(tmp_path) -> None:
    filled(plain := QuantizedKVCache())
    path, own = tmp_path / "cache.safetensors", tmp_path / "own.safetensors"
    save_prompt_cache(str(own), [plain])
    with hosts.MLX_LM.in_place():
        save_prompt_cache(str(path), [plain])
        (loaded,) = load_prompt_cache(str(path))
    assert path.read_bytes() == own.read_bytes()
    assert type(loaded) is QuantizedKVCache
    assert mx.array_equal(loaded.keys[0][:, :, :S], plain.keys[0][:, :, :S])


def more_parameters(queries, keys, values, cache, scale, mask, sinks=None, window=None):
    raise NotImplementedError


def other_order(queries, keys, values, scale, cache, mask, sinks=None):
    raise NotImplementedError


def other_default(queries, keys, values, cache, scale, mask, sinks=0):
    raise NotImplementedError


def no_default(queries, keys, values, cache, scale, mask, sinks):
    raise NotImplementedError


def any_keywords(queries, keys, values, cache, scale, mask, sinks=None, **kwargs):
    raise NotImplementedError


def keyword_only(queries, keys, values, cache, scale, mask, sinks=None, *, window=None):
    raise NotImplementedError


def wrapper():
    inner = 1

    def closure(queries, keys, values, cache, scale, mask, sinks=None):
        return inner

    return closure


@pytest.mark.parametrize(
    "function",
    [
        more_parameters,
        other_order,
        other_default,
        no_default,
        any_keywords,
        keyword_only,
        wrapper(),
    ],
    ids=lambda f: f.__name__,
)
def test_another_signature_is_refused_and_nothing_changed(monkeypatch, function) -> None:
    code = function.__code__
    monkeypatch.setattr(base, "scaled_dot_product_attention", function)
    with pytest.raises(RuntimeError, match=r"^\[hook\] .*pip install 'mlx-lm==") as error:
        hosts.MLX_LM.install()
    assert mlx_lm.__version__ in str(error.value)
    assert function.__code__ is code
    assert not hosts.MLX_LM.installed()
    assert not hasattr(mlx_lm_cache, "RotorKVCache")


@pytest.mark.parametrize("version", ["0.31.2", "0.32.2", "0.32.3.dev20260901", "0.33.0", "1.0.0"])
def test_a_version_that_nobody_tested_is_tried(monkeypatch, version: str) -> None:
    monkeypatch.setattr(mlx_lm, "__version__", version)
    hosts.MLX_LM.install()
    assert hosts.MLX_LM.installed()


def test_a_missing_function_is_refused_with_the_versions_that_work(monkeypatch) -> None:
    monkeypatch.delattr(base, "scaled_dot_product_attention")
    with pytest.raises(RuntimeError, match=r"versions 0\.31\.3 to 0\.32\.2 work"):
        hosts.MLX_LM.install()
    assert not hosts.MLX_LM.installed()


def test_functions_keep_their_signature_while_their_code_is_exchanged() -> None:
    functions = [exchange.function for exchange in hosts.MLX_LM.exchanges]
    before = [inspect.signature(function) for function in functions]
    hosts.MLX_LM.install()
    during = [inspect.signature(function) for function in functions]
    codes = [function.__code__.co_name for function in functions]
    hosts.MLX_LM.remove()
    assert [list(s.parameters) for s in during] == [list(s.parameters) for s in before]
    assert all(name.startswith("_") for name in codes)
    assert [inspect.signature(function) for function in functions] == before
    assert not any("__signature__" in vars(function) for function in functions)
