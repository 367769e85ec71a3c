"""The generated tasks of ``rotormlx quality``: questions solved, compared with the exact cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rotormlx.measure import needle, unfinished
from rotormlx.measure.haystack import END, START, Haystack
from rotormlx.measure.intervals import Interval
from rotormlx.measure.needle import Pairs, Share
from rotormlx.measure.schemes import Scheme

LENGTH = 1024  # tokens of a text
QUESTIONS = 20  # maximum number per text
# The largest sink and window with which all answers are in packed bytes; the window leaves room for
# a block that is not full yet.
MOST_SINK, MOST_WINDOW = START, END - 64

# By kind of task, whether each question was solved.
Solved = dict[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class Score:
    """The number of questions of one kind that were solved through a scheme.

    Args:
        kind: Kind of task.
        solved: Number of questions solved.
        trials: Number of questions asked.
        interval: Wilson interval of the share at 95 %.
        lost: Number of questions that only the exact cache solved.
        gained: Number of questions that only this scheme solved.
        p: The p value of McNemar's exact test of ``lost`` and ``gained``, two-sided.
    """

    kind: str
    solved: int
    trials: int
    interval: Interval
    lost: int
    gained: int
    p: float

    def __str__(self) -> str:
        return str(Share(self.solved, self.trials))

    @property
    def against_exact(self) -> str:
        """Questions lost and gained, and the p value, as text."""
        return str(Pairs(self.lost, self.gained))


def solved(
    model: Any,
    stacks: Sequence[Haystack],
    chosen: Scheme,
    folder: Path,
    advance: Callable[[], None],
) -> Solved:
    """Ask all questions through a scheme, or read the stored answers of an earlier run.

    Args:
        model: The model; the hook must be installed.
        stacks: Texts and questions.
        chosen: The scheme.
        folder: The folder that stores the answers.
        advance: Called after each question.

    Raises:
        RuntimeError: If an answer is not in packed bytes.
    """
    path = folder / f"{unfinished.of_scheme(chosen, model)}.npz"
    found = unfinished.read(path)
    if found is not None:
        for _ in range(sum(len(stack.questions) for stack in stacks)):
            advance()
        return found[0]
    trials = [trial for stack in stacks for trial in needle.search(model, stack, chosen, advance)]
    kinds = dict.fromkeys(trial.kind for trial in trials)
    made = {
        kind: np.array([trial.found for trial in trials if trial.kind == kind]) for kind in kinds
    }
    folder.mkdir(exist_ok=True)
    unfinished.write(path, made, {})
    return made


def scores(exact: Solved, other: Solved) -> tuple[Score, ...]:
    """Compare the answers through a scheme with those through the exact cache."""
    out = []
    for kind, answers in other.items():
        share = Share(int(answers.sum()), len(answers))
        lost, gained = (exact[kind] & ~answers).sum(), (answers & ~exact[kind]).sum()
        pairs = Pairs(int(lost), int(gained))
        score = Score(
            kind=kind,
            solved=share.found,
            trials=share.trials,
            interval=share.interval,
            lost=pairs.lost,
            gained=pairs.gained,
            p=pairs.p,
        )
        out.append(score)
    return tuple(out)
