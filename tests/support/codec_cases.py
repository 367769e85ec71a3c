"""Rows to encode and packed rows to decode, and how right the kernels of a platform are.

The judge is the float64 reference; ``runner`` is one of tests/support/runners.py.
"""

import itertools
import math

import mlx.core as mx
import numpy as np

from rotormlx.codec import codebook, reference, trellis
from rotormlx.codec.format import BLOCK, KEY, VALUE, Packed, codec
from rotormlx.config import RotorConfig
from tests.support.bounds import rotated, unit_scale, unit_variance

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


def unit_rows(x, chosen, *, scale=None, centres=None):
    """z of rows ``[B, K, N * 64, D]``, float64 ``[B, K, N, 64, D]``; of special rows zeros."""
    z, norm = unit_variance(rotated(x, chosen, centres, scale))
    with np.errstate(over="ignore", invalid="ignore"):
        size = (norm / np.sqrt(chosen.head_dim)).astype(np.float16)
    return np.where((size > 0) & (size < np.inf), z, 0)


def squared_error(z, level, chosen):
    """What a path costs: the sum over the packed axis."""
    return np.square(z - level).sum(-1 if chosen.role == KEY else -2)


def compare(written, expected, chosen, z):
    """Packed rows are the reference's, but for codes of which float32 leaves a doubt.

    Those are next to a boundary; or a path whose squared error is within rounding the least.
    """
    codes, wanted = (reference.unpack(p.words, chosen) for p in (written, expected))
    if chosen.has_trellis:
        cost, least = (
            squared_error(z, reference.levels(c, chosen), chosen) for c in (codes, wanted)
        )
        assert (cost <= least + 1e-5 * (1 + least)).all()
    else:
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
    given = {"channel_scale": scale, "centres": centres}
    expected = reference.encode(float64(x), chosen, **given)
    compare(written, expected, chosen, unit_rows(float64(x), chosen, scale=scale, centres=centres))
    return expected


def check_decode(runner, packed, chosen, *, scale=None, dtype="f32"):
    """Decode packed numpy arrays and compare."""
    decoded = runner.decode(packed, chosen, scale=scale, dtype=DTYPES[dtype])
    expected = reference.decode(packed, chosen, channel_scale=scale)
    # 1e-5 for sums in float32, which end before the channel scale; then one rounding to the dtype.
    unit = 1 if scale is None else scale[:, None]
    check_numbers(decoded, expected, dtype, float32=1e-5, unit=unit)


def check_numbers(numbers, expected, dtype, *, float32, unit=1):
    """Numbers are right within one rounding to the dtype, or ``float32``; NaN are NaN.

    Both are of the largest absolute value there is, counted in ``unit``.
    """
    assert numbers.dtype == DTYPES[dtype]
    error = {"f32": float32, "f16": 2**-10, "bf16": 2**-7}[dtype]
    assert np.array_equal(np.isnan(float64(numbers)), np.isnan(expected))
    wrong, largest = (np.nanmax(np.abs(x) / unit) for x in (float64(numbers) - expected, expected))
    assert wrong <= error * largest


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
    with np.errstate(all="ignore"):
        check_numbers(made, published(block, chosen)[:count], dtype, float32=2e-6)


def published(block, chosen):
    """What the published method makes of the rows of one block: nearest levels at every width."""
    z = unit_rows(block, chosen)[0, 0, 0]
    level = codebook.levels(chosen.bits)[reference.nearest(z, chosen.bits)]
    norm = reference.rotate(block, chosen)[1][0, 0]
    along = np.maximum((level * z).sum(-1, keepdims=True), chosen.head_dim / 2)
    scale = (norm * np.sqrt(chosen.head_dim) / along).astype(np.float16)
    scale = np.where(np.isfinite(scale), scale, np.nan)
    return (scale * level) @ chosen.rotation.inverse.T


# ---- special rows -------------------------------------------------------------------------------


