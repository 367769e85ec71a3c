"""Cuts a sequence into parts, each computed by its own threadgroups."""

from __future__ import annotations

from typing import NamedTuple


class Parts(NamedTuple):
    """A cut into ``number`` parts of ``tokens`` tokens each, of which the last may be shorter."""

    number: int
    tokens: int


def cut(tokens: int, limit: int, step: int) -> Parts:
    """Cut tokens into at most ``limit`` parts, each with the same number of whole steps."""
    steps = -(-tokens // step)
    if steps == 0:
        return Parts(0, 0)
    steps_per_part = -(-steps // limit)
    return Parts(-(-steps // steps_per_part), steps_per_part * step)
