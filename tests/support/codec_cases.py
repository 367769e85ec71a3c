"""Rows to encode and packed rows to decode, and how right the kernels of a platform are.

The judge is the float64 reference; ``runner`` is one of tests/support/runners.py.
"""

import mlx.core as mx
import numpy as np

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY, VALUE, Packed, codec
from rotormlx.config import RotorConfig

DTYPES = {"f16": mx.float16, "bf16": mx.bfloat16, "f32": mx.float32}
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)


def rows(shape, seed=0, offset=30):
    """Normal numbers with unequal channels and an offset, what keys look like; float32."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=shape[-1]) * 0.5)
    x = rng.normal(size=shape) * spread + rng.normal(size=shape[-1]) * offset
    return x.astype(np.float32)


def float64(a):
    """The numbers of an MLX array."""
    return np.array(a.astype(mx.float32)).astype(np.float64)


def as_numpy(packed):
    """Packed rows as numpy arrays."""
    return Packed(*(None if a is None else np.array(a) for a in packed))


def made_codec(name, head_dim, bits, role):
    """A codec of the rotation of this name."""
    return codec(RotorConfig(bits, bits, name, seed=7), head_dim, layer=3, role=role)


def scale_of_channels(chosen, heads):
    """A channel scale ``[K, D]``, float32."""
    rng = np.random.default_rng(5)
    return np.exp(rng.normal(size=(heads, chosen.head_dim))).astype(np.float32)


def compare(written, expected, chosen):
    """Packed rows are the reference's, but for codes within float32 errors of a boundary."""
    codes, wanted = (reference.unpack(p.words, chosen) for p in (written, expected))
    # 2 errors of 1e-6 against a density of boundaries of at most 128 / 4 per unit: 1e-4 of all.
    assert (codes != wanted).sum() <= max(1, 1e-4 * codes.size)
    # All words, bits behind the last position among them, hold nothing but these codes.
    assert np.array_equal(reference.pack(codes, chosen), written.words)
    same = (codes == wanted).all(-1)
    # One unit in the last place of float16, where the codes are the same.
    assert np.allclose(
        written.scales[same], expected.scales[same], rtol=2**-10, atol=0, equal_nan=True
    )
    assert chosen.role == VALUE or np.array_equal(written.centres, expected.centres)


def check_encode(runner, x, chosen, *, scale=None, centres=None):
    """Encode x, an MLX array, and compare; returns the reference's packed rows."""
    written = runner.encode(x, chosen, scale=scale, centres=centres)
    if chosen.role == KEY and centres is None:
        centres = written.centres
        means = reference.block_means(float64(x).reshape(*x.shape[:2], -1, BLOCK, x.shape[-1]))
        # One unit in the last place: a mean may lie next to a tie.
        assert np.allclose(centres, means, rtol=2**-10, atol=0)
    expected = reference.encode(float64(x), chosen, channel_scale=scale, centres=centres)
    compare(written, expected, chosen)
    return expected


def check_decode(runner, packed, chosen, *, scale=None, dtype="f32"):
    """Decode packed numpy arrays and compare."""
    decoded = runner.decode(packed, chosen, scale=scale, dtype=DTYPES[dtype])
    expected = reference.decode(packed, chosen, channel_scale=scale)
    # 1e-5 for sums in float32, the bound of docs/FORMAT.md; then one rounding to the dtype.
    check_numbers(decoded, expected, dtype, float32=1e-5)


def check_numbers(numbers, expected, dtype, *, float32):
    """Finite numbers are right within one rounding to the dtype, or ``float32``; NaN are NaN."""
    assert numbers.dtype == DTYPES[dtype]
    error = {"f32": float32, "f16": 2**-10, "bf16": 2**-7}[dtype]
    assert np.array_equal(np.isnan(float64(numbers)), np.isnan(expected))
    assert np.nanmax(np.abs(float64(numbers) - expected)) <= error * np.nanmax(np.abs(expected))


def check_rotor3(runner, head_dim=80, bits=3, dtype="f32"):
    """The published method, there and back, on rows of which some are special."""
    chosen = codec(RotorConfig(bits, bits, "rotor3", seed=2), head_dim, layer=5, role=VALUE)
    count = 11  # no multiple of the rows of a threadgroup
    x = rows((count, head_dim))
    x[3] = 0
    x[4, 1] = np.nan
    x[5] *= 1e20
    x = mx.array(x).astype(DTYPES[dtype])
    made = runner.rotor3(x, chosen, seed=2, layer=5)
    block = np.zeros((1, 1, BLOCK, head_dim))
    block[0, 0, :count] = float64(x)
    with np.errstate(invalid="ignore"):
        expected = reference.decode(reference.encode(block, chosen), chosen)[0, 0, :count]
    check_numbers(made, expected, dtype, float32=2e-6)


# ---- special rows -------------------------------------------------------------------------------


