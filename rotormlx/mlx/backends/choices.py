"""The choice of the fastest of several kernels with equal results on this device.

They are timed at first use, for a fraction of a second, and the choice is stored for later
processes (``kept.py``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import mlx.core as mx

from rotormlx.mlx.backends.first_call import KernelError
from rotormlx.mlx.backends.kept import Findings

Ways = Mapping[str, Callable[[], mx.array]]
# Runs of each way. The first one compiles the kernel, which does not change the median.
RUNS = 9


def fastest(findings: Findings, name: str, ways: Ways) -> str:
    """Return the fastest way on this device; the first one if none can run.

    Args:
        findings: The findings about the backend, which store the choice.
        name: The name of the finding.
        ways: Calls by name; the result of each is evaluated.
    """
    known = findings.get(name)
    if known in ways:
        return str(known)
    times = _median_seconds(ways)
    if not times:
        return next(iter(ways))
    chosen = min(times, key=lambda way: times[way])
    findings.keep(name, chosen)
    return chosen


def _median_seconds(ways: Ways) -> dict[str, float]:
    """Return the median time of each way that runs, timed in turn."""
    taken: dict[str, list[float]] = {}
    failed: set[str] = set()
    for _ in range(RUNS):
        for way, step in ways.items():
            if way in failed:
                continue
            start = time.perf_counter()
            try:
                mx.eval(step())
            except KernelError:
                failed.add(way)
                continue
            taken.setdefault(way, []).append(time.perf_counter() - start)
    return {way: statistics.median(times) for way, times in taken.items() if way not in failed}
