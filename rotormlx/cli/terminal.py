"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console


def wide_console() -> Console:
    """Standard output, with room for a table where it is no terminal and rich counts 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 120)
