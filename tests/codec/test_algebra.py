"""Cl(3,0) against an implementation that shares nothing with it: blades as bit masks."""

import numpy as np
import pytest

from rotormlx.codec import algebra

RNG = np.random.default_rng(0)
# float64 products of unit-size numbers: a few hundred roundings of 1e-16.
TOLERANCE = 1e-13


def bitmask_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The geometric product from anticommutation alone: bit i of a mask stands for e(i+1)."""
    masks = [0b000, 0b001, 0b010, 0b100, 0b011, 0b101, 0b110, 0b111]
    out = np.zeros(8)
    for i, p in enumerate(masks):
        for j, q in enumerate(masks):
            swaps = sum(bin(p >> (k + 1)).count("1") for k in range(3) if q >> k & 1)
            out[masks.index(p ^ q)] += (-1) ** swaps * a[i] * b[j]
    return out


def random_rotors(n: int) -> np.ndarray:
    q = RNG.normal(size=(n, 4))
    return algebra.rotor(q / np.linalg.norm(q, axis=1, keepdims=True))


def test_product_equals_bitmask():
    for a in np.eye(8):
        for b in np.eye(8):
            assert np.array_equal(algebra.geometric_product(a, b), bitmask_product(a, b))


def test_product_associative():
    a, b, c = RNG.normal(size=(3, 50, 8))
    product = algebra.geometric_product
    assert np.allclose(product(product(a, b), c), product(a, product(b, c)), atol=TOLERANCE)


def test_reverse_reverses_products():
    a, b = RNG.normal(size=(2, 50, 8))
    product, reverse = algebra.geometric_product, algebra.reverse
    assert np.allclose(reverse(product(a, b)), product(reverse(b), reverse(a)), atol=TOLERANCE)


def test_rotor_times_reverse_is_one():
    r = random_rotors(50)
    one = algebra.geometric_product(r, algebra.reverse(r))
    assert np.allclose(one, np.eye(8)[0], atol=TOLERANCE)


@pytest.mark.parametrize("grade", [0, 1, 2, 3])
def test_sandwich_keeps_grade_and_norm(grade):
    blades = np.array(algebra.GRADES) == grade
    x = np.where(blades, RNG.normal(size=(50, 8)), 0)
    y = algebra.sandwich(random_rotors(50), x)
    assert np.allclose(y[:, ~blades], 0, atol=TOLERANCE)
    assert np.allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), atol=TOLERANCE)
    if grade in (1, 2):
        assert not np.allclose(y, x, atol=0.1), "these rotors turn vectors and planes"


@pytest.mark.parametrize("matrix_of", [algebra.sandwich_matrix, algebra.left_matrix])
def test_matrix_is_a_rotation(matrix_of):
    m = matrix_of(random_rotors(50))
    assert np.allclose(m @ np.swapaxes(m, 1, 2), np.eye(m.shape[-1]), atol=TOLERANCE)
    assert np.allclose(np.linalg.det(m), 1, atol=TOLERANCE)


def test_sandwich_matrix_is_the_sandwich():
    r, v = random_rotors(50), RNG.normal(size=(50, 3))
    expected = algebra.sandwich(r, algebra.vector(v))[:, algebra.VECTOR]
    assert np.allclose(np.einsum("nij,nj->ni", algebra.sandwich_matrix(r), v), expected)


def test_left_matrix_is_the_one_sided_product():
    r, x = random_rotors(50), np.zeros((50, 8))
    x[:, algebra.EVEN] = RNG.normal(size=(50, 4))
    expected = algebra.geometric_product(r, x)[:, algebra.EVEN]
    left = algebra.left_matrix(r)
    assert np.allclose(np.einsum("nij,nj->ni", left, x[:, algebra.EVEN]), expected)


@pytest.mark.parametrize(
    ("plane", "start", "end"),
    [((1, 0, 0), 0, 1), ((0, 1, 0), 0, 2), ((0, 0, 2.5), 1, 2)],
    ids=["e12", "e13", "e23"],
)
def test_rotor_from_plane_turns_by_the_angle(plane, start, end):
    angle = 0.7
    turned = algebra.sandwich_matrix(algebra.rotor_from_plane(plane, angle)) @ np.eye(3)[start]
    expected = np.cos(angle) * np.eye(3)[start] + np.sin(angle) * np.eye(3)[end]
    assert np.allclose(turned, expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: algebra.rotor([1.0, 1.0, 0.0, 0.0]),
        lambda: algebra.rotor_from_plane((0, 0, 0), 1.0),
        lambda: algebra.geometric_product(np.zeros(4), np.zeros(8)),
    ],
    ids=["not-unit", "no-plane", "not-8"],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"^\[(rotor|rotor_from_plane|algebra)\] A .* needs"):
        call()
