"""Needles: where they lie, when they count as found, and what a damaged cache makes of them."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from typer.testing import CliRunner

from rotormlx.cli import main
from rotormlx.measure import cache_contents, haystack, needle, schemes
from rotormlx.measure.baselines import SimulatedCache
from rotormlx.measure.haystack import COPY_BEFORE, COPY_TIMES
from rotormlx.measure.needle import Pairs, Share, Trial
from rotormlx.measure.schemes import Scheme
from rotormlx.measure.text import default_text
from tests.support import models as tiny_models
from tests.support.models import Bytes

D = 64
NEEDLES = ("fact", "copy")
VECTORS = np.random.default_rng(2).normal(size=(257, D)).astype(np.float32)


class Recalling:
    """Goes on with what came after the same tokens before, as far as its cache remembers them.

    The keys hold a vector a token; what is read back is taken for the token with the most
    similar vector.
    """

    layers = (None,)

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        new = np.array(tokens[0])
        cache[0].update_and_fetch(*[mx.array(VECTORS[new][None, None])] * 2)
        keys = np.array(cache_contents.decoded(cache[0])[0][0, 0].astype(mx.float32))
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

    block = 64

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


def forgetting(first: int, last: int, **rule: int) -> Scheme:
    rule = {"sink": 0} | rule
    return Scheme("forgetting", lambda layer: SimulatedCache(Forgetting(first, last), 0, **rule))


def stack(kind: str, length: int = 1200, needles: int = 8, seed: int = 0) -> haystack.Haystack:
    return haystack.haystack(Bytes(), kind, length, needles, seed=seed)


# ---- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NEEDLES)
def test_answers_stand_where_they_are_said_to(kind: str) -> None:
    made = stack(kind)
    assert len(made.tokens) == 1200
    assert len(made.questions) == 8
    for question in made.questions:
        said = made.tokens[question.first : question.end]
        assert said[-len(question.answer) :] == question.answer
        # What is read behind the text ends with the answer but its last token.
        before = (*question.tokens, question.answer[-1])[: -len(question.answer)]
        assert (*before, *question.answer[:-1]) == question.tokens
        assert before[-COPY_BEFORE:] == said[-COPY_BEFORE - len(question.answer) :][:COPY_BEFORE]
        assert question.first >= 4
        assert question.end <= 1200 - 128  # before any window
    for earlier, later in itertools.pairwise(made.questions):
        assert earlier.end <= later.first
    depths = [question.first / 1200 for question in made.questions]
    assert depths[0] < 0.25  # a needle stands behind a whole sentence
    assert depths[-1] > 0.7


def test_copies_are_runs_said_three_times_in_prose() -> None:
    made = stack("copy")
    prose = list(made.tokens)
    for question in reversed(made.questions):
        run = (*question.tokens, *question.answer)
        assert (len(question.tokens), len(question.answer)) == (COPY_BEFORE, 1)
        assert made.tokens[question.first : question.end] == run * COPY_TIMES
        assert len(set(run)) == len(run)
        assert bytes(run) not in default_text().encode()
        del prose[question.first : question.end]
    # What is left are whole sentences, one behind the other.
    assert bytes(prose[1:]) in default_text().replace("\n\n", " ").encode() * 2


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
    for kind in haystack.KINDS:
        assert stack(kind, seed=1) == stack(kind, seed=1)
        assert stack(kind, seed=1).tokens != stack(kind, seed=2).tokens


@pytest.mark.parametrize(("kind", "length"), [("fact", 543), ("copy", 735)])
def test_texts_without_room_are_refused(kind: str, length: int) -> None:
    room = haystack.ROOM[kind]
    assert length == 8 * room + 224 - 1
    with pytest.raises(ValueError, match=f"have {room} .* {length} tokens and 8 needles were"):
        stack(kind, length)


def test_no_needle_is_cut_off_by_the_end_of_a_text() -> None:
    """Sentences are of any length, so a text with just enough room may still have too little."""
    made, refused = 0, 0
    for seed in range(40):
        try:
            questions = stack("copy", 736, seed=seed).questions
        except ValueError:
            refused += 1
        else:
            assert len(questions) == 8
            assert questions[-1].end <= 736
            made += 1
    assert made
    assert refused


# ---- trials -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NEEDLES)
def test_a_perfect_memory_finds_all(kind: str) -> None:
    trials = list(needle.search(Recalling(), stack(kind), schemes.scheme("exact")))
    assert [trial.found for trial in trials] == [True] * 8
    assert {(trial.scheme, trial.kind, trial.length) for trial in trials} == {("exact", kind, 1200)}


@pytest.mark.parametrize("kind", NEEDLES)
def test_what_a_cache_loses_is_not_found(kind: str) -> None:
    """Exactly the needles of the lost part are missed, so the cache is what is read."""
    made = stack(kind)
    trials = list(needle.search(Recalling(), made, forgetting(400, 800)))
    for trial, question in zip(trials, made.questions, strict=True):
        assert trial.depth == question.first / 1200
        if question.first >= 400 and question.end <= 800:
            assert not trial.found
        if question.end <= 400 or question.first >= 800:
            assert trial.found
    assert 0 < sum(trial.found for trial in trials) < 8


def test_the_whole_answer_counts() -> None:
    """The right digits but the last are a miss."""

    class Wrong(Recalling):
        def next_token(self, seen: Any) -> int:
            found = super().next_token(seen)
            return found if bytes(seen[-3:].tolist()).isdigit() is False else (found + 1) % 256

    trials = list(needle.search(Wrong(), stack("fact"), schemes.scheme("exact")))
    assert not any(trial.found for trial in trials)


def test_answers_must_lie_in_packed_bytes() -> None:
    made = stack("copy")
    for scheme in (
        Scheme("late", lambda layer: SimulatedCache(Forgetting(0, 0), 0, sink=4, window=700)),
        Scheme("early", lambda layer: SimulatedCache(Forgetting(0, 0), 0, sink=200, window=0)),
        Scheme("never", lambda layer: KVCache()),
    ):
        with pytest.raises(RuntimeError, match=f"must be in packed bytes.* and {scheme.name} "):
            list(needle.search(Recalling(), made, scheme))


def test_the_whole_needle_must_lie_in_packed_bytes() -> None:
    """Of 1,200 tokens, 18 blocks are packed without sink and window: 1,152."""
    made = stack("copy")
    for end in (1152, 1153):
        asked = replace(made, questions=(replace(made.questions[0], first=1101, end=end),))
        search = needle.search(Recalling(), asked, forgetting(0, 0, window=0))
        if end == 1152:
            assert len(list(search)) == 1
        else:
            with pytest.raises(RuntimeError, match="is tokens 1101 to 1153, and forgetting packed"):
                list(search)


def test_every_question_meets_the_text_alone() -> None:
    """What one question leaves in a cache is not there for the next."""
    offsets: list[int] = []

    class Watching(Recalling):
        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            offsets.append(cache[0].offset)
            return super().__call__(tokens, cache)

    assert len(list(needle.search(Watching(), stack("copy"), schemes.scheme("exact")))) == 8
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
    assert [row[header.index("copy, against a")] for row in rows] == ["", "-4 +0, p = 0.12"]
    assert [row[header.index("fact, against b")] for row in rows] == ["-0 +4, p = 0.12", ""]


def test_what_lies_in_one_part_of_a_text_has_no_columns_of_parts() -> None:
    trials = tuple(Trial("a", kind, 10, depth, True) for kind, depth in (
        ("chain", 0.1), ("chain", 0.1), ("fact", 0.1), ("fact", 0.5),
    ))  # fmt: skip
    header, _ = needle.cells(needle.Result("", "", "", "", {}, trials))
    assert [name for name in header if "depth" in name] == [
        "fact, depth 0-20 %", "fact, depth 40-60 %",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    # Twice the sum of C(n, i) / 2^n for i up to the smaller of the two, at most 1.
    [(0, 0, 1), (3, 3, 1), (5, 0, 2 / 32), (1, 7, 2 * (1 + 8) / 256)],
)
def test_pairs_have_mcnemars_exact_p(lost: int, gained: int, p: float) -> None:
    assert Pairs(lost, gained).p == pytest.approx(p, rel=1e-12)


def test_pairs_are_of_the_same_needles() -> None:
    """Shares alone would call these two schemes equal."""
    found = {"a": (True, True, False, False), "b": (False, True, True, False)}
    trials = tuple(
        Trial(scheme, "fact", 10, depth / 10, one)
        for scheme, all_found in found.items()
        for depth, one in enumerate(all_found)
    )
    result = needle.Result("", "", "", "", {}, trials)
    assert result.share(scheme="a") == result.share(scheme="b")
    assert result.pairs("a", "b") == Pairs(lost=1, gained=1)
    assert result.pairs("a", "b", part=0) == Pairs(lost=1, gained=0)


# ---- a run --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_models.save(tmp_path / "model", "llama")
    argv = ["needle", path, "--schemes", "k2v2", "--lengths", "400,600", "--trials", "5"]
    argv += ["--needles", "3", "--kinds", "fact,copy", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["rotormlx", *argv])
    done = CliRunner().invoke(main.app, argv)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "needle.json").read_text())
    # 5 over two lengths are 3 of each. Facts: 3 needles a text; a text of 400 tokens has room for
    # 2 copies, so two such texts are read.
    trials = Counter((t["scheme"], t["kind"], t["length"]) for t in found["trials"])
    expected = {("fact", 400): 3, ("fact", 600): 3, ("copy", 400): 4, ("copy", 600): 3}
    assert trials == {(s, *key): n for s in ("exact", "k2v2") for key, n in expected.items()}
    # A model with random weights finds nothing.
    assert not any(trial["found"] for trial in found["trials"])
    page = (tmp_path / "out" / "needle.md").read_text()
    assert "13 per scheme" in page
    assert "| copy, 600 tokens | 0.0% (0% to 56%) | 0.0% (0% to 56%) |" in page


@pytest.mark.parametrize(
    ("trials", "needles", "kinds"), [(0, 5, ("fact",)), (9, 99, ("fact",)), (9, 5, ("hay",))]
)
def test_run_refuses(trials: int, needles: int, kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"but {kinds[0]}, {trials} and {needles} were given"):
        needle.run(
            None, None, [], model_name="", command="", trials=trials, needles=needles, kinds=kinds
        )


@pytest.mark.slow
def test_a_run_computes_in_float32_on_a_cpu_and_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.build("llama")
    model.set_dtype(mx.bfloat16)
    before = tree_flatten(model.parameters())
    seen: set[mx.Dtype] = set()

    def search(model: Any, *_: Any) -> list[Trial]:
        seen.update(value.dtype for _, value in tree_flatten(model.parameters()))
        raise KeyboardInterrupt

    monkeypatch.setattr(needle, "search", search)
    for device, dtype in ((mx.Device(mx.cpu), mx.float32), (mx.Device(mx.gpu), mx.bfloat16)):
        seen.clear()
        monkeypatch.setattr(mx, "default_device", lambda device=device: device)
        with pytest.raises(KeyboardInterrupt):
            needle.run(model, Bytes(), [], model_name="", command="", needles=1)
        assert seen == {dtype}
        after = tree_flatten(model.parameters())
        assert [name for name, _ in after] == [name for name, _ in before]
        assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
