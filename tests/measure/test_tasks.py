"""Generated tasks in a quality run: what is asked, what counts, and what McNemar makes of it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from rotormlx.measure import haystack, needle, quality_report, quality_run, schemes, tasks
from rotormlx.measure.free_running import Settings
from rotormlx.mlx import hosts
from tests.support import models as tiny_models
from tests.support.models import Bytes

NOTHING = Settings(greedy=0, sampled=0)


class Calculating:
    """Writes what stands behind a question, worked out; ``end`` stands for the end of a line."""

    layers = (None,)

    def __init__(self, end: bytes) -> None:
        self.end = end

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        line = np.array(tokens[0]).astype(np.uint8)
        cache[0].update_and_fetch(*[mx.zeros((1, 1, len(line), 8))] * 2)
        logits = np.zeros((1, len(line), 257), np.float32)
        if bytes(line).count(b"Q: ") == 1:  # a question, no text of examples
            for row in range(len(line)):
                logits[0, row, self.next_token(bytes(line[: row + 1]))] = 1
        return mx.array(logits)

    def next_token(self, line: bytes) -> int:
        asked, found, written = line.partition(b"\nA: ")
        if not found:
            return 0
        first, *others = map(int, asked[3:].decode().split(" + "))
        value, steps = first, []
        for more in others:
            steps.append(f"{value} + {more} = {value + more}")
            value += more
        whole = ", ".join(steps).encode() + self.end
        return whole[len(written)] if len(written) < len(whole) else 0


def chains(questions: int = 6, seed: int = 0) -> haystack.Haystack:
    return haystack.haystack(Bytes(), "chain", 700, questions, seed=seed)


# ---- chains -------------------------------------------------------------------------------------


def test_chains_are_worked_out_rightly_and_no_question_is_among_them() -> None:
    made = chains(120)  # of 150 that there are
    assert len(made.tokens) == 700
    text = bytes(made.tokens).decode()
    assert text.endswith("\n")
    examples = re.findall(r"Q: (.*)\nA: (.*)\n", text)
    assert len(examples) >= 15
    asked = []
    for question in made.questions:
        whole = bytes((*question.tokens, question.answer[-1])).decode()
        [(sum_, answer)] = re.findall(r"^Q: (.*)\nA: (.*)\n$", whole)
        assert bytes(question.answer).decode() == f"{answer}\n"
        examples.append((sum_, answer))
        asked.append(sum_)
        assert f"Q: {sum_}\n" not in text
    assert len(set(asked)) == 120
    for sum_, answer in examples:
        steps = [step.split(" = ") for step in answer.split(", ")]
        assert len(steps) == haystack.CHAIN_STEPS
        for left, right in steps:
            assert eval(left) == int(right)
        assert eval(sum_) == int(steps[-1][1])
        # Each step begins with what the one before came to.
        assert steps[1][0].split()[0] == steps[0][1]
        assert sum_ == steps[0][0] + steps[1][0][len(steps[0][1]) :]


def test_chains_differ_by_seed_and_are_the_same_again() -> None:
    assert chains(seed=1) == chains(seed=1)
    assert chains(seed=1).tokens != chains(seed=2).tokens


@pytest.mark.parametrize(("end", "solved"), [(b"\n", True), (b" ", False)])
def test_every_token_of_a_chain_counts_its_end_too(end: bytes, solved: bool) -> None:
    trials = needle.search(Calculating(end), chains(), schemes.scheme("exact"))
    assert [trial.found for trial in trials] == [solved] * 6


def test_texts_of_chains_need_room() -> None:
    with pytest.raises(ValueError, match="at least 225 tokens, but 224 were given"):
        haystack.haystack(Bytes(), "chain", 224, 3, seed=0)


def test_texts_hold_as_many_questions_as_were_asked_for() -> None:
    made = haystack.texts_for(Bytes(), ("chain",), (300, 400), 21, 5)
    # 11 of each length in texts of 5 at most.
    assert [(len(s.tokens), len(s.questions)) for s in made] == [(300, 5)] * 3 + [(400, 5)] * 3
    assert len({stack.tokens for stack in made}) == 6


# ---- scores -------------------------------------------------------------------------------------


def test_scores_are_against_the_exact_cache() -> None:
    exact = {"fact": np.array([1, 1, 1, 1, 1, 1, 0, 0], bool), "copy": np.array([1, 0], bool)}
    other = {"fact": np.array([0, 0, 0, 0, 0, 1, 0, 1], bool), "copy": np.array([1, 0], bool)}
    fact, copy = tasks.scores(exact, other)
    assert (fact.kind, fact.solved, fact.trials, fact.lost, fact.gained) == ("fact", 2, 8, 5, 1)
    # Twice the chance of at most 1 of 6 heads.
    assert fact.p == pytest.approx(2 * (1 + 6) / 64)
    assert (copy.lost, copy.gained, copy.p) == (0, 0, 1)
    assert str(fact) == "25.0% (7% to 59%)"
    assert fact.against_exact == "-5 +1, p = 0.22"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks for a tokenizer whose tokens are bytes."""
    monkeypatch.setattr(tasks, "LENGTH", 1000)
    monkeypatch.setattr(tasks, "QUESTIONS", 2)


