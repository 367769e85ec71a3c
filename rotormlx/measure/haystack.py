"""Generated tasks that are scored exactly: texts, and questions with one right answer.

Two kinds of needle in prose. A **fact** is a sentence ("The secret number of Oslo is 4829.") that a
question behind the text asks for: recall of a value by its key. A **copy** is a run of 17 random
tokens, said three times on end: given the first 16 again, the model has to go on with the last.
The third kind is a **chain** of two sums ("Q: 2 + 5 + 3", "A: 2 + 5 = 7, 7 + 3 = 10") behind a
text of such chains, worked out: the model learns from them what to write.
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
# Tokens of a text for each needle, and those that hold none: a start, and more than a window.
# Of chains a text holds examples only.
ROOM = {"fact": 40, "copy": 64, "chain": 1}
START, END = 16, 208
# Names that do not begin alike, so that a model can tell them apart.
PLACES = (
    "Oslo", "Cairo", "Lima", "Tokyo", "Paris", "Boston", "Dublin", "Madrid", "Naples", "Quito",
    "Sydney", "Vienna", "Warsaw", "Zurich", "Athens", "Berlin", "Havana", "Jakarta", "Kyoto",
    "Lagos", "Manila", "Nairobi", "Prague", "Riga", "Seoul", "Tunis", "Utrecht", "Venice",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One needle and how it is asked for.

    Args:
        first: Where the needle begins in the text, in tokens.
        end: Where it ends, with its answer.
        tokens: What is read behind the text: the question, and the answer but its last token.
        answer: The tokens that must come.
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
        tokens: The text.
        questions: One a needle.
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
    """Texts with at least ``trials`` questions of each kind over all lengths.

    Args:
        tokenizer: Of the model.
        kinds: Of ``KINDS``.
        lengths: Tokens of the texts.
        trials: Least number of questions of each kind.
        needles: Most questions of one text; a short one has room for fewer.
        seed: Selects the texts.
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
    """A text of ``length`` tokens with needles at even distances.

    Args:
        tokenizer: Of the model.
        kind: One of ``KINDS``.
        length: Tokens.
        needles: How many.
        seed: Selects the text, the answers and who is asked for.

    Raises:
        ValueError: If the text has no room for them.
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
            f"{length} tokens and {needles} needles came, and not all fit; take longer texts or "
            "fewer needles."
        )
    return Haystack(kind, tuple(tokens[:length]), tuple(questions))


def _chains(tokenizer: Any, length: int, questions: int, rng: np.random.Generator) -> Haystack:
    """A text of worked examples, and questions of which none is among them."""
    if length < START + END + ROOM["chain"]:
        raise ValueError(
            f"[needle] A text of chains must have at least {START + END + ROOM['chain']} tokens, "
            f"but {length} came; take longer texts."
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
    """A sum of three numbers up to 5, worked out step by step."""
    value = int(rng.integers(6))
    asked, steps = str(value), []
    for _ in range(CHAIN_STEPS):
        more = int(rng.integers(1, 6))
        steps.append(f"{value} + {more} = {value + more}")
        asked, value = f"{asked} + {more}", value + more
    return f"Q: {asked}\nA: ", f"{', '.join(steps)}\n"


def _fact(tokenizer: Any, place: str, digits: str) -> tuple[list[int], list[int], list[int]]:
    """What the text says but its full stop, what is asked, and the answer."""
    fact = f"The secret number of {place} is"
    before = _ids(tokenizer, f" {fact}")
    said = _ids(tokenizer, f" {fact} {digits}")
    question = f"\n\nQuestion: What is the secret number of {place}?\nAnswer: {fact}"
    return said, _ids(tokenizer, question), said[len(before) :]


def _sentences() -> list[str]:
    return re.split(r"(?<=\.) ", default_text().replace("\n\n", " "))


def _room(length: int) -> int:
    """Tokens of a text among which needles may begin."""
    return length - START - END


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))
