"""RotorKVCache: the packed bytes, trimming, saving, memory, and mlx-lm's contract."""

import copy
import gc

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

from rotormlx.codec.format import BLOCK, FORMAT_VERSION
from rotormlx.config import RotorConfig
from rotormlx.mlx import hosts
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.trim import trim_prompt_cache

B, K, H, D, DV = 1, 2, 6, 64, 80
TOKENS = 1000
CONFIGS = {
    "cascade": RotorConfig(),
    "k3v2-rotor3": RotorConfig(key_bits=3, value_bits=2, rotation="rotor3"),
    "k8v4-dense-w0": RotorConfig(key_bits=8, rotation="dense", window=0, sink=0),
    "k2v3-w100": RotorConfig(key_bits=2, value_bits=3, window=100, sink=7, seed=5),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(autouse=True)
def registered():
    """``load_prompt_cache`` finds our class only where the hook has put it."""
    with hosts.MLX_LM.in_place():
        yield


def tokens(count=TOKENS, seed=0, dtype=mx.float16):
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(B, K, count, D)) + 3 * rng.normal(size=D)
    values = rng.normal(size=(B, K, count, DV))
    return mx.array(keys.astype(np.float32)).astype(dtype), mx.array(
        values.astype(np.float32)
    ).astype(dtype)


def filled(config, keys, values, chunks):
    cache = RotorKVCache(config, layer=3)
    start = 0
    while start < keys.shape[2]:
        part = slice(start, start + chunks)
        cache.update_and_fetch(keys[:, :, part], values[:, :, part])
        start += chunks
    return cache


def contents(cache):
    """Everything that counts; lanes behind the last packed token do not."""
    state = list(cache.state)
    if filled_lanes := cache.packed_tokens % BLOCK:
        # header 5; exact, words, scales, centres, channel scale of the keys, then of the values
        for first, store in zip((5, 10), (cache._keys, cache._values), strict=True):
            words, scales = np.array(state[first + 1]), np.array(state[first + 2])
            words[:, :, -1] &= store.codec.kept_bits(filled_lanes)
            scales[:, :, -1, filled_lanes:] = 0
            state[first + 1 : first + 3] = words, scales
    return state


def assert_same(a, b):
    for x, y in zip(contents(a), contents(b), strict=True):
        assert np.array_equal(comparable(x), comparable(y))


def comparable(entry):
    return np.array(entry.astype(mx.float32)) if isinstance(entry, mx.array) else np.array(entry)


def attend(cache, seed=7, length=1):
    q = np.random.default_rng(seed).normal(size=(B, H, length, D)).astype(np.float32)
    return np.array(
        attend_view(mx.array(q), *cache.keys_and_values(), scale=D**-0.5, mask="causal")
    )


# ---- the packed bytes ---------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 37, 64, 500])
def test_bytes_do_not_depend_on_chunks(config, chunks):
    keys, values = tokens(TOKENS if chunks > 1 else 300)
    assert_same(filled(config, keys, values, chunks), filled(config, keys, values, TOKENS))


