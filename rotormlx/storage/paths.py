"""Locations of the user's files."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_dir() -> Path:
    """Return the folder of models, calibrations and kernels.

    This is ``ROTORMLX_CACHE`` if that is set, else the user's cache folder of this platform.
    """
    return Path(os.environ.get("ROTORMLX_CACHE") or user_cache_dir("rotormlx"))
