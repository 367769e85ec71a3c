"""Every backend against the float64 reference: any shape, dtype, mask and length."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY, ROLES, TRELLIS_BITS, VALUE, Packed, codec
from rotormlx.config import ROTATIONS, RotorConfig
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import backend, choose, describe, mlx_ops
from rotormlx.mlx.cache.view import KVView
from tests.support import codec_cases, noise
from tests.support.bounds import check_encoded

pytestmark = pytest.mark.usefixtures("each_backend")

B, K, REPEATS, L, SINK, TAIL = 2, 3, 2, 5, 4, 70
H = K * REPEATS
DTYPES = {"f16": mx.float16, "bf16": mx.bfloat16, "f32": mx.float32}


def rows(shape, seed=0):
    """Normal numbers with unequal channels and an offset, what keys look like."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=shape[-1]) * 0.5)
    x = rng.normal(size=shape) * spread + rng.normal(size=shape[-1]) * 3
    return x.astype(np.float32)


def as_numpy(packed):
    return Packed(*(None if a is None else np.array(a) for a in packed))


class Runner:
    """The backend under test, as tests/support/codec_cases.py calls it."""

    def encode(self, x, chosen, *, scale=None, centres=None, start=0, state=None):
        given = {"channel_scale": scale, "centres": centres, "state": state}
        given = {name: to_mlx(array) for name, array in given.items()}
        return as_numpy(backend().encode(x, chosen, start=start, **given))


RUNNER = Runner()


