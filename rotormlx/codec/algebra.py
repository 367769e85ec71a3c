"""The geometric algebra Cl(3,0): products, rotors and the rotations that rotors define.

A multivector is an array whose last axis holds 8 coefficients in the order
``1, e1, e2, e3, e12, e13, e23, e123``, with e1² = e2² = e3² = +1. All arrays are float64 numpy;
backends use only the resulting matrices and coefficients.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BLADES = ("1", "e1", "e2", "e3", "e12", "e13", "e23", "e123")
GRADES = (0, 1, 1, 1, 2, 2, 2, 3)
VECTOR = slice(1, 4)
EVEN = (0, 4, 5, 6)

# Row a, column b: the blade of BLADES[a] BLADES[b] and its sign. The tables are written out, and a
# test compares them with tables computed from anticommutation.
_BLADE = np.array(
    [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 4, 5, 2, 3, 7, 6],
        [2, 4, 0, 6, 1, 7, 3, 5],
        [3, 5, 6, 0, 7, 1, 2, 4],
        [4, 2, 1, 7, 0, 6, 5, 3],
        [5, 3, 7, 1, 6, 0, 4, 2],
        [6, 7, 3, 2, 5, 4, 0, 1],
        [7, 6, 5, 4, 3, 2, 1, 0],
    ]
)
_SIGN = np.array(
    [
        [+1, +1, +1, +1, +1, +1, +1, +1],
        [+1, +1, +1, +1, +1, +1, +1, +1],
        [+1, -1, +1, +1, -1, -1, +1, -1],
        [+1, -1, -1, +1, +1, -1, -1, +1],
        [+1, -1, +1, +1, -1, -1, +1, -1],
        [+1, -1, -1, +1, +1, -1, -1, +1],
        [+1, +1, -1, +1, -1, +1, -1, -1],
        [+1, +1, -1, +1, -1, +1, -1, -1],
    ]
)
_REVERSE = np.array([+1, +1, +1, +1, -1, -1, -1, -1])

# _PRODUCT[a, b, c]: the coefficient of blade c in the product of blades a and b.
_PRODUCT = np.zeros((8, 8, 8))
np.put_along_axis(_PRODUCT, _BLADE[..., None], _SIGN[..., None].astype(np.float64), axis=2)


def geometric_product(a: npt.ArrayLike, b: npt.ArrayLike) -> Array:
    """Return the geometric product of multivectors ``[..., 8]``; leading axes broadcast."""
    return np.einsum("...a,...b,abc->...c", _multivector(a), _multivector(b), _PRODUCT)


def reverse(a: npt.ArrayLike) -> Array:
    """Return the reverse of multivectors ``[..., 8]``: bivectors and trivectors change sign."""
    return _multivector(a) * _REVERSE


def vector(v: npt.ArrayLike) -> Array:
    """Embed vectors ``[..., 3]`` as multivectors ``[..., 8]`` of grade 1."""
    v = np.asarray(v, np.float64)
    out = np.zeros((*v.shape[:-1], 8))
    out[..., VECTOR] = v
    return out


def rotor(coefficients: npt.ArrayLike) -> Array:
    """Return rotors ``a + b e12 + c e13 + d e23`` from unit 4-vectors ``[..., 4]``.

    Raises:
        ValueError: If a 4-vector is not of norm 1.
    """
    q = np.asarray(coefficients, np.float64)
    norm = np.linalg.norm(q, axis=-1)
    if q.shape[-1:] != (4,) or not np.allclose(norm, 1, atol=1e-12):
        raise ValueError(
            f"[rotor] A rotor needs unit vectors of shape [..., 4], but shape {q.shape} with norms "
            f"from {np.min(norm)} to {np.max(norm)} was given; divide by the norm."
        )
    out = np.zeros((*q.shape[:-1], 8))
    out[..., EVEN] = q
    return out


def rotor_from_plane(plane: npt.ArrayLike, angle: float) -> Array:
    """Return the rotor that rotates by ``angle`` radians in a plane.

    Args:
        plane: Bivector coefficients of ``e12, e13, e23``, not all zero. ``e12`` rotates e1 towards
            e2.
        angle: Angle in radians.

    Returns:
        ``R = cos(angle/2) - sin(angle/2) B`` with B the unit bivector, so that ``R v R~`` is the
        vector v rotated by ``angle``.

    Raises:
        ValueError: If the plane is not three numbers, or is zero.
    """
    b = np.asarray(plane, np.float64)
    norm = np.linalg.norm(b)
    if b.shape != (3,) or norm == 0:
        raise ValueError(
            f"[rotor_from_plane] A plane needs three coefficients (e12, e13, e23), not all zero, "
            f"but {plane!r} was given."
        )
    return rotor(np.concatenate([[np.cos(angle / 2)], -np.sin(angle / 2) * b / norm]))


def sandwich(r: npt.ArrayLike, v: npt.ArrayLike) -> Array:
    """Return the sandwich product ``R v R~`` of multivectors ``[..., 8]``.

    It keeps grades and norms.
    """
    return geometric_product(geometric_product(r, v), reverse(r))


def sandwich_matrix(r: npt.ArrayLike) -> Array:
    """Return the rotation ``v -> R v R~`` of rotors ``[..., 8]``, as matrices ``[..., 3, 3]``."""
    r = _multivector(r)
    columns = sandwich(r[..., None, :], vector(np.eye(3)))[..., VECTOR]
    return np.swapaxes(columns, -1, -2)


def left_matrix(r: npt.ArrayLike) -> Array:
    """Return the 4x4 matrix of the one-sided product ``x -> R x`` on even multivectors.

    An even multivector ``a + b e12 + c e13 + d e23`` has four coefficients. Multiplying it by a
    rotor from one side is a rotation of these four coefficients (an isoclinic rotation).

    Returns:
        ``[..., 4, 4]`` for rotors ``[..., 8]``.
    """
    r = _multivector(r)
    even = np.eye(8)[list(EVEN)]
    columns = geometric_product(r[..., None, :], even)[..., EVEN]
    return np.swapaxes(columns, -1, -2)


def _multivector(a: npt.ArrayLike) -> Array:
    a = np.asarray(a, np.float64)
    if a.shape[-1:] != (8,):
        raise ValueError(
            f"[algebra] A multivector needs 8 coefficients on its last axis, "
            f"but shape {a.shape} was given."
        )
    return a