def special_rows(bits):
    """Rows of 16 channels, with the scale that each must get: a number, or None to compute it."""
    level = codebook.levels(bits)
    unit = level[reference.nearest(np.ones(1), bits)][0]
    tiny = np.float32(1e-40)
    return {
        "zero": (np.zeros(16), 0.0),
        "subnormal": (np.full(16, tiny), 0.0),
        "below float16": (np.full(16, unit * 2.0**-26), 0.0),
        "least of float16": (np.full(16, unit * 2.0**-24), 2.0**-24),
        "largest of float16": (np.full(16, unit * 65510), 65504.0),
        "above float16": (np.full(16, unit * 65530), np.nan),
        "huge": (np.full(16, 1e30), np.nan),
        "huge that cancels": (np.array([1e30, -1e30] * 8), np.nan),
        "nan": (np.array([np.nan] + [1.0] * 15), np.nan),
        "inf": (np.array([1.0] * 15 + [np.inf]), np.nan),
        "both infinities": (np.array([np.inf] + [-np.inf] * 15), np.nan),
        "one": (np.ones(16), 1 / unit),
    }


def check_special_rows(runner, bits, role):
    """Each special row has the scale and the codes that it must get, and others are as ever."""
    special = special_rows(bits)
    chosen = made_codec("identity", 16, bits, role)
    x = rows((1, 1, BLOCK, 16))
    for i, (row, _) in enumerate(special.values()):
        x[0, 0, 5 * i] = row
    centres = np.zeros((1, 1, 1, 16), np.float16) if role == KEY else None
    written = runner.encode(mx.array(x), chosen, centres=centres)
    codes = reference.unpack(written.words, chosen)[0, 0, 0]
    for i, (kind, (_, scale)) in enumerate(special.items()):
        stored = written.scales[0, 0, 0, 5 * i]
        assert np.array_equal(stored, np.float16(scale), equal_nan=True), kind
        # Rows whose codes count are constant and positive.
        code = reference.nearest(np.ones(1), bits) if np.isfinite(scale) and scale > 0 else 0
        assert (codes[5 * i] == code).all(), kind
    others = [t for t in range(BLOCK) if t % 5 or t // 5 >= len(special)]
    with np.errstate(invalid="ignore"):
        expected = reference.encode(x, chosen, centres=centres)
    assert np.array_equal(written.scales[0, 0, 0, others], expected.scales[0, 0, 0, others])
    check_decode(runner, written, chosen)


def check_centre_of_finite_rows(runner, bits=4):
    """A row that is not finite counts as nothing, and the mean of a huge block is clipped."""
    chosen = made_codec("cascade", 80, bits, KEY)
    x = rows((1, 3, BLOCK, 80))
    x[0, 0, 7, 79] = np.nan
    x[0, 0, 8, 0] = np.inf
    x[0, 1] = 3e38 * np.sign(x[0, 1, :1])
    x[0, 2] = np.nan
    with np.errstate(all="ignore"):
        check_encode(runner, mx.array(x), chosen)


def tied_row(bits, index):
    """A row of 16 whose norm is exactly 4 in float32 and whose first number is a boundary."""
    tie = codebook.boundaries(bits)[index]
    for second in np.arange(0, 0.1, 1e-4, dtype=np.float32):
        third = np.sqrt(16 - tie * tie - second * second)
        # The order of the sum over lanes: 0 and 2 first, then 1.
        if (tie * tie + third * third) + second * second == np.float32(16):
            return np.array([tie, second, third] + [0] * 13, np.float32)
    raise AssertionError("no such row")


def check_ties(runner, bits):
    """A tie goes to the larger magnitude, of either sign; either zero has code 0."""
    chosen = made_codec("identity", 16, bits, VALUE)
    x = np.zeros((1, 1, BLOCK, 16), np.float32)
    count = min(len(codebook.boundaries(bits)), 20)
    for i in range(count):
        x[0, 0, 2 * i] = tied_row(bits, i)
        x[0, 0, 2 * i + 1] = -x[0, 0, 2 * i]
    codes = reference.unpack(runner.encode(mx.array(x), chosen).words, chosen)[0, 0, 0]
    sign = 1 << (bits - 1)
    for i in range(count):
        assert codes[2 * i, 0] == i + 1
        assert codes[2 * i + 1, 0] == sign + i + 1
        assert not codes[2 * i : 2 * i + 2, 3:].any()


# ---- small calls, for mutations -----------------------------------------------------------------


def encodes(runner, name="cascade", head_dim=80, bits=3, role=KEY, *, scaled=True, shape=(1, 2, 1)):
    """Rows of ``shape`` batch rows, heads and blocks, with a channel scale or without."""
    chosen = made_codec(name, head_dim, bits, role)
    batch, heads, blocks = shape
    x = mx.array(rows((batch, heads, blocks * BLOCK, head_dim)))
    check_encode(runner, x, chosen, scale=scale_of_channels(chosen, heads) if scaled else None)


def decodes(runner, name="cascade", head_dim=80, bits=3, role=KEY, *, shape=(1, 2, 1)):
    """The same back, with a channel scale."""
    chosen = made_codec(name, head_dim, bits, role)
    batch, heads, blocks = shape
    scale = scale_of_channels(chosen, heads)
    x = rows((batch, heads, blocks * BLOCK, head_dim))
    packed = reference.encode(x, chosen, channel_scale=scale)
    check_decode(runner, packed, chosen, scale=scale)


def fills_up(runner, bits=4, shape=(2, 3)):
    """The rows that are there come as zeros; centres are a part of a longer array."""
    chosen = made_codec("cascade", 80, bits, KEY)
    batch, heads = shape
    x = rows((batch, heads, BLOCK, 80))
    x[:, :, :37] = 0
    centres = rows((batch, heads, 1, 80), seed=3).astype(np.float16)
    scale = scale_of_channels(chosen, heads)
    check_encode(runner, mx.array(x), chosen, scale=scale, centres=centres)