def float64(a):
    return np.array(a.astype(mx.float32)).astype(np.float64)


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 112, 192])
def test_encode_is_the_reference(head_dim, name, role, bits):
    """Other codes are right only where float32 leaves a doubt."""
    config = RotorConfig(bits, bits, name)
    chosen = codec(config, head_dim, layer=3, role=role)
    x = rows((B, K, 2 * BLOCK, head_dim))
    scale = reference.prefill_scale(x[:1, :, :BLOCK], chosen) if config.scales_channels else None
    given = None if scale is None else mx.array(scale)
    found = as_numpy(backend().encode(mx.array(x), chosen, channel_scale=given))
    check_encoded(x.astype(np.float64), found, chosen, scale)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["cascade", "dense", "rotor3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_do_not_depend_on_their_company(dtype, name, role):
    """A block encoded alone has the bytes that it has among others."""
    chosen = codec(RotorConfig(4, 4, name), 96, layer=0, role=role)
    x = mx.array(rows((B, K, 5 * BLOCK, 96))).astype(DTYPES[dtype])
    together = as_numpy(backend().encode(x, chosen))
    for n in range(5):
        alone = as_numpy(backend().encode(x[:, :, n * BLOCK : (n + 1) * BLOCK], chosen))
        for a, b in zip(together, alone, strict=True):
            assert b is None or np.array_equal(a[:, :, n : n + 1], b)


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("kind", ["zero", "tiny", "nan", "inf", "huge"])
@pytest.mark.parametrize("role", ROLES)
def test_special_rows_are_the_reference(role, kind, bits):
    chosen = codec(RotorConfig(bits, bits), 80, layer=0, role=role)
    x = rows((1, 2, BLOCK, 80))
    if kind == "zero":
        x[:] = 0
    elif kind == "tiny":
        # No size that float16 can hold, but by the levels of zeros it would have a scale.
        x *= 2e-8 * np.sqrt(80) / np.linalg.norm(x, axis=-1, keepdims=True)
    else:
        x[:, :, 5::7] = {"nan": np.nan, "inf": np.inf, "huge": 1e30}[kind]
    expected = reference.encode(x, chosen)
    found = as_numpy(backend().encode(mx.array(x), chosen))
    broken = np.isnan(expected.scales)
    assert np.array_equal(np.isnan(found.scales), broken)
    assert np.array_equal(found.scales == 0, expected.scales == 0)
    check_encoded(x.astype(np.float64), found, chosen)
    decoded = np.array(backend().decode(Packed(*map(to_mlx, found)), chosen))
    flat = broken.reshape(1, 2, BLOCK)
    assert np.isnan(decoded[flat]).all()
    assert np.isfinite(decoded[~flat]).all()


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
def test_badly_met_rows(role, bits):
    codec_cases.check_badly_met_rows(RUNNER, bits, role)


def to_mlx(a):
    return None if a is None else mx.array(a)


@pytest.mark.parametrize("bits", codebook.BITS)
def test_ties_go_to_the_larger_magnitude(bits):
    limits = mx.array(codebook.boundaries(bits))
    below = mx.array(np.nextafter(codebook.boundaries(bits), np.float32(0)))
    assert mlx_ops.nearest_magnitude(limits, bits).tolist() == list(range(1, limits.size + 1))
    assert mlx_ops.nearest_magnitude(below, bits).tolist() == list(range(limits.size))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_centres_leave_whole_broken_rows_out(broken):
    x = rows((1, 2, BLOCK, 80))
    x[:, 1, 5::7, 3] = broken
    found = np.array(mlx_ops.block_means(mx.array(x)))
    assert np.allclose(found, reference.block_means(x.astype(np.float64)), rtol=2**-10, atol=0)


@pytest.mark.parametrize("role", ROLES)
def test_prefill_scale_is_the_reference(role):
    chosen = codec(RotorConfig(rotation="rotor3"), 80, layer=0, role=role)
    x = rows((1, 3, BLOCK, 80))
    x[:, 1, :, 7] = 1.5
    x[:, 2] = 0
    found = np.array(backend().prefill_scale(mx.array(x), chosen))
    assert np.allclose(found, reference.prefill_scale(x, chosen), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", codebook.BITS)
def test_levels_are_the_codebook(bits):
    levels = (codebook.trellis_levels if bits in TRELLIS_BITS else codebook.levels)(bits)
    codes, half = mx.arange(len(levels), dtype=mx.uint32), len(levels) // 2
    found = np.array(mlx_ops.signed_magnitudes(codes % half, codes // half, bits))
    # One rounding of the largest of 8 levels.
    assert np.abs(found - levels).max() <= 1.2e-7


@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("role", ROLES)
def test_of_equal_paths_the_page_says_which(role, bits):
    codec_cases.check_tied_paths(RUNNER, bits, role)


@pytest.mark.parametrize("start", [1, 2, 3, 16, 17, 63])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
@pytest.mark.parametrize("role", ROLES)
def test_paths_go_on_from_a_state(role, bits, start):
    codec_cases.check_filled_up_path(RUNNER, 80, bits, role, start)


# ---- attention ----------------------------------------------------------------------------------


def make_views(config, head_dim_k, head_dim_v, blocks, missing, dtype, tail=TAIL):
    """Views of random rows and the float64 vectors they stand for."""
    views, vectors = [], []
    for role, head_dim, seed in ((KEY, head_dim_k, 1), (VALUE, head_dim_v, 2)):
        chosen = codec(config, head_dim, layer=1, role=role)
        x = mx.array(rows((B, K, blocks * BLOCK, head_dim), seed)).astype(dtype)
        scale = backend().prefill_scale(x[:, :, :BLOCK], chosen) if config.scales_channels else None
        packed = backend().encode(x, chosen, channel_scale=scale)
        exact = mx.array(rows((B, K, SINK + tail + 3, head_dim), seed + 2)).astype(dtype)
        count = blocks * BLOCK - missing
        tokens = SINK + count + tail
        views.append(KVView(chosen, exact, packed, scale, SINK, count, tokens))
        middle = reference.decode(as_numpy(packed), chosen, channel_scale=to_numpy(scale))
        ends = float64(exact)
        parts = [ends[:, :, :SINK], middle[:, :, :count], ends[:, :, SINK : SINK + tail]]
        vectors.append(np.concatenate(parts, 2))
    return views, vectors


def to_numpy(a):
    return None if a is None else np.array(a)


def queries(head_dim, length, dtype):
    q = np.random.default_rng(9).normal(size=(B, H, length, head_dim))
    return mx.array(q.astype(np.float32)).astype(dtype)


def masks(tokens, length):
    rng = np.random.default_rng(10)
    rows_, columns = np.arange(length)[:, None] + tokens - length, np.arange(tokens)
    padding = np.arange(tokens) >= np.array([0, 40])[:, None, None, None]
    return {
        "none": None,
        "causal": "causal",
        "window": (columns <= rows_) & (columns > rows_ - 90),
        "padding": padding,
        "bool": rng.random((B, 1, length, tokens)) > 0.4,
        "bool-heads": rng.random((B, H, length, tokens)) > 0.4,
        "additive": rng.normal(size=(1, H, length, tokens)).astype(np.float32),
        "additive-row": rng.normal(size=tokens).astype(np.float32),
        "additive-inf": np.where(rng.random((length, tokens)) > 0.4, 0, -np.inf).astype(np.float32),
    }


def check(
    config, dims, mask_name, *, dtype="f32", length=L, sink_logits=None, blocks=4, missing=13, **kw
):
    dtype_ = DTYPES[dtype]
    views, (keys, values) = make_views(config, *dims, blocks, missing, dtype_, **kw)
    q = queries(dims[0], length, dtype_)
    mask = masks(views[0].tokens, length)[mask_name]
    arguments = {"scale": dims[0] ** -0.5, "sink_logits": sink_logits}
    taken = noise.of_view(float64(q), views[0], arguments["scale"])
    expected = reference.attend(float64(q), keys, values, noise=taken, mask=mask, **arguments)
    given = mask if mask is None or isinstance(mask, str) else mx.array(mask)
    arguments["sink_logits"] = to_mlx(sink_logits)
    found = attend_view(q, *views, mask=given, **arguments)
    assert found.dtype == dtype_
    # Sums are in float32; the result is rounded once to the dtype.
    error = {"f32": 2e-6, "f16": 2**-10, "bf16": 2**-7}[dtype]
    assert np.abs(float64(found) - expected).max() <= error * np.abs(expected).max()


@pytest.mark.parametrize("mask", masks(100, 5))
@pytest.mark.parametrize("length", [1, 5])
def test_attend_with_mask(mask, length):
    check(RotorConfig(), (80, 112), mask, length=length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("dims", [(64, 64), (112, 80), (192, 128)], ids=str)
def test_attend_with_bits(bits, dims, dtype):
    check(RotorConfig(bits, bits), dims, "causal", dtype=dtype)


@pytest.mark.parametrize("name", ROTATIONS)
def test_attend_with_rotation(name):
    check(RotorConfig(3, 4, name), (96, 64), "causal")


@pytest.mark.parametrize("channel_scale", ["none", "prefill"])
def test_attend_with_channel_scale(channel_scale):
    check(RotorConfig(channel_scale=channel_scale), (80, 64), "causal")


@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_attend_with_sink_logits(mask):
    check(RotorConfig(), (64, 80), mask, sink_logits=np.linspace(-3, 6, H).astype(np.float32))


@pytest.mark.parametrize("missing", [0, 1, 63])
def test_attend_ignores_lanes_behind_the_last_token(missing):
    check(RotorConfig(), (64, 80), "none", missing=missing)


def test_attend_ignores_whatever_stands_behind_the_last_token():
    """A trim may leave rows behind it that were not finite."""
    views, (keys, values) = make_views(RotorConfig(), 64, 80, 3, 13, mx.float32)
    spoiled = []
    for view in views:
        scales = np.array(view.packed.scales)
        scales[:, :, -1, BLOCK - 13 :] = np.nan
        spoiled.append(replace(view, packed=view.packed._replace(scales=mx.array(scales))))
    q = queries(64, L, mx.float32)
    taken = noise.of_view(float64(q), views[0], 0.1)
    expected = reference.attend(float64(q), keys, values, scale=0.1, noise=taken)
    found = np.array(attend_view(q, *spoiled, scale=0.1))
    # As in check().
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_attend_without_tail():
    check(RotorConfig(), (64, 80), "none", tail=0, missing=13, length=1)


@pytest.mark.parametrize("mask", masks(100, 5))
def test_attend_tile_by_tile(mask, monkeypatch):
    """Tiles much smaller than the history give what one tile gives."""
    monkeypatch.setattr(mlx_ops, "TILE_TOKENS", BLOCK)
    check(RotorConfig(), (64, 80), mask)


@pytest.mark.parametrize("tail", range(64, 72))
def test_causal_mask_at_the_edge_of_a_tile(tail, monkeypatch):
    """The first query stops seeing before, at and behind the end of a tile of the tail."""
    monkeypatch.setattr(mlx_ops, "TILE_TOKENS", BLOCK)
    check(RotorConfig(), (64, 80), "causal", tail=tail)


def test_attend_of_many_queries_takes_small_tiles(monkeypatch):
    monkeypatch.setattr(mlx_ops, "TILE_SCORES", B * H * 64 * BLOCK)
    check(RotorConfig(), (64, 80), "causal", length=64)


def test_a_query_that_sees_nothing_is_zero():
    (keys, values), _ = make_views(RotorConfig(), 64, 80, 2, 0, mx.float32)
    mask = mx.zeros((1, keys.tokens), mx.bool_)
    out = attend_view(queries(64, 1, mx.float32), keys, values, scale=0.1, mask=mask)
    assert np.array_equal(np.array(out), np.zeros(out.shape))


def test_attend_never_decodes_the_history():
    """A step over 64k tokens takes far less memory than their history in float16."""
    tokens, head_dim = 2**16, 64
    views = []
    for role in ROLES:
        chosen = codec(RotorConfig(), head_dim, layer=0, role=role)
        one = backend().encode(mx.array(rows((1, 1, BLOCK, head_dim))), chosen)
        repeated = (None if a is None else mx.repeat(a, tokens // BLOCK, axis=2) for a in one)
        exact = mx.zeros((1, 1, BLOCK, head_dim), mx.float16)
        views.append(KVView(chosen, exact, Packed(*repeated), None, 0, tokens, tokens + 1))
    mx.eval([view.packed for view in views])
    query = mx.ones((1, 4, 1, head_dim))
    mx.eval(query)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(attend_view(query, *views, scale=0.1))
    float16_bytes = 2 * tokens * head_dim * 2
    # A tile is 2,048 tokens, a 32nd, and ten float32 arrays of its keys or its values are alive.
    assert mx.get_peak_memory() - before < float16_bytes / 3
    assert tokens == 32 * mlx_ops.TILE_TOKENS


# ---- refusal ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 64, 96), mx.float16, r"\[B, K, S, 80\] with S a multiple of 64"),
        (
            (1, 2, 60, 80),
            mx.float16,
            r"S a multiple of 64, but the keys have shape \(1, 2, 60, 80\)",
        ),
        ((2, 64, 80), mx.float16, r"shape \[B, K, S, 80\]"),
        ((1, 2, 64, 80), mx.int32, "must be float16, bfloat16 or float32"),
    ],
    ids=["head_dim", "length", "ndim", "dtype"],
)
def test_encode_refuses(shape, dtype, message):
    chosen = codec(RotorConfig(), 80, layer=0, role=KEY)
    with pytest.raises(ValueError, match=message):
        backend().encode(mx.zeros(shape, dtype), chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": mx.zeros((B, H, L, 80))}, r"Queries must have shape \[2, a multiple of 3, L, 64\]"),
        ({"q": mx.zeros((B, H + 1, L, 64))}, "a multiple of 3"),
        ({"q": mx.zeros((B + 1, H, L, 64))}, "Queries must have shape"),
        ({"q": mx.zeros((B, H, L, 64), mx.int32)}, "float16, bfloat16 or float32"),
        ({"q": mx.zeros((B, H, 999, 64))}, "at least as many tokens as queries"),
        ({"mask": "diagonal"}, "None, 'causal' or an array"),
        ({"mask": mx.zeros((L, 7))}, "broadcastable to"),
        ({"sink_logits": mx.zeros((H + 1,))}, r"shape \(6,\), one per query head"),
        ({"values": {"tokens": 100}}, "agree in batch, KV heads and tokens"),
    ],
    ids=["dim", "heads", "batch", "dtype", "length", "mask", "mask-shape", "sink_logits", "values"],
)
def test_attend_refuses(change, message):
    (keys, values), _ = make_views(RotorConfig(), 64, 80, 2, 0, mx.float32)
    change = dict(change)
    values = replace(values, **change.pop("values", {}))
    arguments = {"q": queries(64, L, mx.float32), **change}
    with pytest.raises(ValueError, match=message):
        attend_view(arguments.pop("q"), keys, values, scale=0.1, **arguments)


def test_backend_says_why_it_is_not_a_better_one(monkeypatch):
    monkeypatch.delenv("ROTORMLX_BACKEND", raising=False)
    if backend().name == "metal":
        assert describe() == "metal"
    else:
        assert describe().startswith(f"{backend().name} (no metal, MLX ")
    monkeypatch.setenv("ROTORMLX_BACKEND", "mlx")
    choose.cache_clear()
    assert describe() == "mlx (named by ROTORMLX_BACKEND)"


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("ROTORMLX_BACKEND", "abacus")
    with pytest.raises(
        RuntimeError, match="must be one of metal, mlx_cuda, cpu, mlx, but it is 'abacus'"
    ):
        backend()
