"""Rotor cascades with learned rotors, a change of basis with few numbers.

The cascade of :mod:`rotormlx.codec.rotation` has fixed rotors, which mix all channels equally. Here
rotors and angles are learned so that a channel scale after them is nearly as good as the best
matrix. At head_dim 128 they are 448 numbers per KV head instead of 16,384.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.optimizers
import numpy as np

from rotormlx.codec import algebra
from rotormlx.codec.learned_rotors import basis, learned_size, learned_stages
from rotormlx.codec.random_stream import Floats

STEPS = 300
RATE = 0.03


def fitted(moment: Floats, metric: Floats) -> tuple[Floats, Floats]:
    """Learn the rotors of every head.

    They minimize the error that remains with the best channel scales,
    ``sum_i sqrt((R K R^T)_ii (R Q R^T)_ii)``.

    Args:
        moment: K, the second moments of the coded vectors, ``[K, D, D]``.
        metric: Q, the second moments of the vectors they are multiplied by, ``[K, D, D]``.

    Returns:
        The coefficients ``[K, n]`` and the orthogonal matrices R, ``[K, D, D]``.
    """
    heads, head_dim, _ = moment.shape
    of_keys, of_queries = (_normalized(m) for m in (moment, metric))

    def loss(coefficients: mx.array) -> mx.array:
        rotation_matrix = _basis(coefficients, head_dim)
        seen = [((rotation_matrix @ m) * rotation_matrix).sum(-1) for m in (of_keys, of_queries)]
        return mx.log(mx.sqrt(seen[0] * seen[1]).sum(-1)).sum()

    gradient = mx.value_and_grad(loss)
    # Near the identity, but not at it, where some gradients vanish by symmetry.
    noise = np.random.default_rng(0).normal(0, 0.01, (heads, learned_size(head_dim)))
    coefficients = mx.array((noise + _identity(head_dim)).astype(np.float32))
    optimizer = mlx.optimizers.Adam(
        learning_rate=mlx.optimizers.cosine_decay(RATE, STEPS), bias_correction=True
    )
    best, kept = float("inf"), coefficients
    for _ in range(STEPS):
        value, slope = gradient(coefficients)
        if (now := float(np.array(value))) < best:
            best, kept = now, coefficients
        coefficients = optimizer.apply_gradients({"x": slope}, {"x": coefficients})["x"]
        mx.eval(coefficients)
    found = np.array(kept)
    return found.astype(np.float64), np.stack([basis(own, head_dim) for own in found])


def _identity(head_dim: int) -> Floats:
    """Return the coefficients of the identity."""
    parts = [
        np.tile([1.0, 0.0, 0.0, 0.0] if n == 4 else [0.0], head_dim // radix)
        for radix, _, n in learned_stages(head_dim)
    ]
    return np.concatenate(parts)


def _basis(coefficients: mx.array, head_dim: int) -> mx.array:
    """Return the orthogonal matrices, float32 ``[K, D, D]``, of coefficients ``[K, n]``."""
    heads, place = coefficients.shape[0], 0
    matrix = mx.broadcast_to(mx.eye(head_dim), (heads, head_dim, head_dim))
    for radix, stride, n in learned_stages(head_dim):
        groups = head_dim // radix
        own = coefficients[:, place : place + groups * n].reshape(heads, groups, n)
        place += groups * n
        blocks = _blocks(own, radix).reshape(heads, -1, stride, radix, radix)
        rows = matrix.reshape(heads, -1, radix, stride, head_dim).swapaxes(2, 3)
        matrix = (blocks @ rows).swapaxes(2, 3).reshape(heads, head_dim, head_dim)
    return matrix


def _blocks(coefficients: mx.array, radix: int) -> mx.array:
    """Return orthogonal blocks ``[K, groups, radix, radix]``."""
    if radix == 2:
        c, s = mx.cos(coefficients), mx.sin(coefficients)
        return mx.concatenate([c, -s, s, c], axis=-1).reshape(*c.shape[:2], 2, 2)
    unit = coefficients / mx.linalg.norm(coefficients, axis=-1, keepdims=True)
    if radix == 4:
        return (unit @ _left().reshape(4, 16)).reshape(*unit.shape[:2], 4, 4)
    pairs = (unit[..., :, None] * unit[..., None, :]).reshape(*unit.shape[:2], 16)
    return (pairs @ _sandwich().reshape(16, 9)).reshape(*unit.shape[:2], 3, 3)


@cache
def _left() -> mx.array:
    """Return the matrix of ``x -> R x`` for each coefficient of R, ``[4, 4, 4]``."""
    return mx.array(algebra.left_matrix(_even(np.eye(4))).astype(np.float32))


@cache
def _sandwich() -> mx.array:
    """Return the matrix of ``v -> R v R~`` for each pair of coefficients, ``[4, 4, 3, 3]``."""
    ones = np.eye(4)
    sums = algebra.sandwich_matrix(_even(ones[:, None] + ones[None]))
    single = algebra.sandwich_matrix(_even(ones))
    return mx.array(((sums - single[:, None] - single[None]) / 2).astype(np.float32))


def _even(coefficients: Floats) -> Floats:
    """Return even multivectors ``[..., 8]`` of coefficients ``[..., 4]``, of any norm."""
    out = np.zeros((*coefficients.shape[:-1], 8))
    out[..., algebra.EVEN] = coefficients
    return out


def _normalized(moment: Floats) -> mx.array:
    trace = np.trace(moment, axis1=-2, axis2=-1)[:, None, None]
    return mx.array((moment / trace).astype(np.float32))
