"""How a sequence is cut into parts, each done by its own threadgroups."""

from __future__ import annotations

from typing import NamedTuple


class Parts(NamedTuple):
    """How tokens are cut: ``number`` parts of ``tokens`` each, of which the last may be short."""

    number: int
    tokens: int


def cut(tokens: int, limit: int, step: int) -> Parts:
    """Cut tokens into at most ``limit`` parts of equally many whole steps."""
    steps = -(-tokens // step)
    if steps == 0:
        return Parts(0, 0)
    steps_per_part = -(-steps // limit)
    return Parts(-(-steps // steps_per_part), steps_per_part * step)
