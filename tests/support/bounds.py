"""How far compressed rows, and attention over them, may be off; and rows of every kind.

A row y (centred, divided by the channel scale) is coded as ``s l``: w = C y with n = ||w||,
z = sqrt(D) w / n, l the levels of its codes, s = t n sqrt(D) / max(<l, z>, D / 2) the scale, with
t = 1 for keys. With p = <l, z> / D, q = ||l|| / sqrt(D) and m = max(p, 1/2),

    ||w - s l||^2 = n^2 (1 - 2 t p / m + (t q / m)^2).

Rounding s to float16 adds ``u l`` with |u| <= max(2^-11 s, 2^-25), and no level exceeds the
largest, M. C is orthogonal, so the decoded row, divided by the channel scale again, is no farther
from y than the root of that plus

    max(2^-11 ||s l||, 2^-25 M sqrt(D)).

How large it can be: let g(t) be the largest squared distance that a number whose square is t has
from the nearest of the levels that it may choose from. At 4 and 8 bits those are all. In a trellis,
both branches that leave a state together have every second level, so a path that always takes the
nearer one is no farther from any number than the worse of both halves; and the path that is written
costs no more in sum. The z_i^2 add up to D, so for every f

    sum g(z_i^2) <= D e^2,   e^2 = f + max over t <= D of (g(t) - f t).

With the best f, ||z - l|| <= e sqrt(D): for each row by itself, but for the 64 rows of a block
together where a path runs along the tokens. So 1 + q^2 - 2 p <= e^2. With that in place of q^2, and
p >= 1/2, the square above is at most n^2 (2 / p - (1 - e^2) / p^2 - 1), which is largest at
p = 1 - e^2, or at p = 1/2 if that is more; with p < 1/2 it is less than there. So of no row by
itself is the error, before rounding, more than

    n e / sqrt(1 - e^2) if e^2 <= 1/2,   n sqrt(4 e^2 - 1) otherwise.

With t < 1 the square is a convex function of t between n^2 at 0 and that, squared, at 1.

Attention: if every score is off by at most d, the softmax moves by at most tanh(d / 2) in total
variation (a group of weight a whose scores rise by d while the others fall by d moves by
a e^d / (a e^d + (1 - a) e^-d) - a, which is largest at a = 1 / (1 + e^d)). So the output is off by
at most

    tanh(d / 2) diameter(values) + the largest error of a value,

and d = scale ||c q|| (the largest error of a key, divided by the channel scale c) plus what is
taken off a score for the noise of its codes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from rotormlx.codec import codebook, reference, trellis
from rotormlx.codec.format import BLOCK, KEY, LARGEST_FLOAT16, VALUE, Codec, Packed

# Float32 sums: the bound of docs/FORMAT.md, section 9.
FLOAT32_DOUBT = 1e-5
AROUND_1 = (1 - FLOAT32_DOUBT, 1 + FLOAT32_DOUBT)


def examples(count: int, **more: Any) -> settings:
    """Settings of a property: ``count`` examples, the same each time.

    With ROTORMLX_EXAMPLES=n, n times as many, others each time.
    """
    times = int(os.environ.get("ROTORMLX_EXAMPLES", "0"))
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count * max(1, times),
        derandomize=times == 0,
        database=None,
        deadline=None,
        suppress_health_check=slow,
        **more,
    )


# ---- errors -------------------------------------------------------------------------------------


def signed_levels(codec: Codec) -> np.ndarray:
    """All levels that a code of some position can have, ascending, float64."""
    bits = codec.bits
    levels = codebook.trellis_levels(bits) if codec.has_trellis else codebook.levels(bits)
    return np.sort(levels.astype(np.float64))


@cache
def worst_distance(codec: Codec) -> float:
    """e: no ||z - l|| is larger than e sqrt(D), of the rows together that share a path."""
    levels, dim = signed_levels(codec), codec.head_dim
    halves = (levels[::2], levels[1::2]) if codec.has_trellis else (levels,)
    size = np.linspace(0, np.sqrt(dim), 20_001)
    z = np.concatenate([size, -size])
    far = np.max([np.abs(z[:, None] - half).min(1) for half in halves], axis=0)
    g = np.square(far).reshape(2, -1).max(0)
    f = np.square(np.linspace(0, 1, 201))[:, None]
    return float(np.sqrt(np.min(f[:, 0] + np.max(g - f * np.square(size), axis=1))))


def worst_row_error(codec: Codec) -> float:
    """The largest error of any row with n = 1 that has a path by itself; its scale not rounded."""
    square = worst_distance(codec) ** 2
    unbiased = square / (1 - square) if square <= 0.5 else 4 * square - 1
    return float(np.sqrt(1 - codec.shrink + codec.shrink * unbiased))


def rotated(x: Any, codec: Codec, centres: Any, channel_scale: Any) -> np.ndarray:
    """w of rows ``[B, K, N * 64, D]``, float64 ``[B, K, N, 64, D]``."""
    x = np.asarray(x, np.float64)
    blocks = x.reshape(*x.shape[:2], -1, BLOCK, x.shape[-1])
    if codec.role == KEY:
        blocks = blocks - np.asarray(centres, np.float64)[..., None, :]
    if channel_scale is not None:
        blocks = blocks / np.asarray(channel_scale, np.float64)[:, None, None, :]
    return reference.rotate(blocks, codec)[0]


def unit_variance(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z and n ``[..., 1]`` of rotated rows; z is 0 where n is 0 or not finite."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        # In two steps: the square of a large number may be none.
        most = np.abs(w).max(-1, keepdims=True)
        n = most * np.sqrt(np.square(w / most).sum(-1, keepdims=True))
        n = np.where(most == 0, 0, n)
        z = np.where(np.isfinite(n) & (n > 0), w * (np.sqrt(w.shape[-1]) / n), 0)
    return z, n


def unit_scale(z: np.ndarray, level: np.ndarray, codec: Codec) -> np.ndarray:
    """The scale, not rounded, of rows of norm 1 with these z and levels ``[..., D]``."""
    along = np.maximum((level * z).sum(-1), codec.head_dim / 2)
    return codec.shrink * np.sqrt(codec.head_dim) / along


def row_error(w: np.ndarray, words: np.ndarray, codec: Codec) -> np.ndarray:
    """The largest error of each row by its codes, in real arithmetic, ``[...]``."""
    z, n = unit_variance(w)
    level = reference.levels(reference.unpack(words, codec), codec)
    root = np.sqrt(codec.head_dim)
    coded = level * unit_scale(z, level, codec)[..., None]
    error = np.linalg.norm(z / root - coded, axis=-1)
    size = np.linalg.norm(coded, axis=-1)
    rounding = np.maximum(2.0**-11 * n[..., 0] * size, 2.0**-25 * signed_levels(codec)[-1] * root)
    return np.where(n[..., 0] > 0, n[..., 0] * error, 0) + rounding


def attention_error(values: np.ndarray, score_error: float, value_error: float) -> float:
    """The largest error of an output over values ``[S, Dv]``, perhaps the zero vector too."""
    radius = np.linalg.norm(values, axis=-1).max(initial=0.0)
    return float(np.tanh(score_error / 2) * 2 * radius + value_error)


def check_encoded(
    x: Any,
    found: Packed,
    codec: Codec,
    channel_scale: Any = None,
    centres: Any = None,
    cuts: tuple[int, ...] = (),
    tokens: int = BLOCK,
) -> None:
    """Words, scales and centres are what docs/FORMAT.md, section 5 makes of these rows.

    ``x`` is float64 ``[B, K, N * 64, D]``. A block that was trimmed was coded anew from each of
    ``cuts`` on, and ``tokens`` of it count.
    Where float32 sums leave a doubt (next to a boundary or to a rounding tie, or which of two paths
    is the cheaper) both are right.
    """
    blocks = x.reshape(*x.shape[:2], -1, BLOCK, x.shape[-1])
    finite = np.isfinite(blocks).all(-1, keepdims=True)
    counted = np.where(finite, blocks, 0)
    if codec.role == KEY and centres is None:
        # Sums of 64 numbers: at most 64 roundings of 2^-24 of all sizes together.
        doubt = 2.0**-18 * np.abs(counted).sum(-2) / BLOCK
        mean = counted.sum(-2) / BLOCK
        low, high = (
            _float16(np.clip(m, -LARGEST_FLOAT16, LARGEST_FLOAT16))
            for m in (mean - doubt, mean + doubt)
        )
        assert found.centres.dtype == np.float16
        assert ((low <= found.centres) & (found.centres <= high)).all()
    elif codec.role == KEY:
        assert np.array_equal(found.centres, centres)

    codes, scales = reference.unpack(found.words, codec), found.scales
    # Bits behind the last position of a plane are zero.
    assert np.array_equal(reference.pack(codes, codec), found.words)
    w = rotated(
        np.where(finite, x.reshape(blocks.shape), 0).reshape(x.shape),
        codec,
        found.centres,
        channel_scale,
    )
    z, n = unit_variance(w)
    n = n[..., 0]
    broken = ~finite[..., 0]
    r_low, r_high = (_float16(n * side / np.sqrt(codec.head_dim)) for side in AROUND_1)
    is_zero, may_be_zero = (~broken & (r == 0) for r in (r_high, r_low))
    is_large, may_be_large = (broken | (r == np.inf) for r in (r_low, r_high))
    level = reference.levels(codes, codec)
    low, high = (_float16(n * unit_scale(z, level, codec) * side) for side in AROUND_1)
    right = (low <= scales) & (scales <= high) & (scales < np.inf) & ~is_zero & ~is_large
    right |= np.isnan(scales) & (may_be_large | np.isinf(high))
    right |= (scales == 0) & may_be_zero
    assert right[..., :tokens].all()

    # Where float32 leaves a doubt whether a row is special, its scale says so.
    special = (may_be_zero & (scales == 0)) | (may_be_large & np.isnan(scales))
    z = np.where(special[..., None], 0, z)
    if codec.has_trellis:
        if codec.role == KEY:
            z, level = (np.swapaxes(a, -1, -2)[..., :tokens] for a in (z, level))
            check_path(z, level, codec.bits)
            return
        cuts = tuple(sorted({0, *cuts, tokens}))
        # What came behind a cut is forgotten, but not to which state it led.
        states = [0, *(trellis.state_after(found.words, cut) for cut in cuts[1:])]
        for i in range(len(cuts) - 1):
            part = (..., slice(cuts[i], cuts[i + 1]), slice(None))
            end = states[i + 1].astype(int) if cuts[i + 1] < BLOCK else None
            check_path(z[part], level[part], codec.bits, states[i], end)
        return
    size, doubt = np.abs(z), FLOAT32_DOUBT * (1 + np.abs(z))
    half = 2 ** (codec.bits - 1)
    index, negative = codes % half, codes >= half
    near = (
        reference.nearest(np.maximum(size - doubt, 0), codec.bits),
        reference.nearest(size + doubt, codec.bits),
    )
    near_enough = (near[0] <= index) & (index <= near[1])
    near_enough &= (negative == (z < 0)) | ((size <= doubt) & ~special[..., None])
    assert near_enough[..., :tokens, :].all()


def check_path(
    z: np.ndarray, level: np.ndarray, bits: int, state: Any = 0, end: np.ndarray | None = None
) -> None:
    """Levels ``[..., A, lanes]`` are those of the cheapest path that begins behind ``state``.

    Of all paths, or of those that end in the states ``end [..., lanes]``.

    An encoder finds the cheapest path of numbers that are float32's. Where they are off by d, a
    level moves the square by at most 2 d times itself, so the path found costs no more than the
    best by 2 ||d|| ||level - level of the best||; and both are no farther apart than their
    distances from z together. Sums of A squares are off by A roundings.
    """
    sums = path_sums(z, bits, state)
    best = sums.min(-1) if end is None else np.take_along_axis(sums, end[..., None], -1)[..., 0]
    cost = np.square(z - level).sum(-2)
    doubt = np.linalg.norm(FLOAT32_DOUBT * (1 + np.abs(z)), axis=-2)
    doubt = 2 * doubt * (np.sqrt(cost) + np.sqrt(best)) + z.shape[-2] * 2.0**-24 * (cost + best)
    assert (cost <= best + doubt).all()


def path_sums(z: np.ndarray, bits: int, state: Any = 0) -> np.ndarray:
    """What the cheapest path to each last state costs, ``[..., lanes, 8]`` of ``[..., A, lanes]``.

    In float64, by the definition of the code (docs/FORMAT.md, section 5).
    """
    m = codebook.trellis_levels(bits).astype(np.float64)[: 2**bits]
    far = np.square(z[..., None] - m), np.square(z[..., None] + m)
    # Subset c holds the magnitudes c, c + 4, ... and, negated, 3 - c, 7 - c, ...
    costs = np.stack(
        [np.minimum(far[0][..., c::4].min(-1), far[1][..., 3 - c :: 4].min(-1)) for c in range(4)],
        -1,
    )
    p, p1, p2 = (np.arange(8)[:, None] >> back & 1 for back in range(3))
    p3 = np.arange(2)
    before, subset = p1 + 2 * p2 + 4 * p3, p2 + 2 * (p ^ p1 ^ p3)
    sums = np.where(np.arange(8) == np.asarray(state)[..., None], 0.0, np.inf)
    sums = np.broadcast_to(sums, (*z.shape[:-2], z.shape[-1], 8))
    for i in range(z.shape[-2]):
        sums = (sums[..., before] + costs[..., i, :, :][..., subset]).min(-1)
    return sums


def check_decoded(
    x: Any, decoded: Any, packed: Packed, codec: Codec, channel_scale: Any = None
) -> float:
    """Decoded rows are what the packed ones stand for, and within the bound of the rows x.

    Returns:
        The largest error as a share of its bound.
    """
    expected = reference.decode(packed, codec, channel_scale=channel_scale)
    broken = np.isnan(packed.scales).reshape(decoded.shape[:3])
    assert np.isnan(decoded[broken]).all()
    assert np.isfinite(decoded[~broken]).all()
    factor = 1.0 if channel_scale is None else np.asarray(channel_scale, np.float64)[:, None, :]
    centre = np.zeros((*decoded.shape[:2], decoded.shape[2] // BLOCK, 1, decoded.shape[3]))
    if codec.role == KEY:
        centre = centre + packed.centres.astype(np.float64)[..., None, :]
    centre = np.broadcast_to(centre, (*centre.shape[:3], BLOCK, centre.shape[-1])).reshape(
        decoded.shape
    )
    size = np.linalg.norm((expected - centre) / factor, axis=-1, keepdims=True)
    doubt = FLOAT32_DOUBT * (size * factor + np.abs(centre))
    assert (np.abs(decoded - expected) <= doubt)[~broken].all()

    w = rotated(np.where(broken[..., None], 0, x), codec, packed.centres, channel_scale)
    z, n = unit_variance(w)
    bound = row_error(w, packed.words, codec)
    if codec.has_trellis and codec.role == VALUE:
        _check_paths_of_values(z, packed, codec)
    else:
        worst = (worst_row_error(codec) + 2.0**-10) * n[..., 0] + 2.0**-18
        assert (bound <= worst)[~broken.reshape(bound.shape)].all()
    bound = bound.reshape(decoded.shape[:3])
    error = np.linalg.norm((decoded - np.where(broken[..., None], decoded, x)) / factor, axis=-1)
    float32 = np.linalg.norm(doubt / factor, axis=-1) + FLOAT32_DOUBT * n.reshape(decoded.shape[:3])
    assert (error <= bound + float32)[~broken].all()
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.nanmax(np.where(broken | (bound == 0), 0, error / bound), initial=0.0))


def _check_paths_of_values(z: np.ndarray, packed: Packed, codec: Codec) -> None:
    """Rows of values share their paths, so the bound holds for the rows of a block together."""
    # Special rows are coded as zeros.
    counts = np.isfinite(packed.scales) & (packed.scales > 0)
    distance = np.where(counts[..., None], z, 0) - reference.levels(
        reference.unpack(packed.words, codec), codec
    )
    mean = np.square(distance).sum(-1).mean(-1) / codec.head_dim
    assert (mean <= worst_distance(codec) ** 2 + 2.0**-10).all()


def _float16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(np.float16)


# ---- rows ---------------------------------------------------------------------------------------

Make = Callable[[np.random.Generator, int], np.ndarray]


def _one_hot(rng: np.random.Generator, dim: int) -> np.ndarray:
    row = np.zeros(dim)
    row[rng.integers(dim)] = rng.choice([-1, 1]) * 2.0 ** rng.uniform(-20, 15)
    return row


def _outlier(rng: np.random.Generator, dim: int) -> np.ndarray:
    row = rng.normal(size=dim)
    row[rng.integers(dim)] = rng.choice([-1e4, 1e4])
    return row


# What models, and float16, can come up with: all finite, within float16.
KINDS: dict[str, Make] = {
    "normal": lambda rng, dim: rng.normal(size=dim),
    "offset": lambda rng, dim: rng.normal(size=dim) + 30 * np.cos(np.arange(dim)),
    "unequal": lambda rng, dim: rng.normal(size=dim) * np.exp(2 * np.sin(np.arange(dim))),
    "heavy": lambda rng, dim: rng.standard_cauchy(size=dim).clip(-3e4, 3e4),
    "zero": lambda rng, dim: np.zeros(dim),
    "negative zero": lambda rng, dim: np.full(dim, -0.0),
    "one-hot": _one_hot,
    "outlier": _outlier,
    "constant": lambda rng, dim: np.full(dim, rng.normal() * 8),
    "alternating": lambda rng, dim: (
        np.where(np.arange(dim) % 2, 1.0, -1.0) * 2.0 ** rng.uniform(-8, 8)
    ),
    "plateau": lambda rng, dim: rng.integers(-1, 2, dim) * 0.5,
    "subnormal": lambda rng, dim: rng.integers(-8, 9, dim) * 2.0**-24,
    "least": lambda rng, dim: (np.arange(dim) == 1) * 2.0**-24,
    "largest": lambda rng, dim: rng.choice([-LARGEST_FLOAT16, LARGEST_FLOAT16], dim),
    "large": lambda rng, dim: rng.normal(size=dim).clip(-3, 3) * 2e4,
}
# Beyond float16, for bfloat16 and float32.
WIDE_KINDS: dict[str, Make] = {
    "huge": lambda rng, dim: rng.normal(size=dim) * 1e30,
    "huge that cancels": lambda rng, dim: np.where(np.arange(dim) % 2, 1e30, -1e30),
    "tiny": lambda rng, dim: rng.normal(size=dim) * 1e-30,
}
BROKEN_KINDS: dict[str, Make] = {
    "nan": lambda rng, dim: np.where(
        np.arange(dim) == rng.integers(dim), np.nan, rng.normal(size=dim)
    ),
    "inf": lambda rng, dim: np.where(
        np.arange(dim) == rng.integers(dim), np.inf, rng.normal(size=dim)
    ),
    "-inf": lambda rng, dim: np.where(
        np.arange(dim) == rng.integers(dim), -np.inf, rng.normal(size=dim)
    ),
    "infinities": lambda rng, dim: np.where(np.arange(dim) % 2, np.inf, -np.inf),
}
ALL_KINDS = KINDS | WIDE_KINDS | BROKEN_KINDS


def rows(shape: tuple[int, ...], kinds: list[str] | tuple[str, ...], seed: int) -> np.ndarray:
    """Rows of these kinds in any order, float32 ``[..., D]``."""
    rng = np.random.default_rng(seed)
    flat = [
        ALL_KINDS[kinds[rng.integers(len(kinds))]](rng, shape[-1])
        for _ in range(int(np.prod(shape[:-1])))
    ]
    return np.array(flat, np.float32).reshape(shape)
