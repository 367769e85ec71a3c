"""Findings about the kernels on this GPU, stored in the cache folder.

There is one JSON file per backend, device, system, version of MLX and of rotormlx, and text of the
kernels, since a finding depends on all of these. A file that cannot be read counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from rotormlx.kernels.source import folder
from rotormlx.storage.paths import cache_dir
from rotormlx.storage.tensor_file import atomic_path

# Folders with the source texts of the kernels.
_TEXTS = ("metal_kernels", "cuda_kernels", "shared_kernels")


class Findings:
    """Findings about a backend on this device, by name.

    Args:
        backend: The name of the backend.
    """

    def __init__(self, backend: str) -> None:
        self.facts = {"backend": backend, "device": device_name(), **_versions()}
        digest = hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()[:16]
        self.path = cache_dir() / "kernels" / f"{backend}-{digest}.json"
        self._found: dict[str, Any] = self._read()

    def get(self, name: str) -> Any:
        """Return a finding, or None."""
        return self._found.get(name)

    def keep(self, name: str, found: Any) -> None:
        """Store a finding; warn if the file cannot be written."""
        # Another process may have stored findings meanwhile.
        self._found = {**self._read(), **self._found, name: found}
        text = json.dumps({"facts": self.facts, "found": self._found}, indent=1) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path, "kernels") as part:
                part.write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:
            _warn_once(
                f"[kernels] Findings about kernels must be stored in {self.path.parent}, but that "
                f"folder cannot be written ({_reason(error)}), so every process repeats the "
                "checks; set ROTORMLX_CACHE to a writable folder."
            )

    def everything(self) -> dict[str, Any]:
        """Return all findings by name."""
        return dict(self._found)

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.path.read_text(encoding="utf-8"))
            return dict(known["found"])
        except (OSError, ValueError, TypeError, KeyError):  # none yet, or damaged
            return {}


def findings(backend: str) -> Findings:
    """Return the findings about a backend; all callers share one object."""
    return _findings(backend, cache_dir())


@cache
def _findings(backend: str, _folder: Path, /) -> Findings:
    return Findings(backend)


def device_name() -> str:
    """Return MLX's name of the GPU, or that of the processor if MLX computes on the CPU."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return platform.processor() or platform.machine()
    return str(mx.device_info().get("device_name", mx.default_device()))


@cache
def _versions() -> dict[str, str]:
    digest = hashlib.sha256()
    for name in _TEXTS:
        for path in sorted(folder(name).iterdir()):
            digest.update(path.read_bytes())
    return {
        "system": platform.platform(),
        "mlx": version("mlx"),
        "rotormlx": version("rotormlx"),
        "texts": digest.hexdigest()[:16],
    }


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return getattr(cause, "strerror", None) or str(cause)
