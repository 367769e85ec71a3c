"""A library for scripts/coverage.py, some of whose models end their process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from scripts.coverage_table import COLUMNS, ROOT, STEPS, Result


class Fragile:
    """``dies`` ends the process, ``hangs`` never answers, ``killed`` is killed from outside."""

    path = ROOT / "docs" / "COVERAGE_FRAGILE.md"
    head = "# Fragile models\n\n" + COLUMNS
    version = "1"

    def prepare_process(self) -> None:
        """Nothing to set up."""

    def model_types(self) -> list[str]:
        """Every model type."""
        return ["first", "dies", "second", "killed", "hangs", "last"]

    def examine(self, model_type: str, steps: Sequence[int] = STEPS) -> Result:
        """A result, if the model has one."""
        if model_type == "dies":
            os._exit(3)
        if model_type == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if model_type == "hangs":
            time.sleep(3600)
        return Result(model_type, "works", note=f"in {os.getpid()}", flips=(0, 9))
