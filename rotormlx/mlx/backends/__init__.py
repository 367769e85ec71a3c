"""The one place that chooses which backend does the work."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from rotormlx.mlx.backends import cpu, cuda, metal
from rotormlx.mlx.backends.mlx_ops import MLXBackend

# All backends have its operations.
Backend = MLXBackend

_CPU = mx.Device(mx.cpu)

# Best first, each with what tells why this process cannot run it.
_BACKENDS: dict[str, tuple[type[MLXBackend], Callable[[], str | None]]] = {
    "metal": (metal.MetalBackend, metal.missing),
    "mlx_cuda": (cuda.MLXCUDABackend, cuda.missing),
    "cpu": (cpu.CPUBackend, cpu.missing),
    "mlx": (MLXBackend, lambda: None),
}


def available() -> list[str]:
    """Names of the backends that this process can run, best first."""
    return [name for name, (_, lack) in _BACKENDS.items() if lack() is None]


def backend() -> MLXBackend:
    """The backend of this process: the one named by ``ROTORMLX_BACKEND``, else the best there is.

    Raises:
        RuntimeError: If the name is not of a backend, or this process cannot run it.
    """
    return choose(mx.default_device() == _CPU)


@cache
def choose(_on_cpu: bool, /) -> MLXBackend:
    """What :func:`backend` gives; made once for MLX's default device, CPU or GPU."""
    name = os.environ.get("ROTORMLX_BACKEND")
    if name is None:
        name = next(name for name, (_, lack) in _BACKENDS.items() if lack() is None)
    elif name not in _BACKENDS:
        raise RuntimeError(
            f"[backend] ROTORMLX_BACKEND must be one of {', '.join(_BACKENDS)}, but it is "
            f"{name!r}; unset it for the automatic choice."
        )
    elif (reason := _BACKENDS[name][1]()) is not None:
        raise RuntimeError(
            f"[backend] ROTORMLX_BACKEND is {name!r}, but {reason}; unset it for the automatic "
            "choice."
        )
    return _BACKENDS[name][0]()


def describe() -> str:
    """The backend's name, and why the automatic choice took no better one."""
    name = backend().name
    if "ROTORMLX_BACKEND" in os.environ:
        return f"{name} (named by ROTORMLX_BACKEND)"
    better = list(_BACKENDS)[: list(_BACKENDS).index(name)]
    reasons = "; ".join(f"no {other}, {_BACKENDS[other][1]()}" for other in better)
    return f"{name} ({reasons})" if reasons else name