def test_counts_follow_the_rule(config):
    """The tail holds window to window + 63 tokens once something is packed."""
    keys, values = tokens(400)
    cache = RotorKVCache(config)
    for n in range(400):
        cache.update_and_fetch(keys[:, :, n : n + 1], values[:, :, n : n + 1])
        expected = max(0, (n + 1 - config.sink - config.window) // BLOCK * BLOCK)
        assert (cache.offset, cache.packed_tokens) == (n + 1, expected)


def test_parts_are_where_they_belong(config):
    """Sink and tail are the tokens themselves; packed ones decode to about themselves."""
    keys, values = tokens()
    cache = filled(config, keys, values, 128)
    tail = config.sink + cache.packed_tokens
    for store, x in ((cache._keys, keys), (cache._values, values)):
        exact = store.exact[:, :, : TOKENS - cache.packed_tokens]
        expected = mx.concatenate([x[:, :, : config.sink], x[:, :, tail:]], axis=2)
        assert mx.array_equal(exact, expected)


def test_new_tokens_are_attended_exactly():
    """The chunk just appended is read as it came, whatever its length; only history is packed."""
    keys, values = tokens(300)
    cache = RotorKVCache(RotorConfig(2, 2))
    views = cache.update_and_fetch(keys, values)
    assert cache.packed_tokens == 192
    q = mx.ones((B, H, 1, D))
    exact = mx.fast.scaled_dot_product_attention(
        q, keys.astype(mx.float32), values.astype(mx.float32), scale=0.1
    )
    first = attend_view(q, *views, scale=0.1)
    later = attend_view(q, *cache.keys_and_values(), scale=0.1)
    assert mx.allclose(first, exact, atol=1e-5)
    assert not mx.allclose(later, exact, atol=1e-3)


def test_a_view_does_not_change_later():
    """Though buffers are written in place: the exact one, and the last block when it is filled."""
    cache = filled(RotorConfig(), *tokens(300), 300)
    others, other_values = tokens(250, seed=1)
    for trimmed, appended in ((5, 5), (130, 150)):
        views = cache.keys_and_values()
        # Not evaluated before the cache goes on.
        later = attend_view(mx.ones((B, H, 1, D)), *views, scale=0.1)
        now = np.array(attend_view(mx.ones((B, H, 1, D)), *copy.deepcopy(views), scale=0.1))
        cache.trim(trimmed)
        for n in range(appended):
            cache.update_and_fetch(others[:, :, n : n + 1], other_values[:, :, n : n + 1])
        again = attend_view(mx.ones((B, H, 1, D)), *views, scale=0.1)
        assert np.array_equal(now, np.array(again))
        assert np.array_equal(now, np.array(later))


# ---- trim ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 20, 64, 90, 130, 300, 997, 1000, 2000])
def test_trim_then_append_again_is_as_if_nothing_happened(config, n):
    keys, values = tokens()
    never, cache = (filled(config, keys, values, 500) for _ in range(2))
    assert cache.trim(n) == min(n, TOKENS)
    kept = cache.offset
    assert kept == TOKENS - min(n, TOKENS)
    for start in range(kept, TOKENS, 50):
        part = slice(start, min(start + 50, TOKENS))
        cache.update_and_fetch(keys[:, :, part], values[:, :, part])
    assert_same(cache, never)
    assert np.array_equal(attend(cache), attend(never))


@pytest.mark.parametrize("kept", [2, 60, 130, 301, 640, 900, TOKENS - 3])
def test_trimmed_with_its_window_and_read_again_is_as_if_no_more_had_come(config, kept):
    keys, values = tokens()
    never, cache = (filled(config, keys[:, :, :n], values[:, :, :n], 500) for n in (kept, TOKENS))
    count = trim_prompt_cache([cache], TOKENS - kept)
    assert cache.offset == TOKENS - count
    assert 0 <= kept - cache.offset <= max(config.window + BLOCK - 1, 0)
    part = slice(cache.offset, kept)
    cache.update_and_fetch(keys[:, :, part], values[:, :, part])
    assert_same(cache, never)


def test_trim_in_the_tail_is_as_if_never_appended(config):
    """Other tokens after the trim: the trimmed ones leave no trace."""
    keys, values = tokens()
    other_keys, other_values = tokens(400, seed=1)
    trimmed = filled(config, keys, values, 500)
    in_tail = TOKENS - config.sink - trimmed.packed_tokens
    trimmed.trim(in_tail)
    assert trimmed.packed_tokens == trimmed.offset - config.sink
    never = filled(config, keys[:, :, :-in_tail], values[:, :, :-in_tail], 500)
    for cache in (trimmed, never):
        cache.update_and_fetch(other_keys, other_values)
    assert_same(trimmed, never)


def test_no_row_is_quantized_twice(config):
    """A trim into the packed part and other tokens after it leave the rows before it alone."""
    keys, values = tokens()
    cache = filled(config, keys, values, 500)
    words = [np.array(store.packed.words) for store in (cache._keys, cache._values)]
    centres = np.array(cache._keys.packed.centres)
    cache.trim(TOKENS - config.sink - 300)
    assert cache.packed_tokens == 300
    cache.update_and_fetch(*tokens(500, seed=1))
    assert cache.packed_tokens > 300 + BLOCK
    for store, before in zip((cache._keys, cache._values), words, strict=True):
        after = np.array(store.packed.words)
        assert np.array_equal(after[:, :, :4], before[:, :, :4])
        kept = store.codec.kept_bits(300 - 4 * BLOCK)
        assert np.array_equal(after[:, :, 4] & kept, before[:, :, 4] & kept)
        assert not np.array_equal(after[:, :, 4], before[:, :, 4])
    assert np.array_equal(np.array(cache._keys.packed.centres)[:, :, :5], centres[:, :, :5])


def test_trimmed_tokens_are_not_attended(config):
    keys, values = tokens()
    cache = filled(config, keys, values, 500)
    before = [attend_prefix(cache, n) for n in (700, 300, 2)]
    for n, expected in zip((700, 300, 2), before, strict=True):
        cache.trim(cache.offset - n)
        assert np.allclose(attend(cache), expected, atol=1e-6)


def attend_prefix(cache, n, seed=7):
    """What a cache would answer if it held its first n tokens only, by masking."""
    q = np.random.default_rng(seed).normal(size=(B, H, 1, D)).astype(np.float32)
    mask = mx.arange(cache.offset) < n
    return np.array(attend_view(mx.array(q), *cache.keys_and_values(), scale=D**-0.5, mask=mask))


# ---- save, load, copy ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 3, 70, 300, 1000])
@pytest.mark.parametrize("trimmed", [0, 110])
def test_saved_cache_continues_bit_for_bit(config, count, trimmed, tmp_path):
    keys, values = tokens()
    cache = filled(config, keys[:, :, :count], values[:, :, :count], 500)
    cache.trim(trimmed)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache, RotorKVCache(config, 4)])
    loaded, empty = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert type(loaded) is RotorKVCache
    assert (loaded.config, loaded.layer, empty.layer) == (config, cache.layer, 4)
    assert_same(loaded, cache)
    more = tokens(200, seed=2)
    for c in (loaded, cache):
        c.update_and_fetch(*more)
    assert_same(loaded, cache)
    assert np.array_equal(attend(loaded), attend(cache))


