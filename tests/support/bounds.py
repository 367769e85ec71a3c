"""How far compressed rows, and attention over them, may be off; and rows of every kind.

A row y (centred, divided by the channel scale) is coded as ``s l``: w = C y with n = ||w||,
z = sqrt(D) w / n, l the levels nearest to z, s = n / ||l|| the scale. ``s l`` is as long as w, so
with a the angle between l and w

    ||w - s l|| = 2 n sin(a / 2).

No level has another sign than its coordinate, so a is at most a right angle, and
n sin(a), the distance of w from the line of l, is at most its distance from ``(n / sqrt(D)) l``:

    n sin(a) <= E = (n / sqrt(D)) ||z - l||,

where ||z - l|| needs only z and the codebook. Rounding s to float16 adds ``t l`` with
|t| <= max(2^-11 s, 2^-25); ||s l|| = n, and no level exceeds the largest, M. C is orthogonal, so
the decoded row, divided by the channel scale again, is no farther from y than

    2 n sin(a / 2) + max(2^-11 n, 2^-25 M sqrt(D)).

For no row is E more than n e, e = min(1, sqrt(h^2 + max(0, 1 - M / sqrt(D))^2)), h the largest
distance of a number within [-M, M] from its level: beyond M the excess is |z| - M, its square is
convex in z^2 and 0 at 0, so its sum over channels with sum z^2 = D is largest where one channel has
all of it. So for no row is the first term more than n sqrt(2 - 2 sqrt(1 - e^2)), sqrt(2) n at most.

Attention: if every score is off by at most d, the softmax moves by at most tanh(d / 2) in total
variation (a group of weight a whose scores rise by d while the others fall by d moves by
a e^d / (a e^d + (1 - a) e^-d) - a, which is largest at a = 1 / (1 + e^d)). So the output is off by
at most

    tanh(d / 2) diameter(values) + the largest error of a value,

and d = scale ||c q|| (the largest error of a key, divided by the channel scale c).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY, LARGEST_FLOAT16, Codec, Packed

# Float32 sums: the bound of docs/FORMAT.md, section 9.
FLOAT32_DOUBT = 1e-5


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


def largest_distance(bits: int) -> tuple[float, float]:
    """h and M: the largest distance from a level within the codebook, and the largest level."""
    m = codebook.magnitudes(bits).astype(np.float64)
    return max(m[0], np.diff(m).max() / 2), m[-1]


def worst_row_error(bits: int, head_dim: int) -> float:
    """The largest error of any row with n = 1, before its scale is rounded."""
    h, most = largest_distance(bits)
    sine = min(1.0, np.hypot(h, max(0.0, 1 - most / np.sqrt(head_dim))))
    return float(np.sqrt(2 - 2 * np.sqrt(1 - sine**2)))


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


def row_error(w: np.ndarray, bits: int) -> np.ndarray:
    """The largest error of each row in real arithmetic, ``[...]``."""
    dim = w.shape[-1]
    z, n = unit_variance(w)
    level = codebook.levels(bits).astype(np.float64)[reference.nearest(z, bits)]
    size = np.linalg.norm(level, axis=-1, keepdims=True)
    error = n[..., 0] * np.linalg.norm(z / np.sqrt(dim) - level / size, axis=-1)
    error = np.where(n[..., 0] > 0, error, 0)
    rounding = np.maximum(2.0**-11 * n[..., 0], 2.0**-25 * largest_distance(bits)[1] * np.sqrt(dim))
    return error + rounding


def attention_error(values: np.ndarray, score_error: float, value_error: float) -> float:
    """The largest error of an output over values ``[S, Dv]``, perhaps the zero vector too."""
    radius = np.linalg.norm(values, axis=-1).max(initial=0.0)
    return float(np.tanh(score_error / 2) * 2 * radius + value_error)


def check_encoded(
    x: Any, found: Packed, codec: Codec, channel_scale: Any = None, centres: Any = None
) -> None:
    """Words, scales and centres are what docs/FORMAT.md, section 5 makes of these rows.

    ``x`` is float64 ``[B, K, N * 64, D]``.
    Where float32 sums leave a doubt (next to a boundary or to a rounding tie) both neighbours are
    right.
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

    counts = ~(np.isnan(scales) | (scales == 0))
    assert not codes[~counts].any()
    # A row without a number for its scale has the codes it would have had.
    used = np.where(counts[..., None], codes, reference.nearest(z, codec.bits))
    level = codebook.levels(codec.bits).astype(np.float64)[used]
    square = (level * level).sum(-1)
    scale = n[..., 0] / np.sqrt(square)
    doubt = FLOAT32_DOUBT * n[..., 0] / np.sqrt(square)
    low, high = _float16(scale - doubt), _float16(scale + doubt)
    broken = ~finite[..., 0]
    assert np.isnan(scales[broken]).all()
    assert (np.isnan(scales) | broken | ((low <= scales) & (scales <= high))).all()
    assert (~np.isnan(scales) | broken | np.isinf(high)).all()

    size, doubt = np.abs(z), FLOAT32_DOUBT * (1 + np.abs(z))
    half = 2 ** (codec.bits - 1)
    index, negative = codes % half, codes >= half
    near = (
        reference.nearest(np.maximum(size - doubt, 0), codec.bits),
        reference.nearest(size + doubt, codec.bits),
    )
    assert (((near[0] <= index) & (index <= near[1])) | ~counts[..., None]).all()
    assert ((negative == (z < 0)) | (size <= doubt) | ~counts[..., None]).all()


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
    _, n = unit_variance(w)
    bound = row_error(w, codec.bits)
    assert (
        bound <= (worst_row_error(codec.bits, codec.head_dim) + 2.0**-10) * n[..., 0] + 2.0**-18
    ).all()
    bound = bound.reshape(decoded.shape[:3])
    error = np.linalg.norm((decoded - np.where(broken[..., None], decoded, x)) / factor, axis=-1)
    float32 = np.linalg.norm(doubt / factor, axis=-1) + FLOAT32_DOUBT * n.reshape(decoded.shape[:3])
    assert (error <= bound + float32)[~broken].all()
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.nanmax(np.where(broken | (bound == 0), 0, error / bound), initial=0.0))


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
