"""The machine and the versions of a measurement."""

from __future__ import annotations

import platform
from importlib.metadata import version

import mlx.core as mx

from rotormlx.mlx import backends


def machine() -> str:
    """Return the processor, the device that MLX computes on, and the backend."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [
                line.partition(":")[2].strip() for line in lines if line.startswith("model name")
            ]
        name = f"{models[0]}, {len(models)} cores" if models else name
    except OSError:  # not Linux
        pass
    return f"{name}, MLX on {mx.default_device()}, backend {backends.backend().name}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a measurement depends on."""
    packages = ("rotormlx", "mlx", "mlx-lm", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
