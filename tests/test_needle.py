"""Needles: where they lie, when they count as found, and what a damaged cache makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.models.cache import KVCache
from typer.testing import CliRunner

from rotormlx import cli, needle, rivals
from rotormlx.needle import COPY_BEFORE, Share, Trial
from rotormlx.rivals import Scheme, SimulatedCache

D = 64
VECTORS = np.random.default_rng(2).normal(size=(257, D)).astype(np.float32)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


class Recalling:
    """Goes on with what came after the same tokens before, as far as its cache remembers them.

    The keys hold a vector a token; what is read back is taken for the token with the most
    similar vector.
    """

    layers = (None,)

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        new = np.array(tokens[0])
        cache[0].update_and_fetch(*[mx.array(VECTORS[new][None, None])] * 2)
        keys = np.array(rivals.decoded(cache[0])[0][0, 0].astype(mx.float32))
        history = (keys @ VECTORS.T).argmax(-1)
        history[len(history) - len(new) :] = new
        logits = np.zeros((1, len(new), 257), np.float32)
        # Only the last rows of a question count; a chunk of a text has more tokens than that.
        for row in range(len(new) - 8 if len(new) < 100 else len(new), len(new)):
            here = len(history) - len(new) + row
            logits[0, row, self.next_token(history[: here + 1])] = 1
        return mx.array(logits)

    def next_token(self, seen: Any) -> int:
        for length in range(COPY_BEFORE, 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(seen[:-1], length)
            places = np.flatnonzero((windows == seen[-length:]).all(-1))
            if len(places):
                return int(seen[places[-1] + length])
        return 0


class Forgetting:
    """A codec that loses the tokens of one part of a text."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.seen = first, last, 0

    def decoded(self, x: Any, *, layer: int, role: str) -> Any:
        if role == "value":
            return x
        place = np.arange(self.seen, self.seen + x.shape[2])
        self.seen += x.shape[2]
        lost = (place >= self.first) & (place < self.last)
        return np.where(lost[:, None], VECTORS[0], x)

    def bits_per_value(self, head_dim: int, role: str) -> float:
        return 4.0


def forgetting(first: int, last: int) -> Scheme:
    return Scheme("forgetting", lambda layer: SimulatedCache(Forgetting(first, last), 0, sink=0))


def stack(kind: str, length: int = 1200, needles: int = 8, seed: int = 0) -> needle.Haystack:
    return needle.haystack(Bytes(), kind, length, needles, seed=seed)


# ---- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", needle.KINDS)
def test_answers_stand_where_they_are_said_to(kind: str) -> None:
    made = stack(kind)
    assert len(made.tokens) == 1200
    assert len(made.questions) == 8
    for question in made.questions:
        end = question.position + len(question.answer)
        assert made.tokens[question.position : end] == question.answer
        # What is read behind the text ends with the answer but its last token.
        assert question.tokens[-len(question.answer) + 1 :] == question.answer[:-1]
        before = question.tokens[: len(question.tokens) - len(question.answer) + 1]
        assert before[-8:] == made.tokens[question.position - 8 : question.position]
        assert question.position >= 4
        assert end <= 1200 - 128  # before any window
    depths = [question.position / 1200 for question in made.questions]
    assert depths == sorted(depths)
    assert depths[0] < 0.25  # a needle stands behind a whole sentence
    assert depths[-1] > 0.7


def test_facts_read_like_facts() -> None:
    made = stack("fact")
    text = bytes(made.tokens).decode()
    for question in made.questions:
        asked = bytes(question.tokens).decode()
        answer = bytes(question.answer).decode()
        fact = asked.partition("Answer: ")[2] + answer[-1]
        assert fact.startswith("The secret number of ")
        assert f" {fact}." in text
        assert answer.strip().isdigit()
        # No needle is asked for by another's name, and the answer is nowhere else.
        assert text.count(fact.removesuffix(answer)) == 1
        assert text.count(answer) == 1


def test_texts_differ_by_seed_and_are_the_same_again() -> None:
    for kind in needle.KINDS:
        assert stack(kind, seed=1) == stack(kind, seed=1)
        assert stack(kind, seed=1).tokens != stack(kind, seed=2).tokens


@pytest.mark.parametrize(("kind", "length"), [("fact", 500), ("copy", 300)])
def test_texts_without_room_are_refused(kind: str, length: int) -> None:
    with pytest.raises(ValueError, match=f"but {length} tokens and 8 needles came"):
        stack(kind, length)


# ---- trials -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", needle.KINDS)
def test_a_perfect_memory_finds_all(kind: str) -> None:
    trials = list(needle.search(Recalling(), stack(kind), rivals.scheme("exact")))
    assert [trial.found for trial in trials] == [True] * 8
    assert {(trial.scheme, trial.kind, trial.length) for trial in trials} == {("exact", kind, 1200)}


