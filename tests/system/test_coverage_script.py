"""scripts/coverage.py outlives the models that it examines, and keeps what it has found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import coverage
from scripts.coverage_table import Result
from tests.support.fragile_host import Fragile


@pytest.fixture(autouse=True)
def fragile(monkeypatch: pytest.MonkeyPatch) -> None:
    place = ("tests.support.fragile_host", "Fragile")
    monkeypatch.setitem(coverage.HOSTS, "fragile", place)
    # Long enough for a process to start on a busy machine; only one model takes so long.
    monkeypatch.setattr(coverage, "LONGEST_SECONDS", 20.0)


def test_a_model_that_ends_its_process_costs_its_own_line_only() -> None:
    found = list(coverage.examined("fragile", Fragile().model_types()))
    assert [r.model_type for r in found] == Fragile().model_types()
    notes = {r.model_type: (r.verdict, r.note) for r in found}
    assert notes["dies"] == ("crashes", "it ended its process, exit status 3")
    assert notes["killed"] == ("crashes", "it ended its process, exit status -9")
    assert notes["hangs"] == ("crashes", "no result within 20 s")
    assert {notes[t][0] for t in ("first", "second", "last")} == {"works"}
    # A process serves as many models as it can.
    found = list(coverage.examined("fragile", ["first", "second"]))
    assert found[0].note == found[1].note


def test_a_cut_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    kept = coverage.Kept(path, host="fragile", version="1")
    kept.keep(Result("first", "differs", note="kept", flips=(1, 9)))
    coverage.Kept(path, host="fragile", version="0").keep(Result("second", "differs"))
    monkeypatch.setattr(sys, "argv", ["coverage", "fragile", "first", "second", f"--keep={path}"])
    assert coverage.main() == 1  # what was kept differs
    assert not Fragile.path.exists()  # not the whole table
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["of"]["version"], x["result"]["model_type"]) for x in lines] == [
        ("1", "first"),
        ("0", "second"),  # of another version, so it is examined again
        ("1", "second"),
    ]
    assert lines[2]["result"]["verdict"] == "works"
    assert "1 of 2 model types work" in capsys.readouterr().out
