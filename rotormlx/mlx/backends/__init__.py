"""The choice of the backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from rotormlx.mlx.backends import cpu, cuda, metal
from rotormlx.mlx.backends.checked import CheckedBackend
from rotormlx.mlx.backends.kept import findings
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.backends.vectors import Operation, operations

# The type of every backend, since all have the operations of MLXBackend.
Backend = MLXBackend

_CPU = mx.Device(mx.cpu)

# Best first, each with a function that returns why this process cannot run it, or None.
_BACKENDS: dict[str, tuple[type[MLXBackend], Callable[[], str | None]]] = {
    "metal": (metal.MetalBackend, metal.missing),
    "mlx_cuda": (cuda.MLXCUDABackend, cuda.missing),
    "cpu": (cpu.CPUBackend, cpu.missing),
    "mlx": (MLXBackend, lambda: None),
}
# Backends whose kernels the user's device compiles, so each kernel is checked at first use.
_COMPILED_LATER = ("metal", "mlx_cuda")


def available() -> list[str]:
    """Return the names of the backends that this process can run, best first."""
    return [name for name, (_, lack) in _BACKENDS.items() if lack() is None]


def backend() -> MLXBackend:
    """Return the backend named by ``ROTORMLX_BACKEND``, else the best available one.

    If kernels of the best backend give wrong results on this machine, MLX's operations replace
    them. A backend named by ``ROTORMLX_BACKEND`` runs its own kernels without this fallback.

    Raises:
        RuntimeError: If no backend has that name, or this process cannot run it.
    """
    return choose(mx.default_device() == _CPU)


@cache
def choose(_on_cpu: bool, /) -> MLXBackend:
    """Choose the backend for MLX's default device, once."""
    name = os.environ.get("ROTORMLX_BACKEND")
    if name is None:
        name = next(name for name, (_, lack) in _BACKENDS.items() if lack() is None)
        made = _BACKENDS[name][0]()
        return CheckedBackend(made) if name in _COMPILED_LATER else made
    if name not in _BACKENDS:
        raise RuntimeError(
            f"[backend] ROTORMLX_BACKEND must be one of {', '.join(_BACKENDS)}, but it is "
            f"{name!r}; unset it for the automatic choice."
        )
    if (reason := _BACKENDS[name][1]()) is not None:
        raise RuntimeError(
            f"[backend] ROTORMLX_BACKEND is {name!r}, but {reason}; unset it for the automatic "
            "choice."
        )
    return _BACKENDS[name][0]()


def fused() -> MLXBackend:
    """Return the backend without the fallback to MLX's operations: its kernels run or fail."""
    chosen = backend()
    return chosen.fused if isinstance(chosen, CheckedBackend) else chosen


def keep(operation: Operation, found: str) -> None:
    """Record a finding about an operation: ``RIGHT``, or a description of the error."""
    chosen = backend()
    if isinstance(chosen, CheckedBackend):
        chosen.keep(operation, found)


def ways() -> dict[str, str]:
    """Return the fastest way on this device for each operation with several ways."""
    checked = set(map(str, operations()))
    found = findings(backend().name).everything()
    return {name: way for name, way in found.items() if name not in checked}


def describe() -> str:
    """Describe the backend, why no better one was chosen, and which operations MLX computes."""
    chosen = backend()
    replaced = chosen.replaced() if isinstance(chosen, CheckedBackend) else {}
    left = "".join(f"; MLX's operations do: {op}, which {why}" for op, why in replaced.items())
    return _described(chosen.name) + left


def _described(name: str) -> str:
    if "ROTORMLX_BACKEND" in os.environ:
        return f"{name} (named by ROTORMLX_BACKEND)"
    better = list(_BACKENDS)[: list(_BACKENDS).index(name)]
    reasons = "; ".join(f"no {other}, {_BACKENDS[other][1]()}" for other in better)
    return f"{name} ({reasons})" if reasons else name
