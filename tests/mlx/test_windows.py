"""Compressed sliding windows and chunks against caches that hold everything, and in models."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from rotormlx.codec.counts import Counts
from rotormlx.codec.format import BLOCK
from rotormlx.config import RotorConfig
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.cache.chunked import ChunkedRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.sliding import BatchSlidingRotorKVCache, SlidingRotorKVCache
from rotormlx.mlx.hosts import MLX_LM

K, H, D, DV = 2, 4, 32, 64
W, CHUNK = 150, 200  # neither is a multiple of a block
TOKENS = 3 * CHUNK + 130
CONFIGS = {
    "k4v4": RotorConfig(),
    "k2v3-w100": RotorConfig(key_bits=2, value_bits=3, window=100, sink=7, seed=5),
    "k8v8-w0": RotorConfig(key_bits=8, value_bits=8, window=0, sink=0),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(autouse=True)
def installed():
    with MLX_LM.in_place():
        yield


def tokens(count=TOKENS, seed=0, rows=1):
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(rows, K, count, D)) + 3 * rng.normal(size=D)
    values = rng.normal(size=(rows, K, count, DV))
    return mx.array(keys.astype(np.float16)), mx.array(values.astype(np.float16))


def queries(length, seed=7, rows=1):
    return mx.random.normal((rows, H, length, D), key=mx.random.key(seed))


def filled(cache, keys, values, chunk=90):
    for start in range(0, keys.shape[2], chunk):
        part = slice(start, start + chunk)
        cache.update_and_fetch(keys[:, :, part], values[:, :, part])
    return cache


def sliding(config):
    return SlidingRotorKVCache(W, config, 3)


def chunked(config):
    return ChunkedRotorKVCache(CHUNK, config, 3)


def comparable(entry):
    return np.array(entry.astype(mx.float32)) if isinstance(entry, mx.array) else np.array(entry)


def assert_same(a, b):
    assert len(a.state) == len(b.state)
    for x, y in zip(a.state, b.state, strict=True):
        assert np.array_equal(comparable(x), comparable(y))


def attend(q, views, mask=None):
    return np.array(attend_view(q, *views, scale=D**-0.5, mask=mask))


# The same rows in another order, or read by another of two ways: float32 sums of 700 terms.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def whole(config, keys, values):
    """A cache without a window; its rows have the bytes that those of a sliding window have."""
    return filled(RotorKVCache(config, 3), keys, values).keys_and_values()


def seen_of(length, stop, first_seen):
    """``[length, stop]``: what the last tokens see, where a token sees those from one on."""
    new, held = np.arange(stop - length, stop)[:, None], np.arange(stop)
    return mx.array((held <= new) & (held >= np.vectorize(first_seen)(new)))


# ---- one sequence -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sliding, chunked])
@pytest.mark.parametrize("chunk", [1, 37, 64, 300])
def test_bytes_do_not_depend_on_chunks(config, make, chunk):
    keys, values = tokens()
    if chunk == 1:  # from within the second window or chunk on
        first = filled(make(config), keys[:, :, :290], values[:, :, :290], 290)
        one_by_one = filled(first, keys[:, :, 290:], values[:, :, 290:], 1)
        return assert_same(one_by_one, filled(make(config), keys, values, TOKENS))
    assert_same(
        filled(make(config), keys, values, chunk), filled(make(config), keys, values, TOKENS)
    )


@pytest.mark.parametrize("trimmed", [0, 50])
@pytest.mark.parametrize("length", [1, 20, 90])
@pytest.mark.parametrize("count", [140, 200, 460, TOKENS - 90])
def test_a_token_sees_its_window_and_nothing_else(config, count, length, trimmed):
    """Over several windows, by the mask that a model asks for, and where it asks for none."""
    keys, values = tokens()
    cache, without_window = (
        filled(made, keys[:, :, :count], values[:, :, :count])
        for made in (sliding(config), RotorKVCache(config, 3))
    )
    trimmed = min(trimmed, config.window)
    for made in (cache, without_window):
        made.trim(trimmed)
    count -= trimmed
    stop = count + length
    mask = cache.make_mask(length, window_size=W)
    new = keys[:, :, count:stop], values[:, :, count:stop]
    views, everything = cache.update_and_fetch(*new), without_window.update_and_fetch(*new)
    q = queries(length)
    seen = seen_of(length, stop, lambda p: p - W + 1)
    wanted = attend(q, everything, seen)
    for asked in (mask, "causal", *([None] if length == 1 else [])):
        assert np.allclose(attend(q, views, asked), wanted, **TOLERANCE)
    assert np.allclose(wanted, attend(q, everything, "causal"), **TOLERANCE) == (stop <= W)
    # Layers that read the same keys and values again, then or in a step to come.
    if without_window.packed_tokens == everything[0].packed_tokens:
        assert np.allclose(attend(q, cache.keys_and_values(), "causal"), wanted, **TOLERANCE)
    assert cache.state
    wanted = attend(q[:, :, -1:], without_window.keys_and_values(), seen[-1:])
    assert np.allclose(attend(q[:, :, -1:], cache.keys_and_values()), wanted, **TOLERANCE)


def test_layers_that_share_keys_and_values_see_what_the_first_of_them_does(config):
    """A chunk whose first queries see tokens that go in the same step."""
    keys, values = tokens()
    for cache in (sliding(config), RotorKVCache(config, 3, 400), chunked(config)):
        filled(cache, keys[:, :, :460], values[:, :, :460])
        mask = cache.make_mask(300, window_size=W)
        views = cache.update_and_fetch(keys[:, :, :300], values[:, :, :300])
        q = queries(300)
        again = attend(q, cache.keys_and_values(), mask)
        assert np.array_equal(again, attend(q, views, mask))
        assert cache.state  # read when a step is computed
        assert cache.keys_and_values()[0].tokens == cache.size() < views[0].tokens


@pytest.mark.parametrize("window_size", [None, W, 40])
@pytest.mark.parametrize("length", [1, 2, 300])
@pytest.mark.parametrize("count", [0, 30, 149, 150, 460])
def test_masks_show_the_positions_that_mlx_lms_own_show(count, length, window_size):
    config = RotorConfig()
    cache = filled(sliding(config), *tokens(count))
    after = Counts(cache.counts.tokens + length, cache.counts.packed, cache.counts.evicted)
    held = after.positions(config)
    for return_array in (False, True):
        mask = cache.make_mask(length, window_size=window_size, return_array=return_array)
        assert not return_array or length == 1 or isinstance(mask, mx.array)
        new = np.arange(count, count + length)[:, None]
        seen = (held <= new) & (held > new - (window_size or W))
        if isinstance(mask, mx.array):
            assert np.array_equal(np.array(mask), seen)
        else:
            assert mask == (None if length == 1 else "causal")
            assert np.array_equal(seen, held <= new) or window_size == 40


def test_a_window_holds_its_blocks_the_sink_and_the_tail(config):
    keys, values = tokens()
    cache = sliding(config)
    blocks = -(-W // BLOCK)
    sizes = []
    for n in range(TOKENS):
        cache.update_and_fetch(keys[:, :, n : n + 1], values[:, :, n : n + 1])
        assert cache.packed_tokens <= blocks * BLOCK
        assert cache.size() <= cache.max_size == config.sink + config.window + 63 + blocks * BLOCK
        sizes.append(cache.nbytes)
    assert cache.offset == TOKENS
    assert sizes[-1] == max(sizes) == sizes[cache.max_size]


def test_a_window_loses_nothing_that_is_seen_when_its_tail_is_trimmed(config):
    keys, values = tokens()
    cache = filled(sliding(config), keys, values)
    assert not cache.is_trimmable()
    tail = cache.counts.exact - config.sink
    assert cache.trim(10**4) == tail
    held = set(cache.counts.positions(config).tolist())
    assert set(range(TOKENS - tail - W, TOKENS - tail)) <= held
    cache.update_and_fetch(keys[:, :, TOKENS - tail :], values[:, :, TOKENS - tail :])
    assert_same(cache, filled(sliding(config), keys, values))


@pytest.mark.parametrize("count", [40, 200, 201, 333, 400, TOKENS])
def test_a_chunk_is_held_as_a_sequence_of_its_own(config, count):
    keys, values = tokens()
    cache = filled(chunked(config), keys[:, :, :count], values[:, :, :count])
    start = (count - 1) // CHUNK * CHUNK
    assert (cache.start_position, cache.offset) == (start, count)
    alone = filled(RotorKVCache(config, 3), keys[:, :, start:count], values[:, :, start:count])
    for x, y in zip(cache.state[3:-2], alone.state[3:], strict=True):
        assert np.array_equal(comparable(x), comparable(y))
    cache.maybe_trim_front()
    assert cache.size() == count % CHUNK
    assert cache.offset == count


@pytest.mark.parametrize("length", [1, 60, 450])
@pytest.mark.parametrize("count", [150, 199, 200, 390])
def test_a_token_sees_its_chunk_and_nothing_else(count, length):
    """Exact ones: a window of the codec that packs nothing, so that all caches have the same."""
    config = RotorConfig(window=TOKENS + 500)
    keys, values = tokens(count + length)
    cache = filled(chunked(config), keys[:, :, :count], values[:, :, :count])
    for called in (True, False):  # a model may not call it
        twin = copy.deepcopy(cache)
        if called:
            twin.maybe_trim_front()
        mask = twin.make_mask(length)
        views = twin.update_and_fetch(keys[:, :, count:], values[:, :, count:])
        q = queries(length)
        seen = seen_of(length, count + length, lambda p: p // CHUNK * CHUNK)
        wanted = attend(q, whole(config, keys, values), seen)
        assert np.allclose(attend(q, views, mask), wanted, **TOLERANCE)
        assert np.allclose(attend(q, views, "causal"), wanted, **TOLERANCE)


def test_a_chunk_is_trimmed_until_one_was_forgotten():
    config = RotorConfig()
    keys, values = tokens()
    cache = filled(chunked(config), keys[:, :, :CHUNK], values[:, :, :CHUNK])
    assert cache.is_trimmable()
    assert cache.trim(50) == 50
    filled(cache, keys[:, :, 150:], values[:, :, 150:])
    assert not cache.is_trimmable()
    assert cache.trim(10**4) == TOKENS % CHUNK
    assert cache.offset == TOKENS // CHUNK * CHUNK


def test_an_update_that_fails_leaves_a_chunk_as_it_was(monkeypatch):
    cache = filled(chunked(RotorConfig()), *tokens(390))
    before = copy.deepcopy(cache)
    monkeypatch.setattr(ChunkedRotorKVCache, "begun_for", lambda self, stop: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.update_and_fetch(*tokens(60))
    assert_same(cache, before)


def test_chunks_have_no_batches():
    assert not hasattr(chunked(RotorConfig()), "merge")
    assert hasattr(sliding(RotorConfig()), "merge")


@pytest.mark.parametrize("make", [sliding, chunked])
@pytest.mark.parametrize("count", [0, 30, 200, 330, TOKENS])
def test_saved_and_copied_it_continues_bit_for_bit(config, make, count, tmp_path):
    cache = filled(make(config), *tokens(count))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache])
    (loaded,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert type(loaded) is type(cache)
    copied = copy.deepcopy(cache)
    assert loaded.offset == copied.offset == count
    more = tokens(200, seed=2)
    views = [c.update_and_fetch(*more) for c in (cache, loaded, copied)]
    seen = [attend(queries(200), pair, "causal") for pair in views]
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])
    assert_same(loaded, cache)
    assert_same(copied, cache)


@pytest.mark.parametrize("fault", ["window", "no window", "limit", "start", "chunk", "too long"])
def test_a_damaged_state_is_refused(fault):
    kind = sliding if fault in ("window", "no window", "limit") else chunked
    cache = filled(kind(RotorConfig()), *tokens(300))
    state = list(cache.state)
    place, value = {
        "window": (-1, W + BLOCK),
        "no window": (-1, 0),
        "limit": (-3, 3 * W),
        "start": (-1, 7),
        "chunk": (-2, 0),
        "too long": (-2, 50),
    }[fault]
    state[place] = value
    with pytest.raises(ValueError, match=r"must hold (a window, and its limit|a chunk)"):
        type(cache).from_state(state)


# ---- batches ------------------------------------------------------------------------------------

LENGTHS = (450, 3, 149, 240, 700)


def rows_of(lengths=LENGTHS):
    return [tokens(n, seed) for seed, n in enumerate(lengths)]


def batch_of(config, lengths=LENGTHS):
    """A batch read with right padding, and each sequence by itself."""
    rows = rows_of(lengths)
    batch = sliding(config).merge([sliding(config) for _ in rows])
    longest = max(lengths)
    batch.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    keys, values = (
        mx.concatenate(
            [mx.pad(a, [(0, 0), (0, 0), (0, longest - a.shape[2]), (0, 0)]) for a in column]
        )
        for column in zip(*rows, strict=True)
    )
    filled(batch, keys, values, 170)
    batch.finalize()
    return batch, [filled(sliding(config), *row, 170) for row in rows]


def assert_step(batch, singles, length, asks=True):
    """New tokens see in the batch what they see alone."""
    keys, values = tokens(length, 9, len(singles))
    q = queries(length, rows=len(singles))
    mask = batch.make_mask(length, window_size=W) if asks else "causal"
    together = attend(q, batch.update_and_fetch(keys, values), mask)
    for i, cache in enumerate(singles):
        part = slice(i, i + 1)
        own = cache.make_mask(length, window_size=W)
        alone = attend(q[part], cache.update_and_fetch(keys[part], values[part]), own)
        assert np.allclose(together[part], alone, **TOLERANCE)
        assert_same(batch.extract(i), cache)


@pytest.mark.parametrize("asks", [True, False])
def test_rows_of_a_batch_are_sequences_by_themselves(config, asks):
    batch, singles = batch_of(config)
    assert type(batch) is BatchSlidingRotorKVCache
    for length in (1, 30, 1):
        assert_step(batch, singles, length, asks)


def test_rows_come_and_go(config):
    batch, singles = batch_of(config)
    batch.filter([4, 1, 0])
    more = filled(sliding(config), *tokens(333, 8))
    batch.extend(sliding(config).merge([more]))
    assert_step(batch, [singles[4], singles[1], singles[0], more], 1)
    again = sliding(config).merge([batch.extract(i) for i in range(4)])
    assert type(again) is BatchSlidingRotorKVCache
    assert_step(again, [batch.extract(i) for i in range(4)], 1)


def test_a_saved_batch_continues(config, tmp_path):
    batch, singles = batch_of(config)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [batch])
    (loaded,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert type(loaded) is BatchSlidingRotorKVCache
    assert_step(loaded, singles, 1)


@pytest.mark.parametrize("asks", [True, False])
def test_right_padding_is_no_part_of_a_window(asks):
    """The first chunk of a row that ends within it, as the row reads it alone."""
    config = RotorConfig()
    keys, values = tokens(300, rows=2)
    batch = sliding(config).merge([sliding(config) for _ in range(2)])
    batch.prepare(lengths=[400, 250], right_padding=[0, 150])
    mask = batch.make_mask(300, window_size=W) if asks else "causal"
    views = batch.update_and_fetch(keys, values)
    alone = sliding(config)
    own = alone.make_mask(250, window_size=W)
    q = queries(300, rows=2)
    new = alone.update_and_fetch(keys[1:, :, :250], values[1:, :, :250])
    found = attend(q, views, mask)[1:, :, :250]
    assert np.allclose(found, attend(q[1:, :, :250], new, own), **TOLERANCE)


def test_left_padding_is_no_part_of_a_window():
    config = RotorConfig()
    keys, values = tokens(400, rows=2)
    batch = BatchSlidingRotorKVCache([0, 170], W, config, 3)
    for start in range(0, 400, 90):
        part = slice(start, start + 90)
        mask = batch.make_mask(min(90, 400 - start), window_size=W)
        views = batch.update_and_fetch(keys[:, :, part], values[:, :, part])
    alone = filled(sliding(config), keys[1:, :, 170:360], values[1:, :, 170:360])
    own = alone.make_mask(40, window_size=W)
    q = queries(40, rows=2)
    wanted = attend(q[1:], alone.update_and_fetch(keys[1:, :, 360:], values[1:, :, 360:]), own)
    assert np.allclose(attend(q, views, mask)[1:], wanted, **TOLERANCE)
    assert np.allclose(attend(q, views, "causal")[1:], wanted, **TOLERANCE)


def test_rows_of_another_window_are_refused():
    other = SlidingRotorKVCache(W + 1, RotorConfig(), 3)
    with pytest.raises(ValueError, match="must share their sliding window, but it is 150 in one"):
        sliding(RotorConfig()).merge([sliding(RotorConfig()), other])
