"""The codecs of KVarN, exllamav3 and NVFP4: values worked out by hand or by brute force."""

from __future__ import annotations

from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec.format import KEY, VALUE
from rotormlx.measure import kvarn
from rotormlx.measure.baselines import SimulatedCache
from rotormlx.measure.exl3 import Exl3
from rotormlx.measure.kvarn import KVarN
from rotormlx.measure.nvfp4 import E2M1, E4M3, Nvfp4

B, K, S, D = 2, 3, 256, 64
RNG = np.random.default_rng(8)
# Tokens and channels of very different size, and a channel far from zero.
X = (
    RNG.normal(size=(B, K, S, D))
    * np.exp(RNG.normal(size=(B, K, S, 1)))
    * np.exp(RNG.normal(size=(B, K, 1, D)))
).astype(np.float32)
X[..., 7] += 20


def sylvester(size: int) -> Any:
    """The Hadamard matrix, sign by sign: -1 to the number of ones that both indices share."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs) / np.sqrt(size)


# ---- KVarN --------------------------------------------------------------------------------------


def kvarn_tile(tile: Any, bits: int) -> Any:
    """One tile ``[R, C]`` as KVarN gives it back, in float64 and line by line."""
    rows, columns = tile.shape
    log_rows, log_columns = [0.0] * rows, [0.0] * columns
    scaled, best, least = tile, (log_rows, log_columns), np.inf
    for turn in range(17):
        if turn:
            log_columns = [
                float(np.clip(log_columns[c] + np.log(np.std(scaled[:, c], ddof=1)), -0.3, 10))
                for c in range(columns)
            ]
            scaled = tile / np.exp(log_columns) / np.exp(log_rows)[:, None]
            log_rows = [
                float(np.clip(log_rows[r] + np.log(np.std(scaled[r], ddof=1)), -0.3, 10))
                for r in range(rows)
            ]
            scaled = tile / np.exp(log_columns) / np.exp(log_rows)[:, None]
        of_rows = [np.std(row, ddof=1) for row in scaled]
        of_columns = [np.std(column, ddof=1) for column in scaled.T]
        found = max(of_rows) / min(of_rows) + max(of_columns) / min(of_columns)
        if found <= least:
            best, least = (log_rows, log_columns), found
    row_scales, column_scales = np.exp(best[0]), np.exp(best[1])
    out = np.empty_like(tile)
    for r in range(rows):
        row = tile[r] / column_scales / row_scales[r]
        step = (row.max() - row.min()) / (2**bits - 1)
        codes = np.round((row - row.min()) / step)
        stored = np.float16(row_scales[r] * step), np.float16(row_scales[r] * row.min())
        out[r] = (codes * float(stored[0]) + float(stored[1])) * np.float16(column_scales)
    return out


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize(("role", "bits"), [(KEY, 2), (KEY, 4), (VALUE, 3)])
def test_kvarn_is_what_its_authors_write(role: str, bits: int, group: int) -> None:
    codec = KVarN(bits, bits, group)
    found = codec.decoded(X, layer=0, role=role) @ sylvester(D)
    rotated = X.astype(np.float64) @ sylvester(D)
    for b, k, start in product(range(1), range(2), range(0, S, group)):
        tile = rotated[b, k, start : start + group]
        wanted = kvarn_tile(tile.T, bits).T if role == KEY else kvarn_tile(tile, bits)
        error = np.abs(found[b, k, start : start + group] - wanted)
        # A code on a boundary may fall to the other side in float32; the rest is float32 rounding
        # and float16 scales that round the other way, 2^-10 of numbers up to 60.
        assert (error < 0.06).mean() > 0.998
        assert np.abs(wanted - tile).max() > 0.3


def test_kvarn_balances_rows_and_columns() -> None:
    rng = np.random.default_rng(1)
    # Rows of nearly one size, so that no scale ends at its lower bound.
    sizes = np.exp(rng.normal(size=(2, 1, 64))) * rng.uniform(1, 1.1, size=(2, 128, 1))
    tiles = (100 * sizes * rng.normal(size=(2, 128, 64))).astype(np.float32)
    rows, columns = kvarn.balance(tiles)
    assert kvarn.imbalance(tiles).min() > 20
    assert kvarn.imbalance(tiles / rows / columns).max() < 2.001


def test_kvarn_keeps_the_turn_of_least_imbalance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lower bound of scales makes some turns worse than the one before."""
    rng = np.random.default_rng(0)
    tile: Any = 0.5 * rng.normal(size=(1, 64, 64)) * np.exp(rng.normal(size=(1, 64, 1)))
    found = []
    for turns in range(17):
        monkeypatch.setattr(kvarn, "ITERATIONS", turns)
        rows, columns = kvarn.balance(tile.astype(np.float32))
        assert min(rows.min(), columns.min()) >= np.exp(np.float32(-0.3))
        found.append(kvarn.imbalance(tile / rows / columns).item())
    # float32 beside differences of 1e-2.
    assert found[0] > 50
    assert max(np.diff(found)) < 1e-4


