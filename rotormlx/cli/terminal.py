"""The console for tables."""

from __future__ import annotations

import sys

from rich.console import Console


def wide_console() -> Console:
    """Return a console for standard output, wide enough for tables if it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)
