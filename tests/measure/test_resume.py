"""A run that was ended early goes on where it was, and never with what is not its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from rotormlx.measure import quality_plan, quality_run, reading, unfinished
from rotormlx.measure.free_running import Settings
from rotormlx.measure.text import default_text
from tests.support import models as tiny_models
from tests.support.models import Bytes

SCHEMES = ["k4v4", "k2v2", "kivi-k4v4"]
WRITTEN = Settings(greedy=3, sampled=3, seeds=2)


class Killed(BaseException):
    """As a kill: nothing of the run catches it."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.build("llama", seed=3)


def texts(count: int) -> dict[str, str]:
    return {str(number): default_text()[1000 * number :][:1000] for number in range(count)}


def run(model: Any, output: Path | None, **changes: Any) -> quality_run.Result:
    options: dict[str, Any] = {
        "model_name": "tiny", "command": "x", "tokens": 270, "written": WRITTEN, "texts": texts(1),
    }  # fmt: skip
    names = changes.pop("names", SCHEMES)
    return quality_run.run(model, Bytes(), names, output=output, **options | changes)


def numbers(result: quality_run.Result) -> list[dict[str, Any]]:
    """All that was measured, but how long it took."""
    rows = result.as_dict()["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is read, in order."""
    seen: list[str] = []
    exact, coded = reading._keep_distributions, reading.coded

    def watched_exact(*args: Any) -> Any:
        seen.append("exact")
        return exact(*args)

    def watched(model: Any, text: Any, chosen: Any, *rest: Any) -> Any:
        seen.append(chosen.name)
        return coded(model, text, chosen, *rest)

    monkeypatch.setattr(reading, "_keep_distributions", watched_exact)
    monkeypatch.setattr(reading, "coded", watched)
    return seen


def kill(monkeypatch: pytest.MonkeyPatch, name: str, calls: int) -> None:
    """Kill a run in place of a call of a function of the reading."""
    function, left = getattr(reading, name), [calls]

    def killed(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return function(*args, **options)

    monkeypatch.setattr(reading, name, killed)


@pytest.mark.parametrize(
    ("name", "calls", "after"),
    [
        # In the exact reading, behind it, in the first scheme, in the second.
        ("write_array_header_1_0", 0, ["exact", *SCHEMES]),
        ("_keep_layers", 0, ["exact", *SCHEMES]),
        ("coded", 0, SCHEMES),
        ("_compared", 1, SCHEMES[1:]),
        ("drop_distributions", 0, []),
    ],
)
def test_a_killed_run_goes_on_where_it_was(
    name: str, calls: int, after: list[str], model: Any, tmp_path: Path, read: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, name, calls)
        with pytest.raises(Killed):
            run(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["quality-unfinished"]
    read.clear()
    resumed = run(model, tmp_path)
    assert read == after
    assert list(tmp_path.iterdir()) == []
    assert numbers(resumed) == numbers(run(model, None))


def test_a_run_of_several_texts_goes_on_in_the_second(
    model: Any, tmp_path: Path, read: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "_compared", 4)  # the second scheme of the second text
        with pytest.raises(Killed):
            run(model, tmp_path, texts=texts(2))
    # Distributions take most of the room; those of the first text are gone.
    assert len([*tmp_path.rglob("distributions.npy")]) == 1
    read.clear()
    resumed = run(model, tmp_path, texts=texts(2))
    assert read == SCHEMES[1:]
    assert numbers(resumed) == numbers(run(model, None, texts=texts(2)))


def test_a_scheme_that_is_added_needs_the_exact_cache_again_only_if_it_is_gone(
    model: Any, tmp_path: Path, read: list[str]
) -> None:
    for names in (SCHEMES[:1], SCHEMES[:2]):
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, "drop_distributions", 0)
            with pytest.raises(Killed):
                run(model, tmp_path, names=names)
    assert read == ["exact", "k4v4", "k2v2"]
    reading.drop_distributions(reading.Text("", (), 0, WRITTEN, next(tmp_path.glob("*/*"))))
    run(model, tmp_path)
    assert read == ["exact", "k4v4", "k2v2", "exact", "kivi-k4v4"]


def test_other_predictions_are_compared_anew(model: Any, tmp_path: Path, read: list[str]) -> None:
    """A scheme with a larger window makes the comparison of all begin later."""
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "_compared", 1)
        with pytest.raises(Killed):
            run(model, tmp_path, names=["k4v4", "k4v4:window=130"])
    read.clear()
    found = run(model, tmp_path, names=["k4v4"])
    assert read == ["exact", "k4v4"]
    assert numbers(found) == numbers(run(model, None, names=["k4v4"]))


def test_nothing_of_another_run_is_taken(model: Any, tmp_path: Path, read: list[str]) -> None:
    """Another model, text, length, dtype, setting, scheme or version each measures anew."""

    def ended_early(owner: Any = model, **changes: Any) -> list[str]:
        read.clear()
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, "drop_distributions", 0)
            with pytest.raises(Killed):
                run(owner, tmp_path, **{"names": ["k4v4"]} | changes)
        return read

    whole = ["exact", "k4v4"]
    assert ended_early() == whole
    assert ended_early() == []
    changed = tiny_models.build("llama", seed=3)
    changed.lm_head.weight[200, 5] += 0.5  # one number of the head
    assert ended_early(changed) == whole
    assert ended_early() == whole  # the other run took its place
    assert ended_early(texts={"0": default_text()[1:1001]}) == whole
    assert ended_early(tokens=271) == whole
    assert ended_early(dtype="bfloat16") == whole
    assert ended_early(written=Settings(3, 3, 2, temperature=0.9)) == whole
    assert ended_early(names=["k4v4:window=128"]) == ["exact", "k4v4:window=128"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfinished, "of_package", lambda: "edited")
        assert ended_early(names=["k4v4:window=128"]) == ["exact", "k4v4:window=128"]
        patch.setattr(quality_plan, "versions", lambda: {"mlx": "0"})
        assert ended_early(names=["k4v4:window=128"]) == ["exact", "k4v4:window=128"]


def test_a_damaged_file_is_measured_again(model: Any, tmp_path: Path, read: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "drop_distributions", 0)
        with pytest.raises(Killed):
            run(model, tmp_path, names=["k4v4"])
    for damaged in (lambda b: b[: len(b) // 2], lambda b: b""):
        for path in tmp_path.rglob("*.npz"):
            if path.name not in ("exact.npz", "layers.npz"):
                path.write_bytes(damaged(path.read_bytes()))
        read.clear()
        with pytest.MonkeyPatch.context() as patch:
            kill(patch, "drop_distributions", 0)
            with pytest.raises(Killed):
                run(model, tmp_path, names=["k4v4"])
        assert read == ["k4v4"]


def test_a_calibration_belongs_to_its_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    class Made:
        numbers: ClassVar = {"0.key": np.ones((2, 4), np.float32)}

    chosen = reading.scheme("k4v4:calibrated=scale")
    monkeypatch.setattr(unfinished.calibration, "find", lambda model, transform: Made)
    before = unfinished.of_scheme(chosen, None)
    assert unfinished.of_scheme(chosen, None) == before
    monkeypatch.setattr(Made, "numbers", {"0.key": np.full((2, 4), 2, np.float32)})
    assert unfinished.of_scheme(chosen, None) != before


def test_a_refused_run_leaves_nothing(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A dtype must be"):
        run(model, tmp_path, dtype="int4")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reading, "write_array_header_1_0", full)
    with pytest.raises(
        RuntimeError, match=r"quality-unfinished, .*: No space left on device; free some space"
    ):
        run(model, tmp_path)