def test_copy_is_independent(config):
    keys, values = tokens(300)
    cache = filled(config, keys, values, 300)
    twin = copy.deepcopy(cache)
    assert_same(twin, cache)
    before = attend(twin)
    cache.trim(100)
    cache.update_and_fetch(*tokens(100, seed=3))
    assert np.array_equal(before, attend(twin))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_filled_cache_of_mlx_lm_is_converted(config, dtype):
    keys, values = tokens(dtype=dtype)
    plain = KVCache()
    plain.update_and_fetch(keys, values)
    converted = RotorKVCache.from_kv_cache(plain, config, layer=3)
    assert_same(converted, filled(config, keys, values, 100))
    assert converted.keys_and_values()[0].dtype == dtype
    assert RotorKVCache.from_kv_cache(KVCache(), config).empty()


# ---- memory -------------------------------------------------------------------------------------


def memory_shape(head_dim, count, heads=2):
    return mx.random.normal((1, heads, count, head_dim)).astype(mx.float16)


def test_8192_tokens_take_less_than_29_percent():
    """D = 128, 4 bits, window, sink and room for growth included, however it was filled."""
    keys, values = memory_shape(128, 8192), memory_shape(128, 8192)
    for chunks in (8192, 512):
        cache = RotorKVCache()
        for start in range(0, 8192, chunks):
            part = slice(start, start + chunks)
            cache.update_and_fetch(keys[:, :, part], values[:, :, part])
        assert cache.nbytes <= 0.29 * (keys.nbytes + values.nbytes)
    assert cache.bits_per_value == 4.25


def test_cache_holds_no_more_than_it_says():
    """What MLX keeps allocated for a cache is its nbytes: no hidden full-precision copy."""
    cache = RotorKVCache()
    gc.collect()
    before = mx.get_active_memory()
    for _ in range(4):
        cache.update_and_fetch(memory_shape(128, 2048), memory_shape(128, 2048))
        mx.eval(cache.state)
    for _ in range(70):
        cache.update_and_fetch(memory_shape(128, 1), memory_shape(128, 1))
        mx.eval(cache.state)
    # Allocations are rounded up to pages: 16 KiB for each of the 7 buffers.
    assert mx.get_active_memory() - before < cache.nbytes + 7 * 16384


