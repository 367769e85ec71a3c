"""Continuations of a text, and where they first differ from those of the exact cache.

Reading a text tests each step alone; in a continuation, the errors of earlier steps add up. Two
continuations are compared token by token up to the first difference. Sampled ones use the same
random numbers in the same step: Gumbel noise is added to the logits, and the largest sum is a
sample. So they differ only if the distributions do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import mlx.core as mx
import numpy as np

Choose = Callable[[mx.array, int], int]


@dataclass(frozen=True)
class Settings:
    """The settings of the continuations of a text.

    Args:
        greedy: Length of the greedy continuation in tokens; 0 for none.
        sampled: Length of each sampled continuation in tokens; 0 for none.
        seeds: Number of sampled continuations.
        temperature: Divisor of the logits before sampling.

    Raises:
        ValueError: If the temperature is not positive and finite, or a number is negative.
    """

    greedy: int = 64
    sampled: int = 64
    seeds: int = 4
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.temperature < np.inf or min(self.greedy, self.sampled, self.seeds) < 0:
            raise ValueError(
                "[quality] Continuations must have a finite temperature above 0 and no negative "
                f"number, but {self} was given; --sampled 0 leaves all but the greedy one out."
            )

    @property
    def tokens(self) -> int:
        """Total number of tokens generated after one text."""
        return self.greedy + self.sampled * self.seeds


def continuations(
    model: Callable[..., mx.array],
    first: int,
    caches: Sequence[Any],
    settings: Settings,
    advance: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the continuations after the tokens that caches hold, the greedy one first.

    Args:
        model: An mlx-lm model.
        first: The first token to read.
        caches: One filled cache per layer; the call changes their contents.
        settings: The settings of the continuations.
        advance: Called after each continuation with its number of tokens.
    """
    choices = [(sampler(seed, settings.temperature), settings.sampled) for seed in _seeds(settings)]
    choices.append((_most_likely, settings.greedy))
    written: list[list[int]] = []
    for number, (choose, tokens) in enumerate(choices, start=1):
        own = caches if number == len(choices) else copy.deepcopy(caches)
        written.append(list(_write(model, first, own, tokens, choose)))
        if advance is not None:
            advance(tokens)
    return [written[-1], *written[:-1]]


def sampler(seed: int, temperature: float) -> Choose:
    """Return a function that samples from logits ``[V]``; seed and step determine the noise."""

    def choose(logits: mx.array, step: int) -> int:
        scaled = np.array(logits.astype(mx.float32)) / temperature
        noise = np.random.default_rng([seed, step]).gumbel(size=scaled.shape)
        return int((scaled + noise).argmax())

    return choose


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of equal tokens at the start of two continuations."""
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _seeds(settings: Settings) -> range:
    return range(settings.seeds if settings.sampled else 0)


def _most_likely(logits: mx.array, step: int) -> int:
    return int(np.array(mx.argmax(logits)))


def _write(
    model: Callable[..., mx.array], first: int, caches: Sequence[Any], tokens: int, choose: Choose
) -> Iterator[int]:
    latest = first
    for step in range(tokens):
        latest = choose(model(mx.array([[latest]]), cache=caches)[0, -1], step)
        yield latest
