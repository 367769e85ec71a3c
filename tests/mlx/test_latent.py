"""Latents (MLA): one packed copy, read as key and as value."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

import rotormlx.mlx
from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY
from rotormlx.codec.parts import ROPE_BITS
from rotormlx.config import RotorConfig
from rotormlx.mlx import hosts
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import choose
from rotormlx.mlx.cache.latent import (
    BatchDecodedLatentKVCache,
    BatchLatentKVCache,
    DecodedLatentKVCache,
    LatentKVCache,
    decoded,
)
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage import cache_file
from tests.support import noise

H, R, P = 6, 96, 40
BITS = (2, 3, 4, 8)


@pytest.fixture(autouse=True)
def clean():
    with hosts.MLX_LM.in_place():
        yield


@pytest.fixture(params=["cpu", "mlx"])
def backend(request, monkeypatch):
    monkeypatch.setenv("ROTORMLX_BACKEND", request.param)
    choose.cache_clear()
    yield request.param
    choose.cache_clear()


def tokens(count, rows=1, seed=0, dtype=mx.float32):
    """Latents with a centre and channels of unlike size, and RoPE parts."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 0.7, R))
    latents = (rng.normal(size=(rows, 1, count, R)) + rng.normal(size=R)) * size
    rope = rng.normal(size=(rows, 1, count, P)) + 3 * rng.normal(size=P)
    return tuple(mx.array(x.astype(np.float32)).astype(dtype) for x in (latents, rope))


def fill(cache, latents, rope, chunk):
    for start in range(0, latents.shape[2], chunk):
        cache.update_and_fetch(
            latents[:, :, start : start + chunk], rope[:, :, start : start + chunk]
        )
    return cache


def relative_error(got, want):
    got, want = (
        np.array(x.astype(mx.float32)) if isinstance(x, mx.array) else x for x in (got, want)
    )
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def queries(rows=1, seed=7):
    rng = np.random.default_rng(seed)
    return mx.array(rng.normal(size=(rows, H, 1, R)).astype(np.float32))


def assert_same(a, b):
    assert type(a) is type(b)
    assert len(a.state) == len(b.state)
    for x, y in zip(a.state, b.state, strict=True):
        assert np.array_equal(np.array(x), np.array(y))


def expected(q, view, scale, mask):
    """Attention over the latents that a view stands for, by the reference, in float64."""
    exact = np.array(view.exact.astype(mx.float32), np.float64)[:, :, : view.exact_tokens]
    count, sink = view.packed_tokens, view.sink
    packed = [np.array(a) for a in view.packed]
    packed = type(view.packed)(*packed)
    scales = None if view.channel_scale is None else np.array(view.channel_scale)
    keys = reference.decode(packed, view.codec, channel_scale=scales)
    centres = np.repeat(packed.centres.astype(np.float64), BLOCK, axis=2)
    values = centres + codebook.VALUE_SHRINK[view.codec.bits] * (keys - centres)
    whole = (
        np.concatenate([exact[:, :, :sink], x[:, :, :count], exact[:, :, sink:]], axis=2)
        for x in (keys, values)
    )
    taken_off = noise.of_view(q, view, scale)
    return reference.attend(np.array(q), *whole, scale=scale, noise=taken_off, mask=mask)


# ---- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [LatentKVCache, DecodedLatentKVCache])
def test_packed_bytes_do_not_depend_on_chunks(kind, bits):
    config = RotorConfig(bits, bits)
    latents, rope = tokens(333)
    whole = fill(kind(config, 2), latents, rope, 333)
    assert whole.packed_tokens == 256
    for chunk in (1, 37, 100):
        assert_same(fill(kind(config, 2), latents, rope, chunk), whole)


def test_the_latent_has_the_more_bits_and_the_rope_part_8():
    cache = fill(LatentKVCache(RotorConfig(3, 4)), *tokens(200), 200)
    latent, rope = cache.views()
    assert (latent.codec.role, latent.codec.bits) == (KEY, 4)
    assert (rope.codec.role, rope.codec.bits) == (KEY, ROPE_BITS)