def test_memory_grows_to_20000_tokens_exactly_as_the_format_says():
    """Bits of docs/FORMAT.md a packed value; sink, tail and room beside them stay what they are."""
    config, heads, head_dim = RotorConfig(4, 3), 2, 128
    cache = RotorKVCache(config)
    before = None
    for tokens_so_far in range(500, 20001, 500):
        new = [memory_shape(head_dim, 500, heads) for _ in range(2)]
        cache.update_and_fetch(*new)
        mx.eval(cache.state)
        packed = (tokens_so_far - config.sink - config.window) // BLOCK * BLOCK
        exact = (tokens_so_far - packed) * 2 * heads * head_dim * 2
        bits = packed * heads * head_dim * (4 + 16 / 64 + 16 / 128 + 3 + 16 / 128)
        state = sum(part.nbytes for part in cache.state if isinstance(part, mx.array))
        assert state == exact + bits / 8 + 2 * heads * head_dim * 4
        # Room: up to a tail's worth of exact tokens, and a thirty-second of the blocks, at least 4.
        room = BLOCK * 2 * heads * head_dim * 2 + max(4 * BLOCK, packed / 32) * bits / packed / 8
        assert state <= cache.nbytes <= state + room
        before = cache.nbytes
    assert before < 0.26 * 20000 * 2 * heads * head_dim * 2


@pytest.mark.slow
def test_conversion_takes_source_result_and_one_layer():
    """Converting layer by layer, sources dropped as they go, never holds more than that."""
    layers = [KVCache() for _ in range(4)]
    for layer in layers:
        layer.update_and_fetch(memory_shape(128, 8192, 8), memory_shape(128, 8192, 8))
    mx.eval([layer.state for layer in layers])
    gc.collect()
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    converted = [RotorKVCache.from_kv_cache(layer) for layer in layers]
    result = sum(cache.nbytes for cache in converted)
    assert mx.get_peak_memory() - start < result + layers[0].nbytes


# ---- mlx-lm's contract --------------------------------------------------------------------------


def test_contract_has_every_member():
    own = {name for name in vars(KVCache) if not name.startswith("_")} - {"step"}
    assert {name for name in own if not hasattr(RotorKVCache, name)} == set()
    assert not hasattr(RotorKVCache(), "bits"), "mlx-lm's attention dispatches on it"


def test_kv_bits_is_no_silent_no_op():
    single = filled(RotorConfig(3, 2), *tokens(200), 200)
    for cache in (single, RotorKVCache.merge([single]), RotorKVCache()):
        same = [cache]
        with pytest.warns(
            UserWarning, match="kv_bits=4 asks for mlx-lm's own .* leave kv_bits out"
        ):
            maybe_quantize_kv_cache(same, quantized_kv_start=0, kv_group_size=64, kv_bits=4)
        assert same == [cache]


def test_contract_of_an_empty_cache():
    cache = RotorKVCache()
    assert cache.empty()
    assert (cache.size(), cache.offset, cache.nbytes, cache.trim(5)) == (0, 0, 0, 0)
    assert cache.is_trimmable()
    with pytest.raises(ValueError, match="cache is empty"):
        cache.keys_and_values()


@pytest.mark.parametrize(
    "arguments",
    [(1, None, False), (5, None, False), (1, 20, False), (5, 20, False), (5, None, True)],
    ids=["decode", "prefill", "decode-window", "prefill-window", "array"],
)
def test_masks_are_those_of_the_plain_cache(arguments):
    keys, values = tokens(200)
    plain, cache = KVCache(), RotorKVCache()
    for c in (plain, cache):
        c.update_and_fetch(keys, values)
    n, window_size, return_array = arguments
    given = {"window_size": window_size, "return_array": return_array}
    expected, found = plain.make_mask(n, **given), cache.make_mask(n, **given)
    if isinstance(expected, mx.array):
        assert mx.array_equal(expected, found)
    else:
        assert found == expected


def test_views_answer_like_arrays():
    cache = RotorKVCache()
    keys, values = cache.update_and_fetch(*tokens(300))
    assert (keys.shape, values.shape) == ((B, K, 300, D), (B, K, 300, DV))
    assert (keys.ndim, keys.dtype) == (4, mx.float16)
    assert cache.size() == 300


# ---- a limit ------------------------------------------------------------------------------------

LIMIT = 500


def limited(config, keys, values, chunks, max_size=LIMIT):
    cache = RotorKVCache(config, 3, max_size)
    for start in range(0, keys.shape[2], chunks):
        part = slice(start, start + chunks)
        cache.update_and_fetch(keys[:, :, part], values[:, :, part])
    return cache


@pytest.mark.parametrize("chunks", [1, 37, 64, 700])
def test_limited_bytes_do_not_depend_on_chunks(config, chunks):
    keys, values = tokens()
    assert_same(limited(config, keys, values, chunks), limited(config, keys, values, TOKENS))


