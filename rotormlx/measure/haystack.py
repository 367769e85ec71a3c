"""Generated tasks that are scored exactly: texts, and questions with one right answer.

There are three kinds of task; the first two are needles in prose.

- A **fact** is a sentence ("The secret number of Oslo is 4829."). A question after the text asks
  for it: the model must recall a value by its key.
- A **copy** is a run of 17 random tokens that the text repeats three times in a row. Given the
  first 16 again, the model must continue with the last.
- A **chain** is a question of two sums ("Q: 2 + 5 + 3", "A: 2 + 5 = 7, 7 + 3 = 10") after a text of
  worked examples, which show the model what to write.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rotormlx.measure.free_running import common_start
from rotormlx.measure.text import default_text

KINDS = ("fact", "copy", "chain")
COPY_BEFORE, COPY_TIMES = 16, 3
CHAIN_STEPS = 2
# Tokens of a text per needle, and the tokens without needles: a start, and an end that is longer
# than a window. A text of chains holds examples only.
ROOM = {"fact": 40, "copy": 64, "chain": 1}
START, END = 16, 208
# Names with different beginnings, so that a model can tell them apart.
PLACES = (
    "Oslo", "Cairo", "Lima", "Tokyo", "Paris", "Boston", "Dublin", "Madrid", "Naples", "Quito",
    "Sydney", "Vienna", "Warsaw", "Zurich", "Athens", "Berlin", "Havana", "Jakarta", "Kyoto",
    "Lagos", "Manila", "Nairobi", "Prague", "Riga", "Seoul", "Tunis", "Utrecht", "Venice",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A needle and the question about it.

    Args:
        first: First token of the needle in the text.
        end: Token after the needle and its answer.
        tokens: Tokens to read after the text: the question, and the answer without its last token.
        answer: Tokens of the right answer.
    """

    first: int
    end: int
    tokens: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Haystack:
    """A text with needles.

    Args:
        kind: One of ``KINDS``.
        tokens: The tokens of the text.
        questions: One question per needle.
    """

    kind: str
    tokens: tuple[int, ...]
    questions: tuple[Question, ...]


def texts_for(
    tokenizer: Any,
    kinds: Sequence[str],
    lengths: Sequence[int],
    trials: int,
    needles: int,
    *,
    seed: int = 0,
) -> list[Haystack]:
    """Return texts with at least ``trials`` questions of each kind over all lengths.

    Args:
        tokenizer: The tokenizer of the model.
        kinds: Kinds of task, from ``KINDS``.
        lengths: Lengths of the texts in tokens.
        trials: Minimum number of questions of each kind.
        needles: Maximum number of questions per text; a short text has room for fewer.
        seed: Seed of the texts.
    """
    stacks: list[Haystack] = []
    for kind in kinds:
        for length in lengths:
            each_text = min(needles, max(_room(length) // ROOM[kind], 1))
            count = -(-trials // (each_text * len(lengths)))
            stacks += [
                haystack(tokenizer, kind, length, each_text, seed=seed + number)
                for number in range(count)
            ]
    return stacks


def haystack(tokenizer: Any, kind: str, length: int, needles: int, *, seed: int) -> Haystack:
    """Return a text of ``length`` tokens with needles at even distances.

    Args:
        tokenizer: The tokenizer of the model.
        kind: One of ``KINDS``.
        length: Length of the text in tokens.
        needles: Number of needles.
        seed: Seed of the text, the answers and the names.

    Raises:
        ValueError: If the text has no room for the needles.
    """
    rng = np.random.default_rng([seed, length, KINDS.index(kind)])
    if kind == "chain":
        return _chains(tokenizer, length, needles, rng)
    sentences = [_ids(tokenizer, f" {sentence}") for sentence in _sentences()]
    following = int(rng.integers(len(sentences)))
    places = [str(place) for place in rng.permutation(PLACES)]
    vocabulary = np.array(sorted({token for sentence in sentences for token in sentence}))
    tokens: list[int] = []
    questions: list[Question] = []
    distance = _room(length) // needles
    while len(tokens) < length and distance >= ROOM[kind]:
        if len(questions) < needles and len(tokens) >= START + len(questions) * distance:
            if kind == "fact":
                digits = "".join(map(str, rng.integers(10, size=4)))
                said, asked, answer = _fact(tokenizer, places[len(questions)], digits)
                stop = _ids(tokenizer, ".")
            else:
                run = [int(t) for t in rng.choice(vocabulary, COPY_BEFORE + 1, replace=False)]
                said, asked, answer, stop = run * COPY_TIMES, run[:-1], run[-1:], []
            end = len(tokens) + len(said)
            questions.append(Question(len(tokens), end, (*asked, *answer[:-1]), tuple(answer)))
            tokens += [*said, *stop]
        else:
            tokens += sentences[following % len(sentences)]
            following += 1
    if len(questions) < needles or questions[-1].end > length:
        raise ValueError(
            f"[needle] A text must have {ROOM[kind]} tokens per needle and {START + END} more, but "
            f"{length} tokens and {needles} needles were given, and not all fit; use longer texts "
            "or fewer needles."
        )
    return Haystack(kind, tuple(tokens[:length]), tuple(questions))


def _chains(tokenizer: Any, length: int, questions: int, rng: np.random.Generator) -> Haystack:
    """Return a text of worked examples, and questions that are not among the examples."""
    if length < START + END + ROOM["chain"]:
        raise ValueError(
            f"[needle] A text of chains must have at least {START + END + ROOM['chain']} tokens, "
            f"but {length} were given; use longer texts."
        )
    asked: dict[str, str] = {}
    while len(asked) < questions:
        asked |= [_chain(rng)]
    made = []
    for question, answer in asked.items():
        whole = _ids(tokenizer, question + answer)
        start = common_start(_ids(tokenizer, question), whole)
        made.append(Question(START, length - END, tuple(whole[:-1]), tuple(whole[start:])))
    tokens: list[int] = []
    while len(tokens) < length:
        question, answer = _chain(rng)
        if question not in asked:
            tokens += _ids(tokenizer, question + answer)
    return Haystack("chain", tuple(tokens[-length:]), tuple(made))


def _chain(rng: np.random.Generator) -> tuple[str, str]:
    """Return a sum of three numbers up to 5 as a question, and its answer step by step."""
    value = int(rng.integers(6))
    asked, steps = str(value), []
    for _ in range(CHAIN_STEPS):
        more = int(rng.integers(1, 6))
        steps.append(f"{value} + {more} = {value + more}")
        asked, value = f"{asked} + {more}", value + more
    return f"Q: {asked}\nA: ", f"{', '.join(steps)}\n"


def _fact(tokenizer: Any, place: str, digits: str) -> tuple[list[int], list[int], list[int]]:
    """Return the sentence of the text without its full stop, the question, and the answer."""
    fact = f"The secret number of {place} is"
    before = _ids(tokenizer, f" {fact}")
    said = _ids(tokenizer, f" {fact} {digits}")
    question = f"\n\nQuestion: What is the secret number of {place}?\nAnswer: {fact}"
    return said, _ids(tokenizer, question), said[len(before) :]


def _sentences() -> list[str]:
    return re.split(r"(?<=\.) ", default_text().replace("\n\n", " "))


def _room(length: int) -> int:
    """Return the number of tokens of a text among which needles may begin."""
    return length - START - END


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