@pytest.mark.parametrize("kind", needle.KINDS)
def test_what_a_cache_loses_is_not_found(kind: str) -> None:
    """Exactly the needles of the lost part are missed, so the cache is what is read."""
    made = stack(kind)
    trials = list(needle.search(Recalling(), made, forgetting(400, 800)))
    for trial, question in zip(trials, made.questions, strict=True):
        assert trial.depth == question.position / 1200
        if 430 <= question.position < 770:
            assert not trial.found
        if question.position < 370 or question.position >= 850:
            assert trial.found
    assert 0 < sum(trial.found for trial in trials) < 8


def test_the_whole_answer_counts() -> None:
    """The right digits but the last are a miss."""

    class Wrong(Recalling):
        def next_token(self, seen: Any) -> int:
            found = super().next_token(seen)
            return found if bytes(seen[-3:].tolist()).isdigit() is False else (found + 1) % 256

    trials = list(needle.search(Wrong(), stack("fact"), rivals.scheme("exact")))
    assert not any(trial.found for trial in trials)


def test_answers_must_lie_in_packed_bytes() -> None:
    made = stack("copy")
    for scheme in (
        Scheme("late", lambda layer: SimulatedCache(Forgetting(0, 0), 0, sink=4, window=700)),
        Scheme("early", lambda layer: SimulatedCache(Forgetting(0, 0), 0, sink=64, window=0)),
        Scheme("never", lambda layer: KVCache()),
    ):
        with pytest.raises(RuntimeError, match=f"must lie in packed bytes.* and {scheme.name} "):
            list(needle.search(Recalling(), made, scheme))


def test_every_question_meets_the_text_alone() -> None:
    """What one question leaves in a cache is not there for the next."""
    offsets: list[int] = []

    class Watching(Recalling):
        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            offsets.append(cache[0].offset)
            return super().__call__(tokens, cache)

    assert len(list(needle.search(Watching(), stack("copy"), rivals.scheme("exact")))) == 8
    assert offsets == [0, 256, 512, 768, 1024] + [1200] * 8


# ---- shares -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "trials", "interval"),
    # Wilson: (k + z²/2 ± z sqrt(k (n - k) / n + z²/4)) / (n + z²) with z = 1.95996.
    [(9, 9, (0.7009, 1)), (0, 10, (0, 0.2775)), (150, 200, (0.6857, 0.8050))],
)
def test_share_has_the_wilson_interval(
    found: int, trials: int, interval: tuple[float, float]
) -> None:
    assert Share(found, trials).interval == pytest.approx(interval, abs=1e-4)


def test_shares_are_of_the_trials_asked_for() -> None:
    trials = tuple(
        Trial(scheme, kind, length, depth, scheme == "a" and depth < 0.5)
        for scheme in ("a", "b")
        for kind in ("fact", "copy")
        for length in (10, 20)
        for depth in (0.1, 0.3, 0.99, 1.0)
    )
    result = needle.Result("", "", "", "", {}, trials)
    assert result.schemes == ["a", "b"]
    assert result.share(scheme="a") == Share(8, 16)
    assert result.share(scheme="a", kind="fact", length=10) == Share(2, 4)
    assert result.share(scheme="a", part=1) == Share(4, 4)
    assert result.share(scheme="a", part=4) == Share(0, 8)
    assert result.share(scheme="a", part=2) == Share(0, 0)
    header, rows = needle.cells(result)
    assert rows[0][header.index("fact, 20 tokens")] == "50.0% (15% to 85%)"
    assert rows[1][header.index("copy, depth 0-20 %")] == "0.0% (0% to 66%)"


# ---- a run --------------------------------------------------------------------------------------


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.save(tmp_path / "model", "llama")
    argv = ["needle", path, "--schemes", "k2v2", "--lengths", "400,600", "--trials", "5"]
    argv += ["--needles", "3", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["rotormlx", *argv])
    done = CliRunner().invoke(cli.app, argv)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "needle.json").read_text())
    # 2 schemes, 2 kinds, and a text of 3 needles of each length: 6 are at least 5.
    assert len(found["trials"]) == 2 * 2 * 6
    assert {trial["scheme"] for trial in found["trials"]} == {"exact", "k2v2"}
    # A model with random weights finds nothing.
    assert not any(trial["found"] for trial in found["trials"])
    page = (tmp_path / "out" / "needle.md").read_text()
    assert "12 a scheme" in page
    assert "| copy, 600 tokens | 0.0% (0% to 56%) | 0.0% (0% to 56%) |" in page


@pytest.mark.parametrize(
    ("trials", "needles", "kinds"), [(0, 5, ("fact",)), (9, 99, ("fact",)), (9, 5, ("hay",))]
)
def test_run_refuses(trials: int, needles: int, kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"but {kinds[0]}, {trials} and {needles} came"):
        needle.run(
            None, None, [], model_name="", command="", trials=trials, needles=needles, kinds=kinds
        )
