"""Print, write and plot the results of the benchmarks."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


class KeptCases:
    """A JSON file with the rows of each measured case, so that an interrupted run can continue.

    The file is complete after each case.

    Args:
        path: The file.
        facts: Conditions of the measurement; a file with other facts is started again.
    """

    def __init__(self, path: Path, facts: Row) -> None:
        self._path = path
        self._facts = facts
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):  # no file yet, or a damaged one
            known = {}
        self._cases = known["cases"] if known.get("facts") == facts else []

    def rows(self, table: str, case: Row) -> list[Row] | None:
        """Return the rows of a case; None if it was not measured."""
        for kept in self._cases:
            if (kept["table"], kept["case"]) == (table, case):
                return kept["rows"]
        return None

    def keep(self, table: str, case: Row, rows: list[Row]) -> None:
        """Add the rows of a case to the file."""
        self._cases.append({"table": table, "case": case, "rows": rows})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({"facts": self._facts, "cases": self._cases}, indent=1) + "\n")
        os.replace(part, self._path)

    def table(self, name: str) -> list[Row]:
        """Return all rows of a table, in the order in which they were measured."""
        return [dict(row) for kept in self._cases if kept["table"] == name for row in kept["rows"]]


def add_rates(rows: list[Row], bandwidth: float) -> None:
    """Add GB/s and the share of the copy bandwidth to rows with known bytes."""
    for row in rows:
        if "bytes" in row:
            row["GB/s"] = row["bytes"] / row["ms"] / 1e6
            row["share of copy"] = 1e9 * row["GB/s"] / bandwidth


def write_figures(
    console: Console, tables: dict[str, list[Row]], output: Path, **facts: object
) -> None:
    """Write tables and facts about their measurement to ``output/figures.json``; print tables."""
    output.mkdir(parents=True, exist_ok=True)
    facts = {**facts, "date": time.strftime("%Y-%m-%d"), "tables": tables}
    (output / "figures.json").write_text(json.dumps(facts, indent=2) + "\n")
    for title, rows in tables.items():
        table = Table(title=title)
        for name, value in rows[0].items():
            table.add_column(name, justify="left" if isinstance(value, str) else "right")
        for row in rows:
            table.add_row(*map(readable, row.values()))
        console.print(table)


def readable(value: object) -> str:
    """Format a table cell: three digits for a float below 1,000, and nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float) and value < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if isinstance(value, float | int) else str(value)


def plot_cases(rows: list[Row], title: str, path: Path) -> None:
    """Plot the time of decode attention over the length of the history, one panel per case."""
    cases = sorted({(row["gqa"], row["batch"]) for row in rows})
    figure, panels = plt.subplots(
        1, len(cases), figsize=(3.2 * len(cases), 3.6), sharey=True, squeeze=False
    )
    for panel, (gqa, batch) in zip(panels[0], cases, strict=True):
        here = [row for row in rows if (row["gqa"], row["batch"]) == (gqa, batch)]
        for name in dict.fromkeys(row["contender"] for row in here):
            points = [(row["tokens"], row["ms"]) for row in here if row["contender"] == name]
            panel.loglog(*zip(*points, strict=True), marker="o", label=name)
        panel.set_title(f"GQA {gqa}, batch {batch}")
        panel.set_xlabel("tokens")
    panels[0][0].set_ylabel("ms per step")
    panels[0][-1].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
