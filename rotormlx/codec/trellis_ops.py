"""Trellis codes in operations on whole arrays of MLX or torch.

Both libraries run the same steps and produce the same bytes. Integers are uint32 in MLX and int32
in torch; no step depends on the difference.

Source: docs/FORMAT.md, sections 3 and 5; :mod:`rotormlx.codec.trellis` explains the terms.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from rotormlx.codec import codebook
from rotormlx.codec.trellis import FAR, STATES, members

# Mask of the lower bit of each of the sixteen codes of a word.
_LOW_BITS = 0x55555555


class Path(NamedTuple):
    """The path of M sequences of A numbers; each field has shape ``[A, M]``.

    codes: Codes as they are stored.
    index: Indices of the levels in :func:`rotormlx.codec.codebook.trellis_levels`.
    """

    codes: Any
    index: Any


def cheapest_path(xp: ModuleType, z: Any, state: Any, bits: int) -> Path:
    """Return the path with the least squared error (Viterbi).

    Args:
        xp: ``mlx.core`` or ``torch``.
        z: float32 ``[A, M]``, all finite.
        state: State before the first position, integers ``[M]``.
        bits: Bits per code, 2 or 3.

    Returns:
        The path, in the integer dtype of ``state``.
    """
    length, zero = z.shape[0], state & 0
    costs, rests = _costs(xp, z, zero, bits)
    sums = xp.stack([xp.where(state == s, 0.0, FAR) for s in range(STATES)], 0)
    # State 4 t2 + 2 t1 + p follows state 4 top + 2 t2 + t1: [top, t2 and t1, p, A, M].
    through = [
        costs[t2 + 2 * (p ^ t1 ^ top)]
        for top in (0, 1)
        for t2 in (0, 1)
        for t1 in (0, 1)
        for p in (0, 1)
    ]
    through = xp.stack(through, 0).reshape(2, 4, 2, length, -1)
    taken = []
    for i in range(length):
        two = sums.reshape(2, 4, 1, -1) + through[:, :, :, i]
        is_second = two[1] < two[0]
        sums = xp.where(is_second, two[1], two[0])
        taken.append(is_second.reshape(STATES, -1))
        sums = sums.reshape(STATES, -1)
    taken = xp.stack(taken, 0)
    decisions = zero
    for t in range(STATES):  # bit t is the decision of state t
        decisions = decisions | xp.where(taken[:, t], zero + (1 << t), zero)
    return _traced_back(xp, decisions, rests, _first_of_least(xp, sums, zero), bits)


def _costs(xp: ModuleType, z: Any, zero: Any, bits: int) -> tuple[list[Any], Any]:
    """Return the cost of each subset at each position, and s + 2 h of its nearest member.

    s + 2 h of subset c is stored in the two bits from bit 2 c.
    """
    table = codebook.trellis_levels(bits).tolist()
    level_codes, rest_of = members(bits)
    costs, rests = [], zero
    for c in range(4):
        least, nearest = None, zero
        for code, rest in zip(level_codes[c].tolist(), rest_of.tolist(), strict=True):
            distance = z - table[code]
            distance = distance * distance
            if least is None:
                least, nearest = distance, zero + rest
                continue
            is_less = distance < least
            least = xp.where(is_less, distance, least)
            nearest = xp.where(is_less, zero + rest, nearest)
        costs.append(least)
        rests = rests | (nearest << 2 * c)
    return costs, rests


def _first_of_least(xp: ModuleType, sums: Any, zero: Any) -> Any:
    """Return the state with the smallest sum; the lowest state if sums are equal."""
    least, state = sums[0], zero
    for t in range(1, STATES):
        is_less = sums[t] < least
        least, state = xp.where(is_less, sums[t], least), xp.where(is_less, zero + t, state)
    return state


def _traced_back(xp: ModuleType, decisions: Any, rests: Any, state: Any, bits: int) -> Path:
    """Return the path that ends in a state."""
    states, seconds = [], []
    for i in reversed(range(decisions.shape[0])):
        second = (decisions[i] >> state) & 1
        states.append(state)
        seconds.append(second)
        state = (state >> 1) | (second << 2)
    t, second = (xp.stack(found[::-1], 0) for found in (states, seconds))
    path = t & 1
    subset = ((t >> 2) & 1) | ((path ^ (t >> 1) ^ second) & 1) << 1
    rest = (rests >> 2 * subset) & 3
    sign, high = rest & 1, rest >> 1
    return Path(path | (rest << 1), (subset ^ 3 * sign) | (high << 2) | (sign << bits))


def low_magnitudes(words: Any, before: Any) -> Any:
    """Return the two low bits of each magnitude's index, in the fields of the words.

    Args:
        words: Words of the first plane of a trellis code.
        before: For each word, the word before it in its lane, or 0.
    """
    path, last = words & _LOW_BITS, before & _LOW_BITS
    sign = (words >> 1) & _LOW_BITS
    subset_0 = (path << 4) | (last >> 28)
    subset_1 = path ^ ((path << 2) | (last >> 30)) ^ ((path << 6) | (last >> 26))
    return (subset_0 ^ sign) | ((subset_1 ^ sign) << 1)