def test_there_is_one_copy_in_packed_bytes():
    cache = fill(LatentKVCache(RotorConfig(4, 4, window=0, sink=0)), *tokens(64 * 40), 640)
    latent, rope = (view.codec.block_bytes for view in cache.views())
    assert latent == BLOCK * (R // 2 + 2) + 2 * R  # codes, scales, centre
    assert rope == BLOCK * (P + 2) + 2 * P
    scales = 4 * (R + P)
    assert cache.used_bytes == 40 * (latent + rope) + scales


def test_a_decode_step_gets_a_view_and_a_prompt_gets_arrays():
    latents, rope = tokens(200)
    for kind, views in ((LatentKVCache, True), (DecodedLatentKVCache, False)):
        cache = kind(RotorConfig(4, 4))
        got, got_rope = cache.update_and_fetch(latents, rope)
        assert isinstance(got, mx.array)
        assert np.array_equal(np.array(got), np.array(latents))  # still exact
        step = [x[:, :, -1:] for x in (latents, rope)]
        got, got_rope = cache.update_and_fetch(*step)
        assert isinstance(got, KVView) is views
        assert got.shape == (1, 1, 201, R)
        assert isinstance(got_rope, mx.array)
        assert got_rope.shape == (1, 1, 201, P)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_arrays_are_near_the_tokens_and_in_their_order(dtype, backend):
    latents, rope = tokens(300, dtype=dtype)
    cache = fill(LatentKVCache(RotorConfig(8, 8)), latents[:, :, :-2], rope[:, :, :-2], 64)
    got = cache.update_and_fetch(latents[:, :, -2:], rope[:, :, -2:])
    assert cache.packed_tokens == 192
    for have, want in zip(got, (latents, rope), strict=True):
        assert have.dtype == dtype
        # 8 bits leave 0.7 % of what varies in a block.
        assert relative_error(have, want) < 0.01


def test_trim_and_go_on():
    latents, rope = tokens(400)
    cache = fill(LatentKVCache(RotorConfig(4, 4)), latents, rope, 100)
    words = np.array(cache.state[6])
    assert cache.trim(170) == 170
    assert (cache.size(), cache.packed_tokens) == (230, 226)
    fill(cache, latents[:, :, 230:], rope[:, :, 230:], 50)
    assert cache.size() == 400
    # Whole blocks before the cut are as they were.
    assert np.array_equal(np.array(cache.state[6])[:, :, :3], words[:, :, :3])
    latent, _ = cache.views()
    assert relative_error(decoded(latent), latents) < 0.1


def test_a_limit_evicts_the_oldest_block_and_keeps_the_sink():
    latents, rope = tokens(1000)
    cache = fill(LatentKVCache(RotorConfig(8, 8), max_size=400), latents, rope, 50)
    assert cache.size() <= 400
    assert cache.offset == 1000
    mx.eval(cache.state)  # until then, views have what was evicted by the latest step
    latent, _ = cache.views()
    places = cache.counts.positions(cache.config)
    assert relative_error(decoded(latent), np.array(latents)[:, :, places]) < 0.01


@pytest.mark.parametrize("kind", [LatentKVCache, DecodedLatentKVCache])
def test_saved_and_loaded_and_copied(kind, tmp_path):
    cache = fill(kind(RotorConfig(3, 2), 5), *tokens(300), 64)
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, [cache])
    with cache_file.opened(path) as saved:  # the rules of files know it
        assert saved.classes == [kind.__name__]
    assert_same(load_prompt_cache(path)[0], cache)
    twin = copy.deepcopy(cache)
    fill(cache, *tokens(100, seed=3), 10)
    assert twin.size() == 300
    assert cache.size() == 400


def test_a_saved_cache_of_keys_and_values_is_no_cache_of_latents():
    cache = fill(LatentKVCache(RotorConfig(4, 2)), *tokens(300), 300)
    with pytest.raises(ValueError, match="A saved cache must hold value words"):
        rotormlx.RotorKVCache.from_state(cache.state)


# ---- absorbed attention -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [300, 4300])
def test_absorbed_attention_is_attention_over_decoded_latents(bits, count, backend):
    cache = fill(LatentKVCache(RotorConfig(bits, bits)), *tokens(count), 500)
    view, _ = cache.update_and_fetch(*tokens(1, seed=1))
    q, rng = queries(), np.random.default_rng(3)
    mask = rng.normal(size=(1, H, 1, count + 1)).astype(np.float32)
    mask[..., 5:70] = np.finfo(np.float32).min  # as a model hides tokens
    got = attend_view(q, view, view, scale=0.3, mask=mx.array(mask))
    want = expected(q, view, 0.3, mask.astype(np.float64))
    assert relative_error(got, want) < 2e-5  # sums of 4,300 numbers in float32


def test_absorbed_attention_after_a_trim_reads_no_forgotten_token(backend):
    cache = fill(LatentKVCache(RotorConfig(4, 4)), *tokens(400), 400)
    cache.trim(150)
    view, _ = cache.update_and_fetch(*tokens(1, seed=1))
    assert view.packed_tokens % BLOCK
    got = attend_view(queries(), view, view, scale=0.3)
    assert relative_error(got, expected(queries(), view, 0.3, None)) < 2e-5


