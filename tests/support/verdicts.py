"""What every table of models promises of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_verdict(result: Any, verdict: str, documented: Mapping[str, str]) -> None:
    """Require of a ``scripts.coverage_table.Result`` the verdict that the table has."""
    assert result.verdict == verdict, result
    assert documented[result.model_type] == verdict
    if verdict == "works":
        assert result.compressed > 0
        # Zero would mean that nothing was read from packed bytes.
        assert result.error > 0 or result.flips
    else:
        assert len(result.note) > 10