def test_limit_drops_whole_blocks_and_keeps_sink_and_positions(config):
    """What is held is, byte for byte, the sink, the latest blocks and the tail of a cache without
    a limit; block n of the sequence lies at n mod the number of blocks."""
    keys, values = tokens()
    cache, full = limited(config, keys, values, 90), filled(config, keys, values, 90)
    assert cache.offset == full.offset == TOKENS
    assert LIMIT - 128 < cache.size() <= LIMIT
    assert cache.size() + cache.counts.evicted == TOKENS
    number = cache.packed_tokens // BLOCK
    newest = np.arange(full.packed_tokens // BLOCK - number, full.packed_tokens // BLOCK)
    for ours, all_of_it in ((cache._keys, full._keys), (cache._values, full._values)):
        exact = cache.counts.exact
        assert mx.array_equal(ours.exact[:, :, :exact], all_of_it.exact[:, :, :exact])
        for a, b in zip(ours.packed, all_of_it.packed, strict=True):
            if a is not None:
                mine, every = np.array(a), np.array(b)
                assert np.array_equal(mine[:, :, newest % number], every[:, :, newest])


def test_limit_never_holds_more_and_allocates_no_more():
    config = RotorConfig()
    cache = RotorKVCache(config, max_size=LIMIT)
    keys, values = tokens()
    sizes = []
    for n in range(TOKENS):
        views = cache.update_and_fetch(keys[:, :, n : n + 1], values[:, :, n : n + 1])
        # The new token comes in before an old block goes.
        assert views[0].tokens <= LIMIT + 1
        assert cache.size() <= LIMIT
        sizes.append(cache.nbytes)
    assert sizes[-1] == sizes[LIMIT] == max(sizes)


def test_limited_attention_is_that_over_the_tokens_held(config):
    keys, values = tokens()
    cache, full = limited(config, keys, values, 90), filled(config, keys, values, 90)
    oldest = config.sink + cache.counts.evicted
    position = mx.arange(TOKENS)
    held = (position < config.sink) | (position >= oldest)
    q = mx.random.normal((B, H, 1, D), key=mx.random.key(1))
    expected = attend_view(q, *full.keys_and_values(), scale=D**-0.5, mask=held)
    got = attend_view(q, *cache.keys_and_values(), scale=D**-0.5)
    # The same rows in another order: float32 sums.
    assert mx.allclose(got, expected, atol=1e-5)
    everything = attend_view(q, *full.keys_and_values(), scale=D**-0.5)
    assert not mx.allclose(got, everything, atol=1e-3)


def test_limited_cache_trims_until_it_evicts_and_then_its_tail():
    config = RotorConfig()
    keys, values = tokens()
    young = limited(config, keys[:, :, :400], values[:, :, :400], 400)
    assert young.is_trimmable()
    assert young.trim(200) == 200
    young.update_and_fetch(keys[:, :, 200:], values[:, :, 200:])
    assert_same(young, limited(config, keys, values, TOKENS))
    assert not young.is_trimmable()
    tail = young.counts.exact - config.sink
    assert young.trim(10**4) == tail
    young.update_and_fetch(keys[:, :, TOKENS - tail :], values[:, :, TOKENS - tail :])
    assert_same(young, limited(config, keys, values, TOKENS))


@pytest.mark.parametrize("count", [0, 300, 1000])
def test_saved_limited_cache_continues_bit_for_bit(config, count, tmp_path):
    keys, values = tokens()
    cache = limited(config, keys[:, :, :count], values[:, :, :count], 500)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache])
    (loaded,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert (loaded.max_size, loaded.offset) == (LIMIT, count)
    more = tokens(200, seed=2)
    for c in (loaded, cache):
        c.update_and_fetch(*more)
    assert_same(loaded, cache)


def test_a_limit_without_room_for_a_block_is_refused():
    RotorKVCache(RotorConfig(), max_size=195)
    with pytest.raises(ValueError, match=r"max_kv_size must be at least 195 .* but 194 was given"):
        RotorKVCache(RotorConfig(), max_size=194)


@pytest.mark.parametrize(
    ("max_size", "evicted"), [(194, 0), (LIMIT, 63), (LIMIT, -64), (10**4, 64)]
)
def test_damaged_state_of_a_limited_cache_is_refused(max_size, evicted):
    state = list(limited(RotorConfig(), *tokens(), 500).state)
    RotorKVCache.from_state(state)
    state[-2:] = max_size, evicted
    with pytest.raises(ValueError, match=r"\[RotorKVCache\]"):
        RotorKVCache.from_state(state)


# ---- pipelines ----------------------------------------------------------------------------------


def test_what_is_assigned_to_keys_is_computed_with_the_cache():
    """As pipeline-parallel models do with what they have sent; keys and values stay as they are."""
    cache = filled(RotorConfig(), *tokens(300), 300)
    before = copy.deepcopy(cache)
    assert cache.keys.shape == (B, K, 0, D)
    assert not hasattr(cache, "values")  # or a server would take what stands for keys for keys
    mx.eval(cache.state)
    gc.collect()
    base = mx.get_active_memory()
    message = mx.zeros(10**6) + 1
    cache.keys = mx.depends(cache.keys, message)
    mx.eval(cache.state)
    # The message, 4 MB, was computed, and is kept only here.
    assert mx.get_active_memory() - base >= 4 * 10**6
    del message
    assert_same(cache, before)


# ---- refusal ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((1, 2, 5, 64), (1, 2, 6, 64), "equal up to head_dim"),
        ((1, 2, 64), (1, 2, 64), r"shape \[B, K, S, head_dim\]"),
        ((1, 3, 5, 64), (1, 3, 5, 80), r"holds keys of shape \[1, 2, S, 64\]"),
        ((1, 2, 5, 64), (1, 2, 5, 64), r"holds values of shape \[1, 2, S, 80\]"),
    ],
    ids=["lengths", "ndim", "heads", "value-dim"],
)
def test_update_refuses_and_changes_nothing(keys, values, message):
    cache = filled(RotorConfig(), *tokens(200), 200)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=message):
        cache.update_and_fetch(mx.zeros(keys, mx.float16), mx.zeros(values, mx.float16))
    assert_same(cache, before)


