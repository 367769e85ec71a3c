"""``scripts/draw_results.py``: every figure of docs/results/ shows the numbers of its page."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

CLONE = Path(__file__).resolve().parents[2]
RESULTS = CLONE / "docs" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="docs/ is not here")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

FIGURES = sorted(path.name for path in RESULTS.glob("*.svg"))


@pytest.fixture
def script() -> Any:
    return importlib.import_module("scripts.draw_results")  # which needs matplotlib


def outdated(script: Any, folder: Path) -> list[str]:
    """The figures of a folder that do not show the numbers of the pages."""
    return [
        name
        for name, picture in script.PICTURES.items()
        if script.shown(folder / name) != picture.read()
    ]


def test_figures_show_the_numbers_of_the_tables(script: Any) -> None:
    assert outdated(script, RESULTS) == [], "run scripts/draw_results.py"


def test_a_changed_table_makes_its_figure_outdated(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page in RESULTS.glob("*.md"):
        shutil.copy(page, tmp_path)
    page = tmp_path / "rivals.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("| 0.00130 |", "| 0.00131 |", 1), encoding="utf-8")
    monkeypatch.setattr(script, "PAGES", tmp_path)
    assert outdated(script, RESULTS) == ["rivals_smollm2.svg"]


def test_every_figure_is_drawn_and_on_one_page(script: Any) -> None:
    assert sorted(script.PICTURES) == FIGURES
    pages = "\n".join(path.read_text(encoding="utf-8") for path in RESULTS.glob("*.md"))
    assert sorted(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", pages)) == FIGURES


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_the_same_twice(script: Any, tmp_path: Path, name: str) -> None:
    drawn = []
    for turn in ("1.svg", "2.svg"):
        script.write(script.PICTURES[name], tmp_path / turn)
        drawn.append((tmp_path / turn).read_bytes())
    assert drawn[0] == drawn[1]
    assert script.shown(tmp_path / "1.svg") == script.PICTURES[name].read()


def test_a_table_is_read_without_marks(script: Any) -> None:
    table = script._table("| a | `KL` |\n|---|---|\n| **`k4v4`** | 1,234.5 (1 to 2) |\n")
    assert table.header == ["a", "KL"]
    assert table.row("k4v4") == ["1,234.5 (1 to 2)"]
    assert table.numbers("KL") == [1234.5]
    assert script.interval("68.8% (62% to 75%)") == [68.8, 62, 75]
    with pytest.raises(ValueError, match="must hold a number"):
        script.number("none")
