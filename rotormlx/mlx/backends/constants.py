"""Arrays that calls and layers share, made once so that a call needs no operation for them.

An array made on the host must be copied to the GPU, or bound, while a kernel waits for it.
"""

from __future__ import annotations

from functools import cache, lru_cache

import mlx.core as mx
import numpy as np

from rotormlx.codec.derived import derived
from rotormlx.codec.rotation import Rotation
from rotormlx.kernels import source
from rotormlx.mlx.cache.view import KVView

# MLX binds shorter arrays to another Metal address space, for which it compiles a kernel again.
LEAST = 8


@lru_cache(maxsize=1024)
def numbers(values: tuple[int, ...] | tuple[float, ...], dtype: mx.Dtype) -> mx.array:
    """Return these numbers as an array, padded with zeros to at least 8."""
    return mx.array((*values, *(0,) * (LEAST - len(values))), dtype)


def lengths(view: KVView) -> mx.array:
    """Return the numbers of packed and of all tokens of each batch row, interleaved, int32."""
    return numbers(tuple(number for row in view.lengths for number in row), mx.int32)


@cache
def nothing(dtype: mx.Dtype, ndim: int = 1) -> mx.array:
    """Return a placeholder array ``[..., 8]`` that no thread reads."""
    return mx.array(np.zeros((1,) * (ndim - 1) + (LEAST,), np.float32), dtype)


def or_nothing(array: mx.array | None, dtype: mx.Dtype, ndim: int = 1) -> mx.array:
    """Return the array, or a placeholder if it is None."""
    return nothing(dtype, ndim) if array is None else array


@derived
def coefficients(rotation: Rotation, *, back: bool = False) -> mx.array:
    """Return the array of :func:`source.coefficients`."""
    return mx.array(source.coefficients(rotation, back=back))


@derived
def query_matrix(rotation: Rotation) -> mx.array:
    """Return the matrix that rotates queries, float32 ``[D, D]`` or ``[K, D, D]``."""
    return mx.array(rotation.inverse.astype(np.float32))
