"""The longest context that fits into memory, for the exact cache and compressed ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from rich.bar import Bar
from rich.table import Table

from rotormlx.cli.refusal import Refusal
from rotormlx.report import Report, megabytes

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Bits of keys and values to compare with float16.
BITS = (8, 4, 3, 2)
# More tokens than any model reads: a cache that still fits here has a bounded size.
MOST_TOKENS = 2**30
_BAR_WIDTH = 40


class Choice(NamedTuple):
    """A cache and the longest context it allows; None if every length fits."""

    name: str
    tokens: int | None


def size_of(text: str) -> int:
    """Parse a size such as ``16GB``, and return it in bytes.

    Raises:
        Refusal: If the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS:
        raise Refusal(
            f"[info] --memory must be a number and a unit (MB, GB, TB, MiB, GiB or TiB), such as "
            f"16GB, but {text!r:.60} was given."
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def choices(report: Report, budget: int) -> list[Choice]:
    """Return the longest context of each cache that takes at most ``budget`` bytes.

    Args:
        report: The report on the model.
        budget: Bytes available for the cache.

    Returns:
        One choice per cache: float16 first, then decreasing numbers of bits.
    """
    made = [Choice("float16", longest(report.float_bytes, budget))]
    for bits in BITS:
        compressed = report.with_bits(bits, bits)
        made.append(Choice(f"{bits} bits", longest(compressed.compressed_bytes, budget)))
    return made


def longest(size: Callable[[int], int], budget: int) -> int | None:
    """Return the largest number of tokens with ``size(tokens) <= budget``.

    Args:
        size: Returns the bytes for a number of tokens. It grows with the tokens, except where a
            full tail is packed.
        budget: Bytes available for the cache.

    Returns:
        The number, or None if even ``MOST_TOKENS`` tokens fit.
    """
    if size(MOST_TOKENS) <= budget:
        return None
    fits, too_many = 0, MOST_TOKENS
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if size(middle) <= budget else (fits, middle)
    return fits


def table(report: Report, weights: int, memory: int) -> Table:
    """Return a table of the longest contexts beside the weights, with one bar per cache.

    Args:
        report: The report on the model.
        weights: Bytes of the model's weights.
        memory: Bytes available for weights and cache.

    Raises:
        Refusal: If the weights alone do not fit.
    """
    if weights >= memory:
        raise Refusal(
            f"[info] --memory must be more than the weights of the model, which take "
            f"{megabytes(weights)}, but {megabytes(memory)} was given; choose a model with "
            "fewer bits per weight, or more memory."
        )
    made = choices(report, memory - weights)
    most = max((choice.tokens or 0 for choice in made), default=0)
    shown = Table(
        title=f"longest context in {megabytes(memory)}, of which the weights take "
        f"{megabytes(weights)}",
        caption="one sequence; without the memory for computing a step",
    )
    shown.add_column("cache")
    shown.add_column("tokens", justify="right")
    shown.add_column("")
    for name, tokens in made:
        is_open = tokens is None
        length = most if tokens is None else tokens
        bar = Bar(max(most, 1), 0, length or (1 if is_open else 0), width=_BAR_WIDTH)
        shown.add_row(name, "any number" if tokens is None else f"{tokens:,}", bar)
    return shown
