"""A model that goes on by itself behind a text: where it leaves the path of the exact cache.

Reading a text shows one step at a time; writing adds up what the steps before have done. Two
continuations are compared token by token up to the first difference. Sampled ones draw the same
random numbers in the same step (Gumbel noise, whose largest sum with the logits is a sample), so
they part only where the distributions do.
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
    """What is written behind a text.

    Args:
        greedy: Tokens of the greedy continuation; 0 for none.
        sampled: Tokens of each sampled continuation; 0 for none.
        seeds: How many are sampled.
        temperature: What logits are divided by before a sample is drawn.

    Raises:
        ValueError: If the temperature is not above 0, or a number is negative.
    """

    greedy: int = 64
    sampled: int = 64
    seeds: int = 4
    temperature: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.temperature < np.inf or min(self.greedy, self.sampled, self.seeds) < 0:
            raise ValueError(
                "[quality] Continuations must have a temperature above 0 and numbers from 0 on, "
                f"but {self} came; --sampled 0 leaves all but the greedy one out."
            )

    @property
    def tokens(self) -> int:
        """All tokens that are written behind one text."""
        return self.greedy + self.sampled * self.seeds


def continuations(
    model: Callable[..., mx.array],
    first: int,
    caches: Sequence[Any],
    settings: Settings,
    advance: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """What a model writes behind what its caches hold, the greedy continuation first.

    Args:
        model: An mlx-lm model.
        first: The token that is read first.
        caches: One cache a layer, filled; their contents are used up.
        settings: What to write.
        advance: Called with the number of tokens after each continuation.
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
    """Draws a token from logits ``[V]``; the same noise for the same seed and step."""

    def choose(logits: mx.array, step: int) -> int:
        scaled = np.array(logits.astype(mx.float32)) / temperature
        noise = np.random.default_rng([seed, step]).gumbel(size=scaled.shape)
        return int((scaled + noise).argmax())

    return choose


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the start of two continuations are the same."""
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
