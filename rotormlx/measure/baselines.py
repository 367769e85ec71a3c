"""Simulations of published codecs, for comparison.

A simulated cache holds the vectors that the published codec would decode. It has the same rule of
sink, blocks and window as rotormlx, so that only the codec differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import create_attention_mask
from numpy.typing import NDArray

from rotormlx.codec import codebook
from rotormlx.codec.format import BLOCK, KEY, VALUE
from rotormlx.codec.rotation import rotation

Array = NDArray[np.float32]

GROUP = 64  # values that share a scale and an offset in the affine codecs
FLOAT16_BITS = 16


class Simulation(Protocol):
    """The interface of a simulated codec: its decoded vectors and its size."""

    @property
    def block(self) -> int:
        """Tokens that are coded together."""

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """Return the decoded vectors of whole blocks ``[B, K, N * block, D]``."""

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """Return the bits per value, scales and offsets included."""


@dataclass(frozen=True)
class Kivi:
    """KIVI: minimum and step per channel of 64 tokens (keys), or per group of a token (values).

    Args:
        key_bits: Bits of a key code.
        value_bits: Bits of a value code.

    Source: Liu et al., KIVI, ICML 2024; float16 minimum and step.
    """

    key_bits: int
    value_bits: int

    block = BLOCK

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """See :class:`Simulation`."""
        batch, heads, _, head_dim = x.shape
        if role == KEY:
            blocks = x.reshape(batch, heads, -1, BLOCK, head_dim)
            return _affine(blocks, self.key_bits, axis=-2).reshape(x.shape)
        groups = x.reshape(*x.shape[:-1], -1, group_size(head_dim))
        return _affine(groups, self.value_bits, axis=-1).reshape(x.shape)

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """See :class:`Simulation`."""
        if role == KEY:
            return self.key_bits + 2 * FLOAT16_BITS / BLOCK
        return self.value_bits + 2 * FLOAT16_BITS / group_size(head_dim)


@dataclass(frozen=True)
class Affine:
    """mlx-lm's quantization: minimum and step per group of channels of a token.

    Args:
        key_bits: Bits of a key code.
        value_bits: Bits of a value code.
    """

    key_bits: int
    value_bits: int

    block = BLOCK

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """See :class:`Simulation`."""
        bits, size = self._bits(role), self._group_size(x.shape[-1])
        packed = mx.quantize(mx.array(x).astype(mx.float16), group_size=size, bits=bits)
        return np.array(mx.dequantize(*packed, group_size=size, bits=bits).astype(mx.float32))

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """See :class:`Simulation`."""
        return self._bits(role) + 2 * FLOAT16_BITS / self._group_size(head_dim)

    def _group_size(self, head_dim: int) -> int:
        # mx.quantize supports groups of 32, 64 and 128.
        return GROUP if head_dim % GROUP == 0 else 32

    def _bits(self, role: str) -> int:
        return self.key_bits if role == KEY else self.value_bits


@dataclass(frozen=True)
class Turbo:
    """TurboQuant, and RotorQuant as published: norm, rotation, Lloyd-Max codebook, no centre.

    Args:
        key_bits: Bits of a key code, the sketch included.
        value_bits: Bits of a value code.
        rotation: Name of the rotation: ``dense`` is TurboQuant, ``rotor3`` RotorQuant.
        qjl: Whether the last bit of a key is the sign of a random projection of the other bits'
            residual (the published correction, which makes inner products unbiased).
        centred: Whether keys are centred by block, as in rotormlx.
        seed: Seed of the rotation and the projection.

    Source: Zandieh et al., TurboQuant, 2025, algorithms 1 and 2.
    """

    key_bits: int
    value_bits: int
    rotation: str = "dense"
    qjl: bool = False
    centred: bool = False
    seed: int = 0

    block = BLOCK

    def decoded(self, x: Array, *, layer: int, role: str) -> Array:
        """See :class:`Simulation`."""
        centre = np.float32(0)
        blocks = x.reshape(*x.shape[:2], -1, BLOCK, x.shape[-1])
        if self.centred and role == KEY:
            centre = blocks.mean(-2, keepdims=True).astype(np.float16).astype(np.float32)
        matrix = _matrix(self.rotation, x.shape[-1], self.seed, layer, role)
        coded = self._unit(blocks - centre, matrix, layer, role)
        return (coded + centre).reshape(x.shape).astype(np.float32)

    def bits_per_value(self, head_dim: int, role: str) -> float:
        """See :class:`Simulation`."""
        if role == VALUE:
            return self.value_bits + FLOAT16_BITS / head_dim
        norms = 2 if self.qjl else 1  # of the vector and of the residual
        centre = FLOAT16_BITS / BLOCK if self.centred else 0
        return self.key_bits + norms * FLOAT16_BITS / head_dim + centre

    def _unit(self, x: Array, matrix: Array, layer: int, role: str) -> Array:
        norm = np.linalg.norm(x, axis=-1, keepdims=True)
        unit: Any = x / np.where(norm == 0, 1, norm)
        sketched = self.qjl and role == KEY
        bits = self.key_bits - sketched if role == KEY else self.value_bits
        root = np.float32(np.sqrt(x.shape[-1]))
        level = nearest_level(unit @ matrix.T * root, bits)
        coded: Any = level @ matrix / root
        if sketched:
            residual = unit - coded
            size = np.linalg.norm(residual, axis=-1, keepdims=True)
            coded = coded + as_float16(size) * sketch(residual, self.seed, layer)
        out: Array = as_float16(norm) * coded
        return out


class SimulatedCache:
    """A cache that returns what a simulated codec decodes, with rotormlx's sink and window.

    Args:
        codec: The codec.
        layer: Index of the layer, which determines its rotations.
        sink: Number of first tokens that stay exact.
        window: Minimum number of latest tokens that stay exact.
    """

    def __init__(self, codec: Simulation, layer: int, *, sink: int = 4, window: int = 64) -> None:
        self.codec, self.layer, self.sink, self.window = codec, layer, sink, window
        self.offset = 0
        self.packed_tokens = 0
        self._arrays: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append tokens ``[B, K, S, D]``; return all keys and values, the new ones still exact."""
        if self._arrays is not None:
            held = zip(self._arrays, (keys, values), strict=True)
            keys, values = (mx.concatenate(list(pair), axis=2) for pair in held)
        self._arrays = keys, values
        self.offset = keys.shape[2]
        start = self.sink + self.packed_tokens
        block = self.codec.block
        count = max(0, self.offset - start - self.window) // block * block
        if count:
            self._arrays = (
                self._coded(keys, KEY, start, count),
                self._coded(values, VALUE, start, count),
            )
            self.packed_tokens += count
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return all keys and values; coded tokens are as the codec decodes them."""
        if self._arrays is None:
            raise ValueError("[SimulatedCache] The cache is empty; append keys and values first.")
        return self._arrays

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Return the attention mask for N new tokens, as mlx-lm's growing cache makes it."""
        return create_attention_mask(N, self.offset, return_array, window_size)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays, for ``mx.eval``."""
        return self._arrays or ()

    @property
    def bits_per_value(self) -> float:
        """Bits per value of the coded part, keys and values together."""
        keys, values = self.keys_and_values()
        dims = {KEY: keys.shape[-1], VALUE: values.shape[-1]}
        bits = sum(d * self.codec.bits_per_value(d, role) for role, d in dims.items())
        return bits / sum(dims.values())

    @property
    def nbytes(self) -> int:
        """Bytes that the published codec would take, exact tokens included."""
        keys, values = self.keys_and_values()
        width = keys.shape[0] * keys.shape[1] * (keys.shape[-1] + values.shape[-1])
        exact = (self.offset - self.packed_tokens) * keys.itemsize
        return round(width * (exact + self.packed_tokens * self.bits_per_value / 8))

    def _coded(self, x: mx.array, role: str, start: int, count: int) -> mx.array:
        part = np.array(x[:, :, start : start + count].astype(mx.float32))
        coded = mx.array(self.codec.decoded(part, layer=self.layer, role=role)).astype(x.dtype)
        return mx.concatenate([x[:, :, :start], coded, x[:, :, start + count :]], axis=2)


# ---- codecs -------------------------------------------------------------------------------------


def group_size(head_dim: int) -> int:
    """Return the largest divisor of head_dim up to 64."""
    return next(size for size in range(GROUP, 0, -1) if head_dim % size == 0)


def nearest_level(z: Array, bits: int) -> Array:
    """Return the nearest levels of the Lloyd-Max codebook for 1 to 4 or 8 bits, shaped like z."""
    if bits == 1:
        magnitude = np.full(z.shape, np.sqrt(2 / np.pi), np.float32)
    else:
        index = np.searchsorted(codebook.boundaries(bits), np.abs(z), side="right")
        magnitude = codebook.magnitudes(bits)[index]
    return np.where(z < 0, -magnitude, magnitude)


def sketch(residual: Array, seed: int, layer: int) -> Array:
    """Return estimates of the residuals' directions from the signs of a random projection.

    With S a normal D x D matrix, <q, sqrt(pi/2) / D S^T sign(S r)> is <q, r> / |r| on average
    over S: an unbiased estimate from one bit per channel.
    """
    projection = _projection(residual.shape[-1], seed, layer)
    signs = np.where(residual @ projection.T < 0, np.float32(-1), np.float32(1))
    return np.float32(np.sqrt(np.pi / 2) / residual.shape[-1]) * (signs @ projection)


def _affine(x: Array, bits: int, *, axis: int) -> Array:
    low = as_float16(x.min(axis, keepdims=True))
    step = as_float16((x.max(axis, keepdims=True) - low) / (2**bits - 1))
    codes = np.round((x - low) / np.where(step == 0, 1, step)).clip(0, 2**bits - 1)
    return codes * step + low


def require_multiple(family: str, head_dim: int, of: int) -> None:
    """Refuse a head_dim that is not a multiple of ``of``."""
    if head_dim % of:
        raise ValueError(
            f"[scheme] {family} needs a head_dim that is a multiple of {of}, but this model's is "
            f"{head_dim}; leave {family} out."
        )


def as_float16(x: Array) -> Array:
    """Round float32 numbers to float16."""
    return x.astype(np.float16).astype(np.float32)


@cache
def _matrix(name: str, head_dim: int, seed: int, layer: int, role: str) -> Array:
    chosen = rotation(name, head_dim, seed=seed, layer=layer, role=role)
    return chosen.matrix.astype(np.float32)


@cache
def _projection(head_dim: int, seed: int, layer: int) -> Array:
    rng = np.random.default_rng([seed, layer, head_dim])
    return rng.normal(size=(head_dim, head_dim)).astype(np.float32)
