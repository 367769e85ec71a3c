"""The packed format, version 2: the layout of a block.

A block is 64 tokens. A uint32 word packs along the axis that attention sums over, and neighbouring
words walk the other axis, so that neighbouring lanes read neighbouring words and no sum crosses
lanes:

    key words     [rows, 64]   a word holds several channels of one token     (lane = token)
    value words   [rows, D]    a word holds several tokens of one channel     (lane = channel)
    scales        [64]         float16, one per token
    centres       [D]          float16, keys only: the mean of the block

A code of 2, 4 or 8 bits is one field of a word, lowest bits first. A code of 3 bits is split over
two planes: first its two low bits, laid out like that, then its high bits, 32 to a word in an order
of their own. A plane that does not fill its last word ends in zeros. Codes of 2 and 3 bits are
trellis codes (:mod:`rotormlx.codec.trellis`).

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
# Code widths that are trellis codes.
TRELLIS_BITS = (2, 3)
LARGEST_FLOAT16 = 65504.0


class Plane(NamedTuple):
    """The bits ``shift`` to ``shift + bits - 1`` of every code, packed together."""

    bits: int
    shift: int

    @property
    def a_word(self) -> int:
        """Fields in one word."""
        return WORD_BITS // self.bits

    def bit_of(self, field: int) -> int:
        """The lowest bit of a field in its word.

        The fields of the plane of single bits belong to two words of the plane before it. Four
        neighbouring bits are those of codes 2 j and 2 j + 1 of the first, then of the second.
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
    """Rows of words in each plane of a block."""
    packed_axis_size = head_dim if role == KEY else BLOCK
    return tuple(math.ceil(packed_axis_size / plane.a_word) for plane in PLANES[bits])


def words_shape(role: str, bits: int, head_dim: int) -> tuple[int, int]:
    """Shape of the words of one block."""
    return sum(plane_rows(role, bits, head_dim)), BLOCK if role == KEY else head_dim


class Packed(NamedTuple):
    """Compressed keys or values: whole blocks of 64 tokens, numpy or MLX arrays.

    words: uint32 ``[B, K, N, rows, 64]`` for keys, ``[B, K, N, rows, D]`` for values.
    scales: float16 ``[B, K, N, 64]``.
    centres: float16 ``[B, K, N, D]`` for keys, None for values.
    """

    words: Any
    scales: Any
    centres: Any


@dataclass(frozen=True)
class Codec:
    """How the keys or the values of one layer are coded.

    Args:
        role: ``"key"`` or ``"value"``.
        bits: Bits per code.
        rotation: The rotation of this layer and role; fixes head_dim.
    """

    role: str
    bits: int
    rotation: Rotation

    @property
    def head_dim(self) -> int:
        """D."""
        return self.rotation.head_dim

    @property
    def has_trellis(self) -> bool:
        """Whether codes are those of a trellis, along the packed axis."""
        return self.bits in TRELLIS_BITS

    @property
    def has_state(self) -> bool:
        """Whether a path runs over tokens, so that it goes on where a block is filled up."""
        return self.has_trellis and self.role == VALUE

    @property
    def shrink(self) -> float:
        """The factor of scales: below 1 for values."""
        return 1.0 if self.role == KEY else codebook.VALUE_SHRINK[self.bits]

    @property
    def planes(self) -> tuple[Plane, ...]:
        """How a code is split over words."""
        return PLANES[self.bits]

    @property
    def packed_axis_size(self) -> int:
        """Codes along the axis that a word packs: D for keys, 64 for values."""
        return self.head_dim if self.role == KEY else BLOCK

    @property
    def plane_rows(self) -> tuple[int, ...]:
        """Rows of words in each plane."""
        return plane_rows(self.role, self.bits, self.head_dim)

    @property
    def words_shape(self) -> tuple[int, int]:
        """Shape of the words of one block."""
        return words_shape(self.role, self.bits, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one packed block of one KV head."""
        words = 4 * math.prod(self.words_shape)
        return words + 2 * BLOCK + (2 * self.head_dim if self.role == KEY else 0)

    @property
    def bits_per_value(self) -> float:
        """True bits per value: words, scales and centres."""
        return 8 * self.block_bytes / (BLOCK * self.head_dim)

    def kept_bits(self, tokens: int) -> npt.NDArray[np.uint32]:
        """Mask the bits of a block's words that belong to its first ``tokens`` tokens.

        Returns:
            Masks, uint32, that broadcast against ``[rows, 64]`` (keys) or ``[rows, D]`` (values).
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
    """The codec of one layer's keys or values.

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
