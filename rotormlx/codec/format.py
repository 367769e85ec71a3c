"""The packed format, version 2: the layout of a block.

A block is 64 tokens. A uint32 word packs codes along the axis that attention sums over (the packed
axis). Neighbouring words run along the other axis (the lanes), so neighbouring lanes read
neighbouring words and no sum crosses lanes:

    key words     [rows, 64]   a word holds several channels of one token     (lane = token)
    value words   [rows, D]    a word holds several tokens of one channel     (lane = channel)
    scales        [64]         float16, one per token
    centres       [D]          float16, keys only: the mean of the block

A code of 2, 4 or 8 bits is one field of a word, lowest bits first. A code of 3 bits is split over
two planes. The first plane holds its two low bits in the same layout; the second holds the high
bits, 32 per word, in the order of :meth:`Plane.bit_of`. A plane that does not fill its last word
ends in zeros. Codes of 2 and 3 bits are trellis codes (:mod:`rotormlx.codec.trellis`).

Source: docs/FORMAT.md, which is normative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rotormlx.codec import codebook
from rotormlx.codec.rotation import KEY, ROLES, VALUE, Rotation, rotation
from rotormlx.config import RotorConfig

FORMAT_VERSION = 2
BLOCK = 64
WORD_BITS = 32
# Bits per code at which codes are trellis codes.
TRELLIS_BITS = (2, 3)
LARGEST_FLOAT16 = 65504.0


class Plane(NamedTuple):
    """The bits ``shift`` to ``shift + bits - 1`` of every code, packed together."""

    bits: int
    shift: int

    @property
    def a_word(self) -> int:
        """Number of fields per word."""
        return WORD_BITS // self.bits

    def bit_of(self, field: int) -> int:
        """Return the lowest bit of a field in its word.

        A word of the plane of single bits belongs to two words of the plane before it. Four
        neighbouring bits belong to codes 2 j and 2 j + 1 of the first word, then to the same codes
        of the second word.
        """
        if self.bits > 1:
            return field * self.bits
        word, code = divmod(field, 16)
        return code // 2 * 4 + word * 2 + code % 2


PLANES = {
    2: (Plane(2, 0),),
    3: (Plane(2, 0), Plane(1, 2)),
    4: (Plane(4, 0),),
    8: (Plane(8, 0),),
}


def plane_rows(role: str, bits: int, head_dim: int) -> tuple[int, ...]:
    """Return the number of rows of words in each plane of a block."""
    packed_axis_size = head_dim if role == KEY else BLOCK
    return tuple(math.ceil(packed_axis_size / plane.a_word) for plane in PLANES[bits])


def words_shape(role: str, bits: int, head_dim: int) -> tuple[int, int]:
    """Return the shape of the words of one block."""
    return sum(plane_rows(role, bits, head_dim)), BLOCK if role == KEY else head_dim


class Packed(NamedTuple):
    """Compressed keys or values: whole blocks of 64 tokens, as arrays of numpy, MLX or torch.

    words: uint32 ``[B, K, N, rows, 64]`` for keys, ``[B, K, N, rows, D]`` for values.
    scales: float16 ``[B, K, N, 64]``.
    centres: float16 ``[B, K, N, D]`` for keys, None for values.
    """

    words: Any
    scales: Any
    centres: Any


@dataclass(frozen=True)
class Codec:
    """The codec of one layer's keys or values.

    Args:
        role: ``"key"`` or ``"value"``.
        bits: Bits per code.
        rotation: The rotation of this layer and role; it determines head_dim.
    """

    role: str
    bits: int
    rotation: Rotation

    @property
    def head_dim(self) -> int:
        """Head dimension D."""
        return self.rotation.head_dim

    @property
    def has_trellis(self) -> bool:
        """Whether the codes are trellis codes along the packed axis."""
        return self.bits in TRELLIS_BITS

    @property
    def has_state(self) -> bool:
        """Whether a trellis path runs along tokens, so that filling a block up needs its state."""
        return self.has_trellis and self.role == VALUE

    @property
    def shrink(self) -> float:
        """The factor of the scales: 1 for keys, at most 1 for values."""
        return 1.0 if self.role == KEY else codebook.VALUE_SHRINK[self.bits]

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes that a code is split into."""
        return PLANES[self.bits]

    @property
    def packed_axis_size(self) -> int:
        """Number of codes along the packed axis: D for keys, 64 for values."""
        return self.head_dim if self.role == KEY else BLOCK

    @property
    def plane_rows(self) -> tuple[int, ...]:
        """Number of rows of words in each plane of a block."""
        return plane_rows(self.role, self.bits, self.head_dim)

    @property
    def words_shape(self) -> tuple[int, int]:
        """Shape of the words of one block."""
        return words_shape(self.role, self.bits, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one packed block of one KV head, side data included."""
        words = 4 * math.prod(self.words_shape)
        return words + 2 * BLOCK + (2 * self.head_dim if self.role == KEY else 0)

    @property
    def bits_per_value(self) -> float:
        """True bits per value; words, scales and centres are counted."""
        return 8 * self.block_bytes / (BLOCK * self.head_dim)

    def kept_bits(self, tokens: int) -> npt.NDArray[np.uint32]:
        """Return masks of the bits of a block's words that belong to its first ``tokens`` tokens.

        Returns:
            uint32 masks that broadcast to ``[rows, 64]`` (keys) or ``[rows, D]`` (values).
        """
        if self.role == KEY:
            lanes = np.arange(BLOCK) < tokens
            return np.where(lanes, np.uint32(0xFFFFFFFF), np.uint32(0))[None, :]
        masks = []
        for plane, rows in zip(self.planes, self.plane_rows, strict=True):
            ones = 2**plane.bits - 1
            for row in range(rows):
                count = min(max(tokens - row * plane.a_word, 0), plane.a_word)
                masks.append(sum(ones << plane.bit_of(field) for field in range(count)))
        return np.array(masks, np.uint32)[:, None]


@cache
def codec(config: RotorConfig, head_dim: int, *, layer: int, role: str) -> Codec:
    """Return the codec of one layer's keys or values.

    Raises:
        ValueError: If head_dim, layer or role is out of range.
    """
    chosen = rotation(config.rotation, head_dim, seed=config.seed, layer=layer, role=role)
    return Codec(role, config.code_bits(role), chosen)


__all__ = [
    "BLOCK",
    "FORMAT_VERSION",
    "KEY",
    "LARGEST_FLOAT16",
    "PLANES",
    "ROLES",
    "TRELLIS_BITS",
    "VALUE",
    "WORD_BITS",
    "Codec",
    "Packed",
    "Plane",
    "codec",
    "plane_rows",
    "words_shape",
]
