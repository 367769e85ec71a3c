"""Cascades whose rotors are learned: computes their matrices from the learned coefficients.

:mod:`rotormlx.mlx.learned` finds the coefficients. This module computes the matrices in float64 and
in a fixed order, so all hosts code with the same matrices.

Source: docs/FORMAT.md, section 11.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rotormlx.codec.random_stream import Floats
from rotormlx.codec.rotation import Stage, factors, rotation

# By radix: the kind of a block and the number of its coefficients (4 of a rotor, or the angle in a
# plane). Stages of radix 5 and 7 are not learned.
_BLOCKS = {4: ("Left", 4), 3: ("Sandwich", 4), 2: ("Plane", 1)}


def learned_stages(head_dim: int) -> list[tuple[int, int, int]]:
    """Return radix, stride and number of coefficients per block of every learned stage."""
    stages, stride = [], 1
    for radix in factors(head_dim) or ():
        if radix in _BLOCKS:
            stages.append((radix, stride, _BLOCKS[radix][1]))
        stride *= radix
    return stages


def learned_size(head_dim: int) -> int:
    """Return the number of coefficients per KV head: 448 at head_dim 128."""
    return sum(head_dim // radix * n for radix, _, n in learned_stages(head_dim))


def learned_matrix(
    coefficients: NDArray[np.float32], scale: NDArray[np.float32], layer: int, role: str
) -> Floats:
    """Return the whole map: learned rotors, division by the scale, then the cascade.

    Args:
        coefficients: Coefficients of the learned rotors, ``[K, n]``.
        scale: Channel scale ``[K, D]``, positive.
        layer: Index of the layer; selects the cascade of seed 0 together with ``role``.
        role: ``"key"`` or ``"value"``.

    Returns:
        Matrices ``[K, D, D]``.

    Source: docs/FORMAT.md, section 11.
    """
    head_dim = scale.shape[-1]
    mix = rotation("cascade", head_dim, layer=layer, role=role).stages
    matrices = []
    for own, divisors in zip(coefficients, scale, strict=True):
        # Row i is the image of channel i.
        rows = basis(own, head_dim).T / divisors.astype(np.float64)
        for stage in mix:
            rows = stage.apply(rows)
        matrices.append(rows.T)
    return np.stack(matrices)


def basis(coefficients: NDArray[np.float32], head_dim: int) -> Floats:
    """Return the orthogonal matrix ``[D, D]`` of the coefficients ``[n]`` of a KV head."""
    rows, place = np.eye(head_dim), 0
    for radix, stride, n in learned_stages(head_dim):
        groups = head_dim // radix
        own = coefficients[place : place + groups * n].reshape(groups, n).astype(np.float64)
        place += groups * n
        if n == 1:
            own = np.concatenate([np.cos(own), np.sin(own)], axis=1)
        else:
            # A rotor of zeros becomes NaN, which algebra.rotor refuses.
            with np.errstate(invalid="ignore", divide="ignore"):
                own = own / np.linalg.norm(own, axis=1, keepdims=True)
        shape = (groups // stride, stride, -1)
        rows = Stage(0, stride, _BLOCKS[radix][0], own.reshape(shape)).apply(rows)
    return rows.T
