"""The one place that chooses which backend does the work."""

from __future__ import annotations

import os
from functools import cache

from rotormlx.backends.mlx_ops import MLXBackend

_BACKENDS = {"mlx": MLXBackend}


def backend() -> MLXBackend:
    """The backend of this process: the one named by ``ROTORMLX_BACKEND``, else the best there is.

    Raises:
        RuntimeError: If the name is not of a backend.
    """
    return _backend(os.environ.get("ROTORMLX_BACKEND", "mlx"))


@cache
def _backend(name: str) -> MLXBackend:
    if name not in _BACKENDS:
        raise RuntimeError(
            f"[backend] ROTORMLX_BACKEND must be one of {', '.join(_BACKENDS)}, but it is "
            f"{name!r}; unset it for the automatic choice."
        )
    return _BACKENDS[name]()