def test_a_hidden_token_that_is_no_number_does_not_count(backend):
    latents, rope = tokens(300)
    latents[:, :, 20] = mx.nan
    cache = fill(LatentKVCache(RotorConfig(4, 4)), latents, rope, 300)
    view, _ = cache.update_and_fetch(*tokens(1, seed=1))
    visible = mx.arange(301) != 20
    got = attend_view(queries(), view, view, scale=0.3, mask=visible)
    assert np.isfinite(np.array(got)).all()
    assert np.isnan(np.array(attend_view(queries(), view, view, scale=0.3))).all()


def test_logits_of_attention_sinks_count(backend):
    cache = fill(LatentKVCache(RotorConfig(8, 8)), *tokens(300), 300)
    view, _ = cache.update_and_fetch(*tokens(1, seed=1))
    q, logits = queries(), mx.arange(H).astype(mx.float32)
    got = attend_view(q, view, view, scale=0.3, sink_logits=logits)
    whole = decoded(view)
    want = mx.fast.scaled_dot_product_attention(q, whole, whole, scale=0.3, sinks=logits)
    assert relative_error(got, want) < 1e-3  # 8 bits differ in the noise term


# ---- batches ------------------------------------------------------------------------------------

LENGTHS = (350, 90, 200)


def singles(config, kind=LatentKVCache, max_size=None):
    made = []
    for seed, length in enumerate(LENGTHS):
        made.append(fill(kind(config, 1, max_size), *tokens(length, seed=seed), 64))
    return made


@pytest.mark.parametrize(
    ("kind", "batch_kind"),
    [(LatentKVCache, BatchLatentKVCache), (DecodedLatentKVCache, BatchDecodedLatentKVCache)],
)
def test_rows_of_a_batch_are_as_by_themselves(kind, batch_kind, backend):
    config = RotorConfig(4, 4)
    alone = singles(config, kind)
    batch = kind.merge(alone)
    assert type(batch) is batch_kind
    q = queries(rows=3)
    for step in range(70):
        new = tokens(1, rows=3, seed=50 + step)
        got, rope = batch.update_and_fetch(*new)
        own = [
            cache.update_and_fetch(*(x[i : i + 1] for x in new)) for i, cache in enumerate(alone)
        ]
    if kind is LatentKVCache:
        out = attend_view(q, got, got, scale=0.3)
    for i, (latent, own_rope) in enumerate(own):
        n = own_rope.shape[2]
        assert np.array_equal(np.array(rope[i : i + 1, :, :n]), np.array(own_rope))
        if kind is LatentKVCache:
            single = attend_view(q[i : i + 1], latent, latent, scale=0.3)
            assert relative_error(out[i : i + 1], single) < 1e-6
        else:
            assert np.array_equal(np.array(got[i : i + 1, :, :n]), np.array(latent))
        assert_same(batch.extract(i), alone[i])


def test_rows_come_and_go():
    config = RotorConfig(4, 4)
    alone = singles(config)
    batch = LatentKVCache.merge(alone[:2])
    batch.extend(LatentKVCache.merge(alone[2:]))
    batch.filter([2, 0])
    assert_same(batch.extract(0), alone[2])
    assert_same(batch.extract(1), alone[0])


def test_a_mask_of_a_batch_is_an_array_as_long_as_what_the_model_gets():
    batch = LatentKVCache.merge(singles(RotorConfig(4, 4)))
    for length in (1, 3):
        mask = batch.make_mask(length)
        _got, rope = batch.update_and_fetch(*tokens(length, rows=3))
        assert isinstance(mask, mx.array)
        assert mask.shape == (3, 1, length, rope.shape[2])
        assert mask[1, 0, -1].sum() == batch.rows[1].counts.tokens


def test_right_padding_is_no_token():
    config = RotorConfig(4, 4)
    alone = [
        fill(LatentKVCache(config, 1), *tokens(n, seed=i), 64) for i, n in enumerate((100, 80))
    ]
    batch = LatentKVCache.merge([LatentKVCache(config, 1), LatentKVCache(config, 1)])
    batch.prepare(lengths=[100, 80], right_padding=[0, 20])
    rows = [tokens(n, seed=i) for i, n in enumerate((100, 80))]
    padded = [
        mx.concatenate([a, mx.pad(b, [(0, 0), (0, 0), (0, 20), (0, 0)], constant_values=9.0)])
        for a, b in zip(*rows, strict=True)
    ]
    batch.update_and_fetch(*padded)
    batch.finalize()
    for i in range(2):
        assert_same(batch.extract(i), alone[i])


def test_a_batch_is_saved_and_loaded(tmp_path):
    batch = LatentKVCache.merge(singles(RotorConfig(4, 4), max_size=400))
    path = str(tmp_path / "batch.safetensors")
    save_prompt_cache(path, [batch])
    with cache_file.opened(path) as saved:
        assert saved.classes == ["BatchLatentKVCache"]
    assert_same(load_prompt_cache(path)[0], batch)
