"""Trellis codes, in which codes of b bits select from 2**(b + 1) levels.

The levels form four subsets of every fourth level. A convolutional code with eight states runs
along the packed axis: the path bits p of a position and of the three positions before it select the
subset, and the other bits of the code select the level in the subset. The encoder finds the path
with the least squared error (Viterbi). The error of trellis codes of 2 and 3 bits is 1.3 and 1.6 dB
below that of the best codebook of the same bits.

The bits of a stored code:

    bit 0    p, the path bit
    bit 1    s, the sign of the level
    bit 2    h, the high bit of the magnitude (3 bits only)

With c = p[i-2] + 2 (p[i] ^ p[i-1] ^ p[i-3]), p = 0 before the first position, the index of the
magnitude is (c ^ 3 s) + 4 h: negation maps subset c to subset 3 - c.

Source: docs/FORMAT.md, section 5; G. Ungerboeck, Channel coding with multilevel/phase signals, 1982
(the code); M. Marcellin and T. Fischer, Trellis coded quantization of memoryless and Gauss-Markov
sources, 1990 (its use).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rotormlx.codec import codebook
from rotormlx.codec.random_stream import Floats

# A state is the last three path bits: p[i-1] + 2 p[i-2] + 4 p[i-3].
MEMORY = 3
STATES = 1 << MEMORY
# The sum of a state that no path reaches.
FAR = 1e30

Codes = npt.NDArray[np.uint32]


def subset(state: int, path: int) -> int:
    """Return the subset c of a position with path bit ``path`` that follows ``state``."""
    return (state >> 1 & 1) + 2 * ((path ^ state ^ state >> 2) & 1)


def level_codes(codes: Codes, bits: int, *, start: int = 0, state: npt.ArrayLike = 0) -> Codes:
    """Return the level codes of stored codes ``[..., A, lanes]``, A the packed axis.

    Args:
        codes: Codes from :func:`encode`.
        bits: Bits per code, 2 or 3.
        start: Same as for :func:`encode`; the first ``start`` results have no meaning.
        state: Same as for :func:`encode`.

    Returns:
        Indices into :func:`rotormlx.codec.codebook.trellis_levels`: the sign is the top bit.
    """
    path = codes & 1
    for back in range(1, min(MEMORY, start) + 1):
        path[..., start - back, :] = np.asarray(state, np.uint32) >> (back - 1) & 1
    before = [np.zeros_like(path) for _ in range(MEMORY)]
    for back, earlier in enumerate(before, 1):
        earlier[..., back:, :] = path[..., :-back, :]
    sign, high = codes >> 1 & 1, codes >> 2
    chosen = before[1] + 2 * (path ^ before[0] ^ before[2])
    return (chosen ^ 3 * sign) + 4 * high + (sign << bits)


def encode(z: npt.ArrayLike, bits: int, *, start: int = 0, state: npt.ArrayLike = 0) -> Codes:
    """Return the stored codes of the path with the least squared error.

    Args:
        z: Finite numbers ``[..., A, lanes]``; a path runs along A.
        bits: Bits per code, 2 or 3.
        start: Number of positions that have codes already; their results are 0.
        state: State after those positions, ``[..., lanes]``; see :func:`state_after`.

    Returns:
        Codes ``[..., A, lanes]``, uint32; docs/FORMAT.md defines the choice between two paths with
        equal sums.
    """
    return encode_with_margins(z, bits, start=start, state=state)[0]


def encode_with_margins(
    z: npt.ArrayLike, bits: int, *, start: int = 0, state: npt.ArrayLike = 0
) -> tuple[Codes, Floats]:
    """Encode like :func:`encode`, and also return the margin of the path.

    Returns:
        Codes and margins, both ``[..., A, lanes]``. A margin is the additional cost of the cheapest
        other path that joins the chosen path at this position, or that takes another level of the
        same subset there.
    """
    z = np.asarray(z)
    levels = codebook.trellis_levels(bits).astype(z.dtype)
    level_codes_of, rest_of = members(bits)
    ends = np.arange(STATES)
    before = np.stack([ends >> 1, ends >> 1 | STATES >> 1], -1)  # [8, 2]
    through = np.vectorize(subset)(before, ends[:, None] & 1)

    length, shape = z.shape[-2], z[..., 0, :].shape
    sums = np.where(ends == np.asarray(state)[..., None], 0, FAR).astype(z.dtype)
    sums = np.broadcast_to(sums, (*shape, STATES))
    distances, costs = [], []
    for i in range(start, length):
        distances.append(
            np.square(z[..., i, :, None, None] - levels[level_codes_of])
        )  # [..., 4, free]
        cheapest = distances[-1].min(-1)
        costs.append(sums[..., before] + cheapest[..., through])  # [..., 8, 2]
        sums = costs[-1].min(-1)

    codes, margins = np.zeros(z.shape, np.uint32), np.full(z.shape, np.inf)
    at = sums.argmin(-1)
    joined = np.sort(sums, -1)[..., 1] - sums.min(-1)
    for i in range(length - 1, start - 1, -1):
        two = _taken(costs[i - start], at)
        step = (two[..., 1] < two[..., 0]).astype(int)
        free = _taken(distances[i - start], through[at, step])
        codes[..., i, :] = (at & 1) | rest_of[free.argmin(-1)] << 1
        margins[..., i, :] = np.minimum(joined, np.abs(two[..., 1] - two[..., 0]))
        nearest = np.sort(free, -1)
        margins[..., i, :] = np.minimum(margins[..., i, :], nearest[..., 1] - nearest[..., 0])
        joined, at = np.full(shape, np.inf), before[at, step]
    return codes, margins


def members(bits: int) -> tuple[Codes, Codes]:
    """Return the level codes of each subset in the order of comparison, and their s + 2 h.

    The shapes are ``[4, 2**(bits - 1)]`` and ``[2**(bits - 1)]``.
    """
    rest = np.arange(2 ** (bits - 1), dtype=np.uint32)
    rest = rest[np.argsort(rest & 1, kind="stable")]  # (s, h) = (0, 0), (0, 1), (1, 0), (1, 1)
    sign, high = rest & 1, rest >> 1
    subsets = np.arange(4, dtype=np.uint32)[:, None]
    return (subsets ^ 3 * sign) + 4 * high + (sign << bits), rest


def _taken(x: npt.NDArray[Any], index: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the rows of ``[..., N, M]`` at ``index [...]``."""
    return np.take_along_axis(x, index[..., None, None], -2)[..., 0, :]


def state_after(words: Any, tokens: int) -> Any:
    """Return the state of each channel after the first ``tokens`` tokens of a block of values.

    Args:
        words: Words ``[..., R, D]``, uint32 or int32, of numpy, MLX or torch.
        tokens: Number of tokens, at least 1.
    """
    fields = 16  # codes per word of the plane that holds the path bits
    state = 0 * words[..., 0, :]
    for back in range(1, min(MEMORY, tokens) + 1):
        row, field = divmod(tokens - back, fields)
        state = state | ((words[..., row, :] >> 2 * field) & 1) << (back - 1)
    return state
