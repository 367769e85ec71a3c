"""Where files of the user are kept."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_dir() -> Path:
    """``ROTORMLX_CACHE``, or the user's cache directory: models, calibrations, compiled kernels."""
    return Path(os.environ.get("ROTORMLX_CACHE") or user_cache_dir("rotormlx"))