def test_update_refuses_integers_and_impossible_head_dims():
    cache = RotorKVCache()
    with pytest.raises(ValueError, match="float16, bfloat16 or float32"):
        cache.update_and_fetch(mx.zeros((1, 2, 5, 64), mx.int32), mx.zeros((1, 2, 5, 64), mx.int32))
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8"):
        cache.update_and_fetch(mx.zeros((1, 2, 5, 60)), mx.zeros((1, 2, 5, 60)))
    assert cache.empty()


STATE_FAULTS = {
    "version": (0, FORMAT_VERSION + 1, "reads format version 2, but the saved cache has version 3"),
    "config": (1, '{"key_bits": 4}', "exactly the fields"),
    "config-json": (1, "{", "must be JSON"),
    "config-bits": (1, RotorConfig().to_json().replace("4", "5"), "must be one of 2, 3, 4, 8"),
    "layer": (2, -1, "integers from 0"),
    "offset": (3, 10**9, "exact keys of dtype and shape"),
    "packed": (4, 10**9, "counts that add up"),
    "exact": (5, None, "exact keys as a floating array"),
    "words-dtype": (6, mx.zeros((1, 2, 2, 8, 64), mx.int32), "key words of dtype and shape"),
    "words-shape": (6, mx.zeros((1, 2, 1, 8, 64), mx.uint32), "key words of dtype and shape"),
    "scales": (12, None, "value scales of dtype and shape"),
    "centres": (8, None, "key centres of dtype and shape"),
    "channel-scale": (9, mx.ones((2, 63)), "key channel scale of dtype and shape"),
}


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_damaged_state_is_refused(fault):
    entry, value, message = STATE_FAULTS[fault]
    state = list(filled(RotorConfig(), *tokens(200), 200).state)
    RotorKVCache.from_state(state)
    state[entry] = value
    with pytest.raises(ValueError, match=message):
        RotorKVCache.from_state(state)


def test_state_of_another_length_is_refused():
    state = list(filled(RotorConfig(), *tokens(200), 200).state)
    with pytest.raises(ValueError, match="must hold 5 or 15 entries, but it holds 14"):
        RotorKVCache.from_state(state[:-1])


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "cache.safetensors"
    save_prompt_cache(str(path), [filled(RotorConfig(), *tokens(300), 300)])
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises((RuntimeError, ValueError)):
        mx.eval([c.state for c in mlx_lm_cache.load_prompt_cache(str(path))])