def special_rows(chosen):
    """Rows of 16 channels, named, for the ends of what a size and a scale can be."""
    level = codebook.levels(chosen.bits)[reference.nearest(np.ones(1), chosen.bits)][0]
    unit = level / chosen.shrink
    return {
        "zero": np.zeros(16),
        "subnormal": np.full(16, 1e-40),
        "below float16": np.full(16, 2.0**-26),
        "a scale without a size": np.full(16, 2.0**-25 * 0.98),
        "least of float16": np.full(16, 2.0**-24),
        "largest scale": np.full(16, unit * 65510),
        "scale above float16": np.full(16, unit * 65530),
        "largest size": np.full(16, 65510),
        "size above float16": np.full(16, 65530),
        "large": np.full(16, 3e4),
        "huge": np.full(16, 1e30),
        "huge that cancels": np.array([1e30, -1e30] * 8),
        "nan": np.array([np.nan] + [1.0] * 15),
        "inf": np.array([1.0] * 15 + [np.inf]),
        "both infinities": np.array([np.inf] + [-np.inf] * 15),
        "one": np.ones(16),
    }


def special_block(chosen):
    """These rows among others, float32 ``[1, 1, 64, 16]``: every fourth is one of them."""
    x = rows((1, 1, BLOCK, 16))
    special = np.array(list(special_rows(chosen).values()), np.float32)
    x[0, 0, : 4 * len(special) : 4] = special
    return x


def check_special_rows(runner, bits, role):
    """Each special row has the scale and the codes that it must get, and others are as ever."""
    chosen = made_codec("identity", 16, bits, role)
    x = special_block(chosen)
    centres = np.zeros((1, 1, 1, 16), np.float16) if role == KEY else None
    written = runner.encode(mx.array(x), chosen, centres=centres)
    check_special_block(written, chosen, centres=centres)
    check_decode(runner, written, chosen)


def check_special_block(written, chosen, *, centres=None):
    """What an encoder without a rotation made of :func:`special_block`."""
    x = special_block(chosen)
    with np.errstate(invalid="ignore"):
        expected = reference.encode(x, chosen, centres=centres)
        z = unit_rows(x, chosen, centres=centres)
        compare(written, expected, chosen, z)

    codes = reference.unpack(written.words, chosen)
    of_norm_1 = unit_scale(z, reference.levels(codes, chosen), chosen)[0, 0, 0]
    for i, (kind, row) in enumerate(special_rows(chosen).items()):
        place = 4 * i
        with np.errstate(over="ignore", invalid="ignore"):
            norm = np.linalg.norm(row.astype(np.float64))
            size, scale = np.float16(norm / 4), np.float16(norm * of_norm_1[place])
        if not (np.isfinite(size) and np.isfinite(scale)):
            scale = np.nan
        stored = written.scales[0, 0, 0, place]
        # One unit in the last place of float16.
        wanted = 0 if size == 0 else scale
        assert np.allclose(stored, wanted, rtol=2**-10, atol=0, equal_nan=True), kind
        if not chosen.has_trellis and not 0 < size < np.inf:
            assert not codes[0, 0, 0, place].any(), kind


def badly_met_rows(head_dim=80):
    """Rows whose largest number no level comes near, float32 ``[1, 1, 64, D]``."""
    return np.eye(BLOCK, head_dim, dtype=np.float32)[None, None] * 3


def check_badly_met_rows(runner, bits=4, role=VALUE):
    """Their scale is twice their size; but 8 bits have a level that is near enough."""
    chosen, x = made_codec("identity", 80, bits, role), badly_met_rows()
    centres = np.zeros((1, 1, 1, 80), np.float16) if role == KEY else None
    expected = check_encode(runner, mx.array(x), chosen, centres=centres)
    assert bits == 8 or (expected.scales == np.float16(chosen.shrink * 6 * 80**-0.5)).all()


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


