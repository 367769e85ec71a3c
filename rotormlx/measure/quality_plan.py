"""Preparation of a run of ``rotormlx quality``: the texts to read, and checks before the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rotormlx.measure import cache_contents, scoring, tasks, unfinished
from rotormlx.measure.free_running import Settings
from rotormlx.measure.haystack import KINDS, Haystack, texts_for
from rotormlx.measure.machine import machine, versions
from rotormlx.measure.schemes import Scheme
from rotormlx.measure.scoring import CHUNK


def encoded(tokenizer: Any, name: str, text: str, tokens: int, start: int) -> tuple[int, ...]:
    """Return the first tokens of a text; predictions before ``start`` will not be compared.

    Raises:
        ValueError: If the text or ``tokens`` is too short.
    """
    if tokens < start + 2:
        raise ValueError(
            f"[quality] At least {start + 2} tokens are required, so that every scheme is read "
            f"from packed bytes, but {tokens} were given; give more with --tokens."
        )
    # An English token has 4 or 5 characters; encoding all of a long text would take long.
    ids = tokenizer.encode(text[: 8 * tokens])[:tokens]
    if len(ids) < tokens:
        raise ValueError(
            f"[quality] A text of at least {tokens} tokens is required, but {name} has {len(ids)}; "
            "give a longer one with --text, or a smaller --tokens."
        )
    return tuple(ids)


def try_out(model: Any, ids: Sequence[int], schemes: Sequence[Scheme]) -> None:
    """Refuse a scheme that does not work with this model, before the long work starts."""
    for chosen in schemes:
        try:
            scoring.score(model, ids[:2], chosen.caches(model))
        # mlx-lm raises these, and so do models with attention code of their own.
        except (ValueError, TypeError) as error:
            why = str(error).splitlines()[0].rstrip(".")
            raise ValueError(
                f"[quality] Every scheme must work with this model, but {chosen.name} failed: "
                f"{why}; leave it out of --schemes."
            ) from error


def stacks_for(tokenizer: Any, schemes: Sequence[Scheme], items: int) -> list[Haystack]:
    """Return the texts of the generated tasks.

    Raises:
        ValueError: If a scheme has a sink or window that is too large for the tasks.
    """
    if not items:
        return []
    for chosen in schemes:
        sink, window = cache_contents.exact_tokens(chosen.make(0))
        if sink > tasks.MOST_SINK or window > tasks.MOST_WINDOW:
            raise ValueError(
                f"[quality] Tasks need a sink up to {tasks.MOST_SINK} and a window up to "
                f"{tasks.MOST_WINDOW}, so that answers are in packed bytes, but {chosen.name} "
                "was given; leave out the scheme or --tasks."
            )
    return texts_for(tokenizer, KINDS, (tasks.LENGTH,), items, tasks.QUESTIONS)


def setting_of(model: Any, written: Settings) -> dict[str, Any]:
    """Return everything that a result depends on, besides its text and its scheme."""
    return {
        "model": unfinished.of_model(model),
        "package": unfinished.of_package(),
        "versions": versions(),
        "machine": machine(),
        "written": written,
    }


def first_packed(schemes: Sequence[Scheme]) -> int:
    """Return the first prediction, in whole chunks, for which every scheme reads packed tokens."""
    needs = []
    for chosen in schemes:
        cache = chosen.make(0)
        unpacked = sum(cache_contents.exact_tokens(cache))
        needs.append(-(-(unpacked + cache_contents.block_tokens(cache)) // CHUNK) * CHUNK)
    return max(needs)