def test_kvarn_scales_a_large_token_by_itself() -> None:
    """Beside a token of 50 times the size the others keep their precision, as keys too."""
    x = RNG.normal(size=(1, 1, 64, D)).astype(np.float32)
    large = x.copy()
    large[:, :, 9] *= 50
    others = np.delete(np.arange(64), 9)
    for role in (KEY, VALUE):
        codec = KVarN(3, 3)
        before, after = (codec.decoded(v, layer=0, role=role)[:, :, others] for v in (x, large))
        errors = [np.square(v - x[:, :, others]).mean() for v in (before, after)]
        assert errors[1] < 1.2 * errors[0] < 0.1


# ---- exllamav3 ----------------------------------------------------------------------------------


def of_rotated(codec: Exl3, rotated: Any) -> Any:
    """What numbers become that lie behind the Hadamard matrix, the rest of the 32 zero."""
    group = np.zeros(32)
    group[: len(rotated)] = rotated
    x = (group @ sylvester(32)).astype(np.float32).reshape(1, 1, 1, 32)
    return (codec.decoded(x, layer=0, role=KEY) @ sylvester(32)).ravel()[: len(rotated)]


@pytest.mark.parametrize(
    ("codec", "levels"),
    [
        # The middles of four quarters of [-1, 1].
        (Exl3(2, 2), [0.75, 0.75, 0.25, 0.25, -0.25, -0.75]),
        # f(t) = 0.65 t + 0.35 t^3: f(1/4) = 0.16797, f(3/4) = 0.63516, and the boundary f(1/2) =
        # 0.36875 lies between 0.36 and 0.38.
        (Exl3(2, 2, True), [0.63516, 0.63516, 0.63516, 0.16797, -0.16797, -0.63516]),
        # Eighths: 0.36 and 0.38 lie on two sides of 3/8 only with four bits.
        (Exl3(3, 2), [0.875, 0.625, 0.375, 0.375, -0.125, -0.875]),
        (Exl3(4, 2), [0.9375, 0.5625, 0.4375, 0.3125, -0.1875, -0.9375]),
    ],
)
def test_exl3_levels(codec: Exl3, levels: list[float]) -> None:
    rotated = np.array([1, 0.57, 0.38, 0.36, -0.15, -0.99])
    # 3 is what float16 keeps exactly; float32 sums of 32 terms beside it.
    np.testing.assert_allclose(of_rotated(codec, 3 * rotated), 3 * np.array(levels), atol=1e-4)


def test_exl3_stores_its_scale_as_float16() -> None:
    scale = 1 + 2**-11 + 2**-12  # between 1 and the next float16, nearer to the latter
    assert of_rotated(Exl3(8, 8), [scale])[0] == pytest.approx((1 + 2**-10) * 255 / 256, abs=1e-6)


