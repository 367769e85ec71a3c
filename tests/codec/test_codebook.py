"""The constants of the codebooks against their own derivation."""

from itertools import pairwise

import numpy as np
import pytest
from mpmath import erfc, erfinv, exp, inf, matrix, mp, mpf, pi, sqrt

from rotormlx.codec import codebook, trellis
from rotormlx.codec.format import TRELLIS_BITS
from rotormlx.codec.random_stream import Stream

# Distortion of the optimal quantizer of N(0, 1). Max (1960) gives 0.1175, 0.03454 and 0.009497;
# the last is 0.009501 when computed with 40 digits.
KNOWN_DISTORTION = {2: 0.117482, 3: 0.0345478, 4: 0.00950101, 8: 4.11851e-05}


def density(x):
    return exp(-x * x / 2) / sqrt(2 * pi)


def tail(x):
    return erfc(x / sqrt(2)) / 2


def centroids(sizes):
    """One Lloyd step in 40 digits: the mean of N(0, 1) in the cell of each magnitude."""
    limits = [mpf(0), *((a + b) / 2 for a, b in pairwise(sizes)), inf]
    cells = list(pairwise(limits))
    mass = [tail(a) - (0 if b == inf else tail(b)) for a, b in cells]
    moment = [density(a) - (0 if b == inf else density(b)) for a, b in cells]
    return [m / p for m, p in zip(moment, mass, strict=True)], mass


def lloyd_max(bits):
    """Magnitudes of the optimal quantizer of N(0, 1): each its centroid, by Newton's method."""
    n = 2 ** (bits - 1)
    # Cells of equal mass of a wider normal: close enough for every width.
    sizes = [sqrt(3) * sqrt(2) * erfinv(mpf(2 * i + 1) / (2 * n)) for i in range(n)]
    while True:
        centres, mass = centroids(sizes)
        limits = [mpf(0), *((a + b) / 2 for a, b in pairwise(sizes))]
        # Half the derivative of centroid i by its lower limit, and of centroid i - 1 by its upper.
        lower = [density(limits[i]) * (centres[i] - limits[i]) / mass[i] / 2 for i in range(n)]
        upper = [
            density(limits[i]) * (limits[i] - centres[i - 1]) / mass[i - 1] / 2 for i in range(n)
        ]
        jacobian = matrix(n, n)
        for i in range(n):
            jacobian[i, i] = 1 - (lower[i] if i else 0)
            if i:
                jacobian[i, i - 1] = -lower[i]
                jacobian[i - 1, i] = -upper[i]
                jacobian[i - 1, i - 1] -= upper[i]
        step = solve_tridiagonal(jacobian, [a - b for a, b in zip(sizes, centres, strict=True)])
        sizes = [a - b for a, b in zip(sizes, step, strict=True)]
        if max(abs(s) for s in step) < mpf(10) ** -20:
            return sizes


def solve_tridiagonal(a, rhs):
    n, rhs = len(rhs), list(rhs)
    for i in range(1, n):
        factor = a[i, i - 1] / a[i - 1, i - 1]
        a[i, i] -= factor * a[i - 1, i]
        rhs[i] -= factor * rhs[i - 1]
    for i in reversed(range(n)):
        rhs[i] = (rhs[i] - (a[i, i + 1] * rhs[i + 1] if i + 1 < n else 0)) / a[i, i]
    return rhs


@pytest.mark.parametrize("bits", codebook.BITS)
def test_magnitudes_are_lloyd_max(bits):
    with mp.workdps(40):
        derived = np.array([float(m) for m in lloyd_max(bits)], np.float32)
    assert np.array_equal(codebook.magnitudes(bits), derived)


@pytest.mark.parametrize("bits", codebook.BITS)
def test_distortion_is_the_known_one(bits):
    with mp.workdps(40):
        sizes = [mpf(float(m)) for m in codebook.magnitudes(bits)]
        _, mass = centroids(sizes)
        distortion = 1 - 2 * sum(p * m * m for p, m in zip(mass, sizes, strict=True))
    assert float(distortion) == pytest.approx(KNOWN_DISTORTION[bits], rel=1e-4)


@pytest.mark.parametrize("bits", codebook.BITS)
def test_levels_are_sign_and_magnitude(bits):
    sizes, levels = codebook.magnitudes(bits), codebook.levels(bits)
    half = 2 ** (bits - 1)
    assert sizes.dtype == levels.dtype == np.float32
    assert np.all(np.diff(sizes) > 0)
    assert sizes[0] > 0
    assert np.array_equal(levels[:half], sizes)
    assert np.array_equal(levels[half:], -sizes)


@pytest.mark.parametrize("bits", codebook.BITS)
def test_noise_and_shrink_follow_from_the_distortion(bits):
    d = codebook.TRELLIS_ERRORS.get(bits, KNOWN_DISTORTION[bits])
    digits = {2: 4, 3: 4, 4: 4, 8: 5}[bits]
    assert codebook.SCORE_NOISE[bits] == round(d * (1 - d) / 2, digits)
    assert codebook.VALUE_SHRINK[bits] == round(512 * (1 - d / 4)) / 512


@pytest.mark.parametrize("bits", codebook.BITS)
def test_boundaries_are_halfway(bits):
    sizes = codebook.magnitudes(bits).astype(np.float64)
    assert np.array_equal(
        codebook.boundaries(bits), ((sizes[1:] + sizes[:-1]) / 2).astype(np.float32)
    )


# ---- trellis codes ------------------------------------------------------------------------------


def normals(length, lanes):
    """Normal numbers of the project's own generator, ``[length, lanes]``, by the polar method."""
    points = Stream(1).disc(length * lanes // 2)
    square = (points * points).sum(1, keepdims=True)
    return (points * np.sqrt(-2 * np.log(square) / square)).reshape(length, lanes)


def coded(z, bits):
    """Index of the magnitude and sign (1 or -1) that the cheapest path gives each number."""
    index = trellis.level_codes(trellis.encode(z, bits), bits)
    return index % 2**bits, np.where(index >> bits, -1.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_trellis_levels_are_trained(bits, monkeypatch):
    """Lloyd's algorithm with paths: each magnitude the mean of what is coded by it, over and over.

    It starts at the Lloyd-Max levels of a code that is a bit wider.
    """
    z = normals(256, 1600)
    m = codebook.magnitudes(bits + 1).astype(np.float64)
    page = codebook.trellis_levels(bits)
    monkeypatch.setattr(codebook, "trellis_levels", lambda _: np.concatenate([m, -m]))
    step = np.ones(1)
    while np.abs(step).max() > 2e-4:
        index, sign = coded(z, bits)
        mean = np.bincount(index.ravel(), (sign * z).ravel()) / np.bincount(index.ravel())
        step = mean - m
        # Each step halves the error at best: twice the step is nearer.
        m = m + 1.9 * step
    # 400,000 numbers: the largest level is the mean of some thousand, whose error is 0.5 / 64.
    assert np.abs(m - page[: 2**bits]).max() < 1 / 64
    assert np.array_equal(page[2**bits :], -page[: 2**bits])


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_trellis_distortion_is_the_known_one(bits):
    z = normals(512, 200)
    index, sign = coded(z, bits)
    distortion = np.mean((z - sign * codebook.trellis_levels(bits)[index]) ** 2)
    # 100,000 numbers: one standard error is 0.4 %.
    assert distortion == pytest.approx(codebook.TRELLIS_ERRORS[bits], rel=0.015)