def run(**changes: Any) -> quality_run.Result:
    options: dict[str, Any] = {
        "model_name": "tiny", "command": "x", "tokens": 270, "written": NOTHING, "items": 3,
    }  # fmt: skip
    model = tiny_models.build("llama", seed=3)
    return quality_run.run(model, Bytes(), ["k4v4", "k2v2"], **options | changes)


@pytest.mark.usefixtures("few")
def test_a_run_scores_what_search_finds_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights solve nothing, so answers are put in the place of theirs."""
    solved = {"exact": [1, 1, 1, 0], "k4v4": [1, 1, 0, 1], "k2v2": [0, 0, 0, 0]}
    asked: list[str] = []

    def search(model: Any, stack: Any, chosen: schemes.Scheme, advance: Any) -> Any:
        assert hosts.MLX_LM.installed()
        asked.append(f"{chosen.name} {stack.kind}")
        if len(asked) == 14:  # the second text of the last scheme
            raise KeyboardInterrupt
        number = sum(entry == asked[-1] for entry in asked) - 1
        for question in range(len(stack.questions)):
            found = bool(solved[chosen.name][(2 * number + question) % 4])
            yield needle.Trial(chosen.name, stack.kind, 1000, 0.5, found)

    monkeypatch.setattr(needle, "search", search)
    kept: list[quality_run.Result] = []
    with pytest.raises(KeyboardInterrupt):
        run(output=tmp_path, keep=kept.append)
    assert [len(row.tasks) for row in kept[-1].rows] == [3, 0]
    before = len(asked)
    result = run(output=tmp_path)
    # Six texts; the first two caches had answered them all.
    assert [name.split()[0] for name in asked[before:]] == ["k2v2"] * 6
    assert [score.solved for score in result.exact_tasks] == [3, 3, 3]
    for row, lost, gained in zip(result.rows, (1, 3), (1, 0), strict=True):
        assert [score.kind for score in row.tasks] == ["fact", "copy", "chain"]
        assert {(score.trials, score.lost, score.gained) for score in row.tasks} == {
            (4, lost, gained)
        }
    header, rows = quality_report.task_cells(result)
    assert header[:3] == ["scheme", "fact, of 4", "fact, against exact"]
    assert rows[0][:3] == ["exact", "75.0% (30% to 95%)", ""]
    assert rows[2][:3] == ["k2v2", "0.0% (0% to 49%)", "-3 +0, p = 0.25"]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(quality_report.task_table(result))
    page, shown = quality_report.html(result, {}), console.export_text()
    for cell in (cell for row in rows for cell in row if cell):
        assert cell in quality_report.markdown(result)
        assert cell in shown
        assert f"<td>{cell}</td>" in page


def test_without_tasks_there_is_no_table() -> None:
    result = run(items=0)
    assert result.exact_tasks == ()
    assert "Generated tasks" not in quality_report.html(result, {})
    assert "against exact" not in quality_report.markdown(result)


@pytest.mark.usefixtures("few")
def test_tasks_refuse_answers_that_would_be_exact() -> None:
    assert (tasks.MOST_SINK, tasks.MOST_WINDOW) == (16, 144)
    model = tiny_models.build("llama", seed=3)
    options: dict[str, Any] = {"model_name": "", "command": "", "tokens": 400, "items": 3}
    for name in ("k4v4:window=145", "kivi-k4v4:sink=17"):
        with pytest.raises(ValueError, match=f"window up to 144, .* but {name} was given"):
            quality_run.run(model, Bytes(), [name], **options)


def test_the_rule_of_packed_answers_is_the_one_that_search_holds() -> None:
    """A scheme at the limit of what is allowed packs every needle."""
    made = haystack.haystack(Bytes(), "copy", 1000, 8, seed=0)
    chosen = schemes.scheme(f"k4v4:sink={tasks.MOST_SINK},window={tasks.MOST_WINDOW}")
    model = tiny_models.build("llama", seed=3)
    with hosts.MLX_LM.in_place():
        assert len(list(needle.search(model, made, chosen))) == 8
