"""Reuse and report of the prompt caches that ``mlx_lm server`` keeps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from rotormlx.cli.usage import Usage, measure
from rotormlx.mlx.cache import trim
from rotormlx.mlx.host_caches import leaves
from rotormlx.report import Report, megabytes

# Number of connections that may wait until the server accepts them.
CLIENTS_WAITING = 128


class PromptCacheUsage:
    """Sizes of the prompt caches that a server keeps.

    Args:
        reports: Returns the reports of the loaded models, the draft model's last.
    """

    def __init__(self, reports: Callable[[], list[Report]]) -> None:
        self.reports = reports
        self.sequences = 0
        self.usage = Usage()
        self.allocated_bytes = 0
        self.restarts: Callable[[], int] = lambda: 0

    def update(self, prompt_caches: Sequence[list[Any]]) -> None:
        """Measure all prompt caches again; called in the generation thread when they change."""
        self.allocated_bytes = sum(c.nbytes for caches in prompt_caches for c in caches)
        total = Usage()
        for caches in prompt_caches:
            total += self._measure(caches)
        self.sequences, self.usage = len(prompt_caches), total

    def _measure(self, caches: list[Any]) -> Usage:
        total, rest = Usage(), [leaf for _, _, leaf in leaves(caches)]
        # The caches of a draft model follow those of the model.
        for report in self.reports():
            count = len(report.layers)
            if len(rest) >= count:
                total += measure(report, rest[:count])
                rest = rest[count:]
        return total

    def __str__(self) -> str:
        size, plain = megabytes(self.usage.cache_bytes), megabytes(self.usage.float16_bytes)
        active = megabytes(mx.get_active_memory())
        return (
            f"rotormlx: {self.sequences} prompt caches of {self.usage.tokens:,} tokens take {size} "
            f"against {plain} in float16; memory in use {active}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the sizes in bytes, for JSON."""
        return {
            "compressed": [report.summary for report in self.reports()],
            "restarts": self.restarts(),
            "prompt_caches": self.sequences,
            "tokens": self.usage.tokens,
            "packed_tokens": self.usage.packed_tokens,
            "cache_bytes": self.usage.cache_bytes,
            "allocated_bytes": self.allocated_bytes,
            "float16_bytes": self.usage.float16_bytes,
            "memory_bytes": mx.get_active_memory(),
            "peak_memory_bytes": mx.get_peak_memory(),
        }


Found = tuple[list[Any] | None, list[int]]


def made_usable(caches: list[Any] | None, tokens: list[int], rest: list[int]) -> Found:
    """Trim a stored prompt cache so that it equals the cache of a freshly read prompt.

    At least one token must be left to read; without one, mlx-lm ends generation. Tokens that are
    packed in the stored cache but would be exact in a fresh one must be read again.

    Args:
        caches: Copies of the caches of a prompt with the same beginning, cut where the prompts
            differ; or None.
        tokens: The tokens of the prompt; negative numbers stand for an image.
        rest: The last of these tokens, which the caches do not hold.

    Returns:
        The caches, or None if they cannot be used, and the tokens that they do not hold now.
    """
    if caches is None:
        return None, tokens
    kept = len(tokens) - len(rest)
    if not rest:
        if kept < 2 or tokens[-1] < 0 or not mlx_lm_cache.can_trim_prompt_cache(caches):
            return None, tokens
        kept -= 1
        mlx_lm_cache.trim_prompt_cache(caches, 1)
    again = tokens[kept - trim.tokens_to_reread(caches) : kept]
    if min(again, default=0) >= 0:  # an image must be read whole
        kept -= trim.trim_prompt_cache(caches, 0)
    return caches, tokens[kept:]


@contextmanager
def measured(tool: ModuleType, reports: Callable[[], list[Report]]) -> Iterator[PromptCacheUsage]:
    """Let a server measure and reuse its prompt caches while this context is open.

    Args:
        tool: ``mlx_lm.server``.
        reports: Returns the reports of the loaded models.

    Yields:
        The sizes of the prompt caches, kept up to date.
    """
    usage = PromptCacheUsage(reports)
    log_stats = getattr(tool.ResponseGenerator, "_log_cache_stats", lambda generator: None)

    class MeasuredPromptCache(getattr(tool, "LRUPromptCache", object)):  # type: ignore[misc]
        def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> Found:
            caches, rest = super().fetch_nearest_cache(model, tokens)
            return made_usable(caches, tokens, rest)

        def insert_cache(self, *args: Any, **kwargs: Any) -> None:
            super().insert_cache(*args, **kwargs)
            self._measure()

        def trim_to(self, *args: Any, **kwargs: Any) -> None:
            super().trim_to(*args, **kwargs)
            self._measure()

        def _measure(self) -> None:
            with _telling():
                keys = [key for order in self._lru._lrus.values() for key in order]
                usage.update([self._trie.get(*key).prompt_cache for key in keys])

    def log_cache_stats(generator: Any) -> None:
        with _telling():
            log_stats(generator)
        with _telling():
            logging.info("%s", str(usage))

    def handle_health_check(handler: Any) -> None:
        healthy = handler.response_generator.is_healthy
        status: dict[str, Any] = {"status": "ok" if healthy else "unavailable"}
        with _telling():
            status["rotormlx"] = usage.as_json()
        handler._set_completion_headers(200 if healthy else 503)
        handler.end_headers()
        handler.wfile.write(json.dumps(status).encode())
        handler.wfile.flush()

    replaced = {
        "LRUPromptCache": (tool, MeasuredPromptCache),
        "_log_cache_stats": (tool.ResponseGenerator, log_cache_stats),
        "handle_health_check": (tool.APIHandler, handle_health_check),
        # The default is five; if more clients connected at once, some would be refused.
        "request_queue_size": (tool.ThreadingHTTPServer, CLIENTS_WAITING),
    }
    with ExitStack() as stack:
        for name, (owner, value) in replaced.items():
            if hasattr(owner, name):
                stack.enter_context(patch.object(owner, name, value))
        yield usage


@contextmanager
def _telling() -> Iterator[None]:
    """Turn errors of the memory report into a warning, so that they never end a request."""
    try:
        yield
    except Exception as error:
        logging.warning("rotormlx: sizes are unknown: %s: %s", type(error).__name__, error)
