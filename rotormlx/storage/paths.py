"""Where files of the user are kept."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_dir() -> Path:
    """Where models and calibrations are kept: ``ROTORMLX_CACHE``, or the user's cache directory."""
    return Path(os.environ.get("ROTORMLX_CACHE") or user_cache_dir("rotormlx"))
