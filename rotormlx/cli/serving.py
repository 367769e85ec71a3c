"""What ``mlx_lm server`` says about its caches: in its log, and at ``/health``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from rotormlx.cli.usage import Usage, measure
from rotormlx.mlx.cache.lists import leaves
from rotormlx.report import Report, megabytes

# Connections that may wait until the server takes them.
CLIENTS_WAITING = 128


class PromptCacheUsage:
    """Sizes of the prompt caches that a server keeps.

    Args:
        reports: Gives the reports of the models loaded, the draft model's last.
    """

    def __init__(self, reports: Callable[[], list[Report]]) -> None:
        self.reports = reports
        self.sequences = 0
        self.usage = Usage()
        self.allocated_bytes = 0

    def update(self, prompt_caches: Sequence[list[Any]]) -> None:
        """Measure all of them again; called where they change, in the generation thread."""
        self.allocated_bytes = sum(c.nbytes for caches in prompt_caches for c in caches)
        total = Usage()
        for caches in prompt_caches:
            total += self._measure(caches)
        self.sequences, self.usage = len(prompt_caches), total

    def _measure(self, caches: list[Any]) -> Usage:
        total, rest = Usage(), [leaf for _, _, leaf in leaves(caches)]
        # With a draft model, its caches follow the model's.
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
        """The same for programs, sizes in bytes."""
        return {
            "compressed": [report.summary for report in self.reports()],
            "prompt_caches": self.sequences,
            "tokens": self.usage.tokens,
            "packed_tokens": self.usage.packed_tokens,
            "cache_bytes": self.usage.cache_bytes,
            "allocated_bytes": self.allocated_bytes,
            "float16_bytes": self.usage.float16_bytes,
            "memory_bytes": mx.get_active_memory(),
            "peak_memory_bytes": mx.get_peak_memory(),
        }


@contextmanager
def measured(tool: ModuleType, reports: Callable[[], list[Report]]) -> Iterator[PromptCacheUsage]:
    """Let a server log and report the sizes of its caches while this context runs.

    Args:
        tool: ``mlx_lm.server``.
        reports: Gives the reports of the models loaded.
    """
    usage = PromptCacheUsage(reports)
    log_stats = tool.ResponseGenerator._log_cache_stats

    class MeasuredPromptCache(tool.LRUPromptCache):  # type: ignore[name-defined, misc]
        def insert_cache(self, *args: Any, **kwargs: Any) -> None:
            super().insert_cache(*args, **kwargs)
            self._measure()

        def trim_to(self, **kwargs: Any) -> None:
            super().trim_to(**kwargs)
            self._measure()

        def _measure(self) -> None:
            keys = [key for order in self._lru._lrus.values() for key in order]
            usage.update([self._trie.get(*key).prompt_cache for key in keys])

    def log_cache_stats(generator: Any) -> None:
        log_stats(generator)
        logging.info("%s", usage)

    def handle_health_check(handler: Any) -> None:
        healthy = handler.response_generator.is_healthy
        handler._set_completion_headers(200 if healthy else 503)
        handler.end_headers()
        status = {"status": "ok" if healthy else "unavailable", "rotormlx": usage.as_json()}
        handler.wfile.write(json.dumps(status).encode())
        handler.wfile.flush()

    with ExitStack() as stack:
        stack.enter_context(patch.object(tool, "LRUPromptCache", MeasuredPromptCache))
        stack.enter_context(
            patch.object(tool.ResponseGenerator, "_log_cache_stats", log_cache_stats)
        )
        stack.enter_context(
            patch.object(tool.APIHandler, "handle_health_check", handle_health_check)
        )
        # Five by default: of more clients that connect at once some would be turned away.
        queue = patch.object(tool.ThreadingHTTPServer, "request_queue_size", CLIENTS_WAITING)
        stack.enter_context(queue)
        yield usage