def tied_path_row(rng, bits):
    """A row of 16 numbers, halves of what levels are multiples of, and of norm 4: so z is the row.

    The first number lies between two levels of a subset, or far behind the last of them: those in
    the rows around it decide which subset it gets.
    """
    m = (128 * codebook.trellis_levels(bits)[: 2**bits]).astype(int)
    subsets = [np.concatenate([m[c::4], -m[3 - c :: 4]]) for c in range(4)]
    between = [(a + b) // 2 for of_one in subsets for a, b in itertools.combinations(of_one, 2)]
    while True:
        first = rng.choice(between) if rng.random() < 0.3 else rng.choice([-400, 400])
        row = [first, *np.rint(64 * rng.normal(size=12)).astype(int)]
        rest = 16 * 128**2 - sum(int(x) ** 2 for x in row)
        for a, b in itertools.product(range(300), repeat=2):
            third = rest - a * a - b * b
            if 0 <= third <= 300**2 and math.isqrt(third) ** 2 == third:
                return np.array([*row, a, -b, math.isqrt(third)]) / 128


def tied_paths(bits):
    """Rows ``[2, 1, 64, 16]`` for which every sum of a path is exact, and many are equal."""
    rng = np.random.default_rng(4)
    x = rng.choice([-1, 1], (2, 1, BLOCK, 16)).astype(np.float32)
    x[0, 0] = [tied_path_row(rng, bits) for _ in range(BLOCK)]
    # Of norm 4 too.
    x[1, :, 1::3] *= 2 * (np.arange(16) % 4 == 1)
    x[1, :, 2::5] = 0
    return x


def check_tied_paths(runner, bits, role):
    """Where every sum is exact and many are equal, the path is that of the reference."""
    chosen, x = made_codec("identity", 16, bits, role), tied_paths(bits)
    centres = np.zeros((2, 1, 1, 16), np.float16) if role == KEY else None
    written = runner.encode(mx.array(x), chosen, centres=centres)
    assert np.array_equal(written.words, reference.encode(x, chosen, centres=centres).words)


def check_filled_up_path(runner, head_dim=80, bits=3, role=VALUE, start=21, *, has_state=True):
    """Behind tokens that have codes already, values go on from their state; keys do not care.

    Without a state they go on from state 0, which is that of codes of 0.
    """
    chosen = made_codec("cascade", head_dim, bits, role)
    x = rows((2, 2, BLOCK, head_dim), seed=8)
    before = reference.encode(x, chosen)
    x[:, :, :start] = 0
    state = np.array(trellis.state_after(before.words, start), np.uint32)
    given = {"centres": before.centres, "start": start}
    has_state = has_state and role == VALUE
    written = runner.encode(mx.array(x), chosen, **given, state=state if has_state else None)
    expected = reference.encode(x, chosen, **given, state=state if has_state else 0)
    if role == VALUE:
        assert not reference.unpack(written.words, chosen)[..., :start, :].any()

    # What counts is the block that both are parts of.
    kept = chosen.kept_bits(start) if has_state else np.uint32(0)
    found, wanted = (
        reference.levels(reference.unpack(p.words & ~kept | before.words & kept, chosen), chosen)
        for p in (written, expected)
    )
    counts = np.arange(BLOCK)[:, None] >= start
    z = unit_rows(x, chosen, centres=before.centres)
    cost, least = (squared_error(z * counts, level * counts, chosen) for level in (found, wanted))
    assert (cost <= least + 1e-5 * (1 + least)).all()
    norm = np.linalg.norm(rotated(x, chosen, before.centres, None), axis=-1)
    scales = norm * unit_scale(z, found, chosen)
    assert np.allclose(written.scales[..., start:], scales[..., start:], rtol=2**-10, atol=0)


def check_own_scales_of_rows(runner, bits=3, role=KEY):
    """Batch rows with channel scales of their own are coded as each would be alone."""
    chosen = made_codec("cascade", 80, bits, role)
    x = mx.array(rows((2, 3, BLOCK, 80)))
    scale = np.stack([scale_of_channels(chosen, 3), scale_of_channels(chosen, 3)[::-1] * 2])
    packed = runner.encode(x, chosen, scale=scale)
    decoded = float64(runner.decode(packed, chosen, scale=scale))
    for b in range(2):
        alone = runner.encode(x[b : b + 1], chosen, scale=scale[b])
        for part, of_all in zip(alone, packed, strict=True):
            assert part is None or np.array_equal(part[0], of_all[b])
        one = runner.decode(alone, chosen, scale=scale[b])
        assert np.array_equal(float64(one)[0], decoded[b])


def check_any_words(runner, head_dim=80, bits=3, role=VALUE):
    """Words that no encoder would write are decoded as the format says."""
    chosen = made_codec("cascade", head_dim, bits, role)
    packed = reference.encode(rows((1, 2, BLOCK, head_dim)), chosen)
    words = np.random.default_rng(6).integers(0, 2**32, packed.words.shape, np.uint32)
    check_decode(runner, packed._replace(words=words), chosen)


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