@pytest.mark.parametrize("compander", [False, True])
def test_exl3_levels_are_the_nearest_steps(compander: bool) -> None:
    """By brute force: the level whose interval of [-1, 1] a number lies in, for all widths."""
    t = np.linspace(-1, 1, 4001)
    curve = 0.65 * t + 0.35 * t**3 if compander else t
    for bits in range(2, 9):
        codec = Exl3(bits, bits, compander)
        found = codec._levels(curve.astype(np.float32), bits)
        middles = (2 * np.floor((t + 1) * 2 ** (bits - 1)) + 1) / 2**bits - 1
        middles = middles.clip(-1, 1 - 2.0**-bits)
        wanted = 0.65 * middles + 0.35 * middles**3 if compander else middles
        # Numbers on a boundary fall to either side in float32.
        assert (np.abs(found - wanted) < 1e-5).mean() > 1 - 2**bits / 2000
        assert len(np.unique(found.round(5))) == 2**bits


def test_exl3_groups_are_of_32_channels() -> None:
    x = X.copy()
    x[..., 40] *= 1000
    codec = Exl3(4, 4)
    for role in (KEY, VALUE):
        before, after = (codec.decoded(v, layer=0, role=role) for v in (X, x))
        np.testing.assert_array_equal(before[..., :32], after[..., :32])
        assert np.abs(before - after)[..., 32:40].max() > 1


# ---- NVFP4 --------------------------------------------------------------------------------------


def numbers(mantissa_bits: int, bias: int, exponents: int) -> Any:
    """All numbers of a small float that are not negative, from its fields."""
    steps = 2**mantissa_bits
    below = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    above = [(1 + m / steps) * 2.0 ** (e - bias) for e in range(1, exponents) for m in range(steps)]
    return np.array(below + above)


E2M1_NUMBERS = numbers(1, 1, 4)
E4M3_NUMBERS = numbers(3, 7, 16)[:-1]  # the last is NaN


def test_small_floats_have_their_numbers() -> None:
    assert E2M1_NUMBERS.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E4M3_NUMBERS[1], E4M3_NUMBERS[-1], len(E4M3_NUMBERS)) == (2**-9, 448, 127)


@pytest.mark.parametrize(("kind", "table"), [(E2M1, E2M1_NUMBERS), (E4M3, E4M3_NUMBERS)])
def test_small_floats_round_to_the_nearest(kind: Any, table: Any) -> None:
    x = np.concatenate([RNG.normal(size=4000) * size for size in (1e-3, 0.1, 3, 300)])
    nearest = table[np.abs(np.abs(x)[:, None] - table).argmin(-1)]
    found = kind.nearest(x.astype(np.float32))
    np.testing.assert_array_equal(np.abs(found), nearest)
    assert (found * x >= 0).all()
    # A tie goes to the even code.
    middles = (table[1:] + table[:-1]) / 2
    even = np.where(np.arange(len(middles)) % 2 == 0, table[:-1], table[1:])
    np.testing.assert_array_equal(kind.nearest(middles.astype(np.float32)), even)


def test_nvfp4_by_hand() -> None:
    x = np.zeros((1, 1, 1, 48), np.float32)
    # The largest of the tensor is 6 * 448, so its scale is 1.
    x[..., :2] = 2688, -900
    # 78 / 6 = 13 is a number of e4m3.
    x[..., 16:21] = 78, 13 * 2.4, 13 * 2.6, -13 * 0.8, 13 * 0.2
    # 101 / 6 = 16.83 becomes 16, and 101 / 16 = 6.3 the largest code; 16 * 4.9 becomes 4.
    x[..., 32:34] = 101, 16 * 4.9
    found = Nvfp4().decoded(x, layer=0, role=KEY)
    wanted = np.zeros(48)
    wanted[:2] = 2688, -896
    wanted[16:21] = 78, 26, 39, -13, 0
    wanted[32:34] = 96, 64
    np.testing.assert_allclose(found.ravel(), wanted, rtol=1e-6)


@pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="MLX may lack a scale of the tensor on a GPU"
)
def test_nvfp4_is_what_mlx_makes_of_it() -> None:
    largest = mx.array(np.abs(X).max())
    options: Any = {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": largest}
    packed = mx.quantize(mx.array(X), **options)
    theirs = np.array(mx.dequantize(*packed, **options, dtype=mx.float32))
    ours = Nvfp4().decoded(X, layer=0, role=VALUE)
    # A number on a boundary may fall to the other side; else float32 rounding.
    close = np.abs(ours - theirs) <= 1e-5 * np.abs(theirs)
    assert close.mean() > 0.9999
    assert 0.005 < np.square(ours - X).sum() / np.square(X).sum() < 0.02


# ---- all of them --------------------------------------------------------------------------------

ALL = [KVarN(3, 4), KVarN(2, 2, 128), Exl3(2, 4), Exl3(3, 3, True), Nvfp4()]


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_rivals_obey_sink_and_window(codec: Any) -> None:
    cache = SimulatedCache(codec, 0, sink=9, window=30)
    for start in range(0, S, 50):
        part = mx.array(X[:, :, start : start + 50])
        cache.update_and_fetch(part, -part)
    assert cache.packed_tokens == {64: 192, 128: 128}[codec.block]
    keys, values = (np.array(x) for x in cache.keys_and_values())
    end = 9 + cache.packed_tokens
    for found, x in ((keys, X), (values, -X)):
        np.testing.assert_array_equal(found[:, :, :9], x[:, :, :9])
        np.testing.assert_array_equal(found[:, :, end:], x[:, :, end:])
        assert (found[:, :, 9:end] != x[:, :, 9:end]).mean() > 0.7
    if not isinstance(codec, Nvfp4):  # whose scale of the tensor depends on what comes at once
        coded = codec.decoded(X[:, :, 9:end], layer=0, role=KEY)
        # Products of other shapes add in another order.
        np.testing.assert_allclose(keys[:, :, 9:end], coded, atol=1e-3)


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_zero_vectors_stay_zero(codec: Any) -> None:
    zeros = np.zeros((1, 1, codec.block, D), np.float32)
    for role in (KEY, VALUE):
        np.testing.assert_allclose(codec.decoded(zeros, layer=0, role=role), 0, atol=1e-9)


@pytest.mark.parametrize(
    ("codec", "key", "value"),
    [
        # As their tile of 128 x 128 in bytes: codes, (2 * 128 + 128) * 2 of keys and of values.
        (KVarN(4, 2, 128), 4 + 768 * 8 / 128**2, 2 + 768 * 8 / 128**2),
        # A channel of 64 tokens: two float16; a token of 128 channels: one. Values the other way.
        (KVarN(4, 3), 4 + 32 / 64 + 16 / 128, 3 + 32 / 128 + 16 / 64),
        (Exl3(2, 8), 2.5, 8.5),
        (Exl3(5, 3, True), 5.5, 3.5),
        (Nvfp4(), 4.5, 4.5),
    ],
)
def test_true_bits(codec: Any, key: float, value: float) -> None:
    assert codec.bits_per_value(128, KEY) == key
    assert codec.bits_per_value(128, VALUE) == value


@pytest.mark.parametrize(
    ("codec", "head_dim", "message"),
    [
        (KVarN(4, 4), 80, "a power of two, but this model's is 80; leave kvarn out"),
        (Exl3(4, 4), 80, "a multiple of 32, but this model's is 80; leave exl3 out"),
        (Nvfp4(), 72, "a multiple of 16, but this model's is 72; leave nvfp4 out"),
    ],
)
def test_rivals_refuse_a_head_dim(codec: Any, head_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.decoded(np.ones((1, 1, 64, head_dim), np.float32), layer=0, role=KEY)
