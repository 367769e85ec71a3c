"""Lloyd-Max codebooks of the standard normal distribution.

A codebook is symmetric, so only its magnitudes are stored: ``2**(bits - 1)`` positive numbers,
ascending. They are part of the packed format, bit for bit (docs/FORMAT.md, section 5); the tests
derive them independently.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rotormlx.config import BITS  # noqa: F401 - one codebook for each of them

# Bit patterns of float32 numbers.
_MAGNITUDES = {
    2: (
        0x3EE7D2C9,
        0x3FC1555D,
    ),
    3: (
        0x3E7AF9F8,
        0x3F418990,
        0x3FAC0538,
        0x4009B97A,
    ),
    4: (
        0x3E0379FD,
        0x3EC6AE44,
        0x3F28215E,
        0x3F713D39,
        0x3FA0CC2F,
        0x3FCF1C25,
        0x40046AC7,
        0x402EE2BF,
    ),
    8: (
        0x3C0A61E7,
        0x3CCF948A,
        0x3D2CFE97,
        0x3D723720,
        0x3D9BBAC9,
        0x3DBE5DCE,
        0x3DE10579,
        0x3E01D953,
        0x3E133316,
        0x3E249076,
        0x3E35F1E0,
        0x3E4757C5,
        0x3E58C294,
        0x3E6A32BF,
        0x3E7BA8B7,
        0x3E869278,
        0x3E8F53EF,
        0x3E9818FB,
        0x3EA0E1D8,
        0x3EA9AEC1,
        0x3EB27FF3,
        0x3EBB55AC,
        0x3EC4302A,
        0x3ECD0FAD,
        0x3ED5F474,
        0x3EDEDEC0,
        0x3EE7CED5,
        0x3EF0C4F5,
        0x3EF9C165,
        0x3F016235,
        0x3F05E726,
        0x3F0A6FA9,
        0x3F0EFBE4,
        0x3F138BFB,
        0x3F182016,
        0x3F1CB85C,
        0x3F2154F5,
        0x3F25F60A,
        0x3F2A9BC6,
        0x3F2F4652,
        0x3F33F5DC,
        0x3F38AA91,
        0x3F3D649F,
        0x3F422436,
        0x3F46E987,
        0x3F4BB4C4,
        0x3F508622,
        0x3F555DD5,
        0x3F5A3C15,
        0x3F5F211B,
        0x3F640D20,
        0x3F690061,
        0x3F6DFB1D,
        0x3F72FD94,
        0x3F780809,
        0x3F7D1ABF,
        0x3F811B00,
        0x3F83AD0A,
        0x3F8643A4,
        0x3F88DEF6,
        0x3F8B7F29,
        0x3F8E2468,
        0x3F90CEDF,
        0x3F937EBE,
        0x3F963435,
        0x3F98EF75,
        0x3F9BB0B3,
        0x3F9E7827,
        0x3FA1460A,
        0x3FA41A97,
        0x3FA6F60E,
        0x3FA9D8B0,
        0x3FACC2C3,
        0x3FAFB48E,
        0x3FB2AE5F,
        0x3FB5B084,
        0x3FB8BB52,
        0x3FBBCF22,
        0x3FBEEC53,
        0x3FC21346,
        0x3FC54464,
        0x3FC8801E,
        0x3FCBC6E7,
        0x3FCF193E,
        0x3FD277A7,
        0x3FD5E2AF,
        0x3FD95AEE,
        0x3FDCE104,
        0x3FE0759E,
        0x3FE41975,
        0x3FE7CD50,
        0x3FEB9202,
        0x3FEF6874,
        0x3FF3519C,
        0x3FF74E89,
        0x3FFB605E,
        0x3FFF8859,
        0x4001E3EA,
        0x40041024,
        0x400649AC,
        0x40089165,
        0x400AE84C,
        0x400D4F78,
        0x400FC821,
        0x401253A2,
        0x4014F37F,
        0x4017A972,
        0x401A776B,
        0x401D5FA3,
        0x402064A4,
        0x4023895F,
        0x4026D13F,
        0x402A404A,
        0x402DDB43,
        0x4031A7DD,
        0x4035AD07,
        0x4039F345,
        0x403E853D,
        0x40437082,
        0x4048C6C8,
        0x404E9FBF,
        0x40551C3D,
        0x405C6BAC,
        0x4064D66F,
        0x406ED39F,
        0x407B3DA6,
        0x4085F897,
        0x4093502A,
    ),
}


def magnitudes(bits: int) -> npt.NDArray[np.float32]:
    """Return the magnitudes of a codebook, float32 ``[2**(bits - 1)]``, ascending."""
    return np.array(_MAGNITUDES[bits], np.uint32).view(np.float32)


# The magnitudes of the trellis codes, in 64ths: trained on N(0, 1), and exact in float16.
_TRELLIS_64THS = {
    2: (12, 39, 69, 119),
    3: (7, 19, 34, 48, 65, 86, 114, 158),
}
# Their mean squared error on N(0, 1), measured on long sequences.
TRELLIS_ERRORS = {2: 0.0868, 3: 0.0237}

# By bits: half the variance that the codes of a key add to its score, for scales of 1 and a query
# of norm 1. It is d (1 - d) / 2, where d is the mean squared error on N(0, 1).
SCORE_NOISE = {2: 0.0396, 3: 0.0116, 4: 0.0047, 8: 0.00002}

# By bits: length of a decoded value relative to its unbiased length. It is 1 - d / 4, in 512ths.
VALUE_SHRINK = {2: 501 / 512, 3: 509 / 512, 4: 511 / 512, 8: 1.0}


def trellis_levels(bits: int) -> npt.NDArray[np.float32]:
    """Return the levels of a trellis code, float32 ``[2**(bits + 1)]``.

    The first half is ascending; the second half is the first, negated.
    """
    m = np.array(_TRELLIS_64THS[bits], np.float32) / 64
    return np.concatenate([m, -m])


def boundaries(bits: int) -> npt.NDArray[np.float32]:
    """Return the boundaries between magnitudes, float32 ``[2**(bits - 1) - 1]``, ascending.

    Each is the mean of two neighbouring magnitudes, rounded once to float32.
    """
    m = magnitudes(bits).astype(np.float64)
    return ((m[:-1] + m[1:]) / 2).astype(np.float32)


def levels(bits: int) -> npt.NDArray[np.float32]:
    """Return the level of every code, float32 ``[2**bits]``: the second half negates the first."""
    m = magnitudes(bits)
    return np.concatenate([m, -m])
