"""Cascades whose rotors are learned: the matrices that their coefficients stand for.

:mod:`rotormlx.mlx.learned` finds the coefficients. What every host makes of them is computed here,
in float64 and in a fixed order, so that all of them code with the same matrices.

Source: docs/FORMAT.md, section 11.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rotormlx.codec.random_stream import Floats
from rotormlx.codec.rotation import Stage, factors, rotation

# By radix the kind of a block and its coefficients: a rotor has 4, a plane its angle. Fives and
# sevens are left as they are.
_BLOCKS = {4: ("Left", 4), 3: ("Sandwich", 4), 2: ("Plane", 1)}


def learned_stages(head_dim: int) -> list[tuple[int, int, int]]:
    """Radix, stride and coefficients of a block of every stage that is learned."""
    stages, stride = [], 1
    for radix in factors(head_dim) or ():
        if radix in _BLOCKS:
            stages.append((radix, stride, _BLOCKS[radix][1]))
        stride *= radix
    return stages


def learned_size(head_dim: int) -> int:
    """Coefficients of a head: 448 at head_dim 128."""
    return sum(head_dim // radix * n for radix, _, n in learned_stages(head_dim))


def learned_matrix(
    coefficients: NDArray[np.float32], scale: NDArray[np.float32], layer: int, role: str
) -> Floats:
    """The whole map: learned rotors, division by the scale, then the cascade that mixes.

    Args:
        coefficients: ``[K, n]``.
        scale: ``[K, D]``, positive.
        layer: Selects the cascade, of seed 0, with ``role``.
        role: ``"key"`` or ``"value"``.

    Returns:
        ``[K, D, D]``.

    Source: docs/FORMAT.md, section 11.
    """
    head_dim = scale.shape[-1]
    mix = rotation("cascade", head_dim, layer=layer, role=role).stages
    matrices = []
    for own, divisors in zip(coefficients, scale, strict=True):
        # Row i is what becomes of channel i.
        rows = basis(own, head_dim).T / divisors.astype(np.float64)
        for stage in mix:
            rows = stage.apply(rows)
        matrices.append(rows.T)
    return np.stack(matrices)


def basis(coefficients: NDArray[np.float32], head_dim: int) -> Floats:
    """The orthogonal matrix ``[D, D]`` of the coefficients ``[n]`` of a head."""
    rows, place = np.eye(head_dim), 0
    for radix, stride, n in learned_stages(head_dim):
        groups = head_dim // radix
        own = coefficients[place : place + groups * n].reshape(groups, n).astype(np.float64)
        place += groups * n
        if n == 1:
            own = np.concatenate([np.cos(own), np.sin(own)], axis=1)
        else:
            with np.errstate(invalid="ignore", divide="ignore"):  # a rotor of zeros: no matrix
                own = own / np.linalg.norm(own, axis=1, keepdims=True)
        shape = (groups // stride, stride, -1)
        rows = Stage(0, stride, _BLOCKS[radix][0], own.reshape(shape)).apply(rows)
    return rows.T
