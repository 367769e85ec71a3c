"""Scoring through a cache, and the numbers made of the scores."""

from __future__ import annotations

import io
import math
import re
import shlex
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.nn.layers.linear import Linear
from mlx_lm.models.cache import CacheList, KVCache, QuantizedKVCache
from rich.console import Console
from rich.progress import Progress, TaskID
from typer.testing import CliRunner

from rotormlx.cli import demo, demo_long, main
from rotormlx.config import RotorConfig
from rotormlx.measure import haystack, needle, scoring
from rotormlx.measure.text import default_text
from rotormlx.mlx import integration
from tests.support import models as tiny_models

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, tiny_models.VOCABULARY, 301)]


class NoisyCache(KVCache):
    """A cache that gives back keys and values with an error of ``noise`` times their rms."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        damaged = []
        for seed, x in enumerate((keys, values)):
            rms = mx.sqrt(mx.mean(x * x))
            error = mx.random.normal(x.shape, key=mx.random.key(seed))
            damaged.append(x + self.noise * rms * error)
        fetched: tuple[mx.array, mx.array] = super().update_and_fetch(*damaged)
        return fetched


class PackingCache(KVCache):
    """Claims that all but the last ``window`` tokens are packed."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    @property
    def packed_tokens(self) -> int:
        return max(0, self.offset - self.window)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.build("llama", seed=3)


def exact_caches(model: Any) -> list[KVCache]:
    return [KVCache() for _ in model.layers]


def scores_of(logits: np.ndarray, targets: np.ndarray) -> scoring.Scores:
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return scoring.Scores(log_probs.astype(np.float32), targets, np.zeros(len(targets), np.int64))


def random_scores(seed: int, rows: int = 150, vocabulary: int = 37) -> scoring.Scores:
    rng = np.random.default_rng(seed)
    targets = np.random.default_rng(0).integers(0, vocabulary, rows)
    return scores_of(rng.normal(size=(rows, vocabulary)) * 3, targets)


# ---- compare ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 70])
def test_compare_against_sums_in_float64(start: int) -> None:
    reference = random_scores(1)
    noise = np.random.default_rng(2).normal(size=reference.log_probs.shape)
    other = scores_of(reference.log_probs + noise, reference.targets)
    divergences, same, likelihoods = [], 0, []
    for row in range(start, 150):
        p = np.exp(reference.log_probs[row].astype(np.float64))
        q = np.exp(other.log_probs[row].astype(np.float64))
        divergences.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
        same += p.argmax() == q.argmax()
        likelihoods.append(np.log(q[other.targets[row]]))

    result = scoring.compare(reference, other, start=start)
    # Both sides are float64 sums of the same float32 numbers.
    np.testing.assert_allclose(result.kl_mean, np.mean(divergences), rtol=1e-9)
    np.testing.assert_allclose(result.kl_median, np.median(divergences), rtol=1e-9)
    np.testing.assert_allclose(
        result.kl_p99, np.sort(divergences)[math.ceil(0.99 * (149 - start))], rtol=1e-9
    )
    # Fewer than a thousand: 99.9 % of them are all.
    np.testing.assert_allclose(result.kl_p999, max(divergences), rtol=1e-9)
    np.testing.assert_allclose(result.ppl, np.exp(-np.mean(likelihoods)), rtol=1e-9)
    assert 0 < result.top1 == same / (150 - start) < 1
    assert result.predictions == 150 - start


def test_compare_known_by_hand() -> None:
    targets = np.array([0, 1])
    fair = scores_of(np.log([[0.5, 0.5], [0.5, 0.5]]), targets)
    biased = scores_of(np.log([[0.25, 0.75], [0.5, 0.5]]), targets)
    result = scoring.compare(fair, biased)
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75) and 0; float32 logarithms.
    assert result.kl_mean == pytest.approx(0.5 * np.log(4 / 3) / 2, rel=1e-6)
    assert result.ppl == pytest.approx(8**0.5, rel=1e-6)
    # In the other direction it is another number.
    backward = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    assert scoring.compare(biased, fair).kl_mean == pytest.approx(backward / 2, rel=1e-6)


def test_compare_with_itself_is_perfect() -> None:
    scores = random_scores(1)
    result = scoring.compare(scores, scores)
    assert (result.kl_mean, result.kl_p99, result.top1) == (0, 0, 1)


def test_compare_impossible_tokens() -> None:
    targets = np.array([0])
    zeros = np.zeros(1, np.int64)
    p = scoring.Scores(np.array([[0, -np.inf]], np.float32), targets, zeros)
    q = scoring.Scores(np.log(np.array([[0.5, 0.5]], np.float32)), targets, zeros)
    assert scoring.compare(p, p).kl_mean == 0
    assert scoring.compare(p, q).kl_mean == pytest.approx(np.log(2), rel=1e-6)
    assert scoring.compare(q, p).kl_mean == np.inf


def test_compare_refuses_different_texts() -> None:
    scores = random_scores(1)
    other = scoring.Scores(scores.log_probs, scores.targets[::-1], scores.packed_tokens)
    with pytest.raises(ValueError, match="same text and vocabulary"):
        scoring.compare(scores, other)
    with pytest.raises(ValueError, match=r"\(150, 37\) and \(150, 36\)"):
        scoring.compare(scores, random_scores(1, vocabulary=36))


@pytest.mark.parametrize("start", [-1, 150])
def test_compare_refuses_an_empty_range(start: int) -> None:
    with pytest.raises(ValueError, match="start must be from 0 to 149"):
        scoring.compare(random_scores(1), random_scores(2), start=start)


# ---- score --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 37, 64, 1000])
def test_score_is_the_model_without_cache(model: Any, chunk: int) -> None:
    tokens = TOKENS[:150]
    logits = np.array(model(mx.array([tokens]))[0, :-1], np.float64)
    expected = scores_of(logits, np.array(tokens[1:]))
    scores = scoring.score(model, tokens, exact_caches(model), chunk=chunk)
    # float32 sums of 64 to 300 terms in another order.
    np.testing.assert_allclose(scores.log_probs, expected.log_probs, atol=2e-5)
    np.testing.assert_array_equal(scores.targets, expected.targets)
    assert scores.perplexity() == pytest.approx(expected.perplexity(), rel=1e-5)


@pytest.mark.parametrize("chunk", [37, 64])
def test_chunks_are_the_score_piece_by_piece(model: Any, chunk: int) -> None:
    whole = scoring.score(model, TOKENS, exact_caches(model), chunk=chunk)
    starts = []
    for start, rows, packed in scoring.chunks(model, TOKENS, exact_caches(model), chunk=chunk):
        starts.append(start)
        np.testing.assert_array_equal(rows, whole.log_probs[start : start + chunk])
        assert packed == 0
    assert starts == list(range(0, 300, chunk))


def test_score_fills_the_cache_and_reports_progress(model: Any) -> None:
    caches = exact_caches(model)
    steps: list[int] = []
    scoring.score(model, TOKENS[:151], caches, chunk=64, progress=steps.append)
    assert steps == [64, 64, 22]
    assert [cache.offset for cache in caches] == [150, 150]


def test_score_sees_damage(model: Any) -> None:
    exact = scoring.score(model, TOKENS, exact_caches(model))
    divergences = []
    for noise in (0.0, 0.02, 0.2, 1.0):
        caches = [NoisyCache(noise) for _ in model.layers]
        divergences.append(scoring.compare(exact, scoring.score(model, TOKENS, caches)).kl_mean)
    assert divergences[0] == 0
    # The divergence grows with the square of a small error; a factor of 5 leaves room.
    assert divergences[3] > 5 * divergences[2] > 25 * divergences[1] > 0


def test_score_sees_quantization(model: Any) -> None:
    exact = scoring.score(model, TOKENS, exact_caches(model))
    divergences = []
    for bits in (8, 4, 2):
        caches = [QuantizedKVCache(64, bits) for _ in model.layers]
        divergences.append(scoring.compare(exact, scoring.score(model, TOKENS, caches)).kl_mean)
    assert 0 < divergences[0] < divergences[1] < divergences[2]


@pytest.mark.parametrize(("count", "chunk"), [(1, 64), (0, 64), (9, 0)])
def test_score_refuses_nothing_to_predict(model: Any, count: int, chunk: int) -> None:
    with pytest.raises(ValueError, match=f"{count} tokens and chunk={chunk} were given"):
        scoring.score(model, TOKENS[:count], exact_caches(model), chunk=chunk)


# ---- one by one, and greedily -------------------------------------------------------------------


def test_differences_of_several_texts_are_those_of_one() -> None:
    reference, other = random_scores(1), random_scores(2)
    whole = scoring.differences(reference, other)
    parts = [
        scoring.Differences(whole.kl[part], whole.same[part], whole.log_likelihoods[part])
        for part in (slice(0, 40), slice(40, None))
    ]
    joined = scoring.Differences.joined(parts)
    assert joined.quality == whole.quality == scoring.compare(reference, other)
    assert joined.quality != parts[1].quality
    for name in ("kl", "same", "log_likelihoods"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))


# ---- packed tokens ------------------------------------------------------------------------------


def test_score_counts_packed_tokens_of_rotormlx(model: Any) -> None:
    caches = integration.make_prompt_cache(model, RotorConfig())
    try:
        scores = scoring.score(model, TOKENS, caches)
    finally:
        integration.remove(model)
    # 4 exact tokens and a window of 64 to 127, counted before each chunk.
    expected = np.repeat([0, 0, 0, 64, 128], 64)[:300]
    np.testing.assert_array_equal(scores.packed_tokens, expected)
    scoring.assert_packed(caches, 192)
    with pytest.raises(RuntimeError, match="at least 193 tokens as packed bytes, but only 192"):
        scoring.assert_packed(caches, 193)


def test_assert_packed_refuses_an_exact_cache(model: Any) -> None:
    caches = exact_caches(model)
    scores = scoring.score(model, TOKENS, caches)
    assert not scores.packed_tokens.any()
    with pytest.raises(RuntimeError, match="at least 1 tokens as packed bytes, but only 0"):
        scoring.assert_packed(caches, 0)


def test_packed_of_is_the_worst_layer() -> None:
    caches = [PackingCache(window) for window in (10, 30, 20)]
    quantized = QuantizedKVCache()
    for cache in caches:
        cache.offset = 100
    quantized.offset = 75
    assert scoring.packed_of(caches) == 70
    assert scoring.packed_of([KVCache(), *caches[::2]]) == 80  # exact layers do not count
    assert scoring.packed_of([CacheList(KVCache(), caches[2]), quantized]) == 75
    assert scoring.packed_of([KVCache()]) == 0


# ---- the text -----------------------------------------------------------------------------------


def test_default_text_is_prose() -> None:
    text = default_text()
    paragraphs = text.split("\n\n")
    assert len(text) > 35_000
    assert text.startswith("Every object has an identity, a type and a value.")
    assert len(set(paragraphs)) == len(paragraphs)
    assert not set("=`{}|\\<>#@_") & set(text)
    letters = sum(c.isalpha() or c.isspace() for c in text)
    assert letters > 0.94 * len(text)  # reference pages full of code have 0.85
    assert all("  " not in p and "\n" not in p and p.endswith(".") for p in paragraphs)


# ---- the demo: a table of these numbers ---------------------------------------------------------


def test_demo_rows(tmp_path: Path) -> None:
    path = tiny_models.save(tmp_path / "model", "llama")
    console = Console(width=80, file=io.StringIO())
    rows = demo.run(model=path, prompt="Why?", max_tokens=5, score_tokens=400, console=console)
    exact, affine, rotor4, rotor3 = rows
    assert [row.name for row in rows] == [
        "exact",
        "mlx-lm 4 bit",
        "rotormlx 4 bit",
        "rotormlx 3 bit",
    ]
    context = exact.context_tokens
    assert context == 406 + 5  # passage and question, answer
    assert {row.context_tokens for row in rows} == {context}
    values = 2 * 2 * 2 * 64  # a token's: keys and values, layers, KV heads, head_dim
    packed = (context - 4 - 64) // 64 * 64
    assert [row.packed_tokens for row in rows] == [0, context, packed, packed]

    # float32 model: mlx-lm keeps its scales and biases in the model's dtype.
    assert [row.bits_per_value for row in rows] == [32, 4 + 64 / 64, 4 + 0.375, 3 + 0.375]
    assert exact.cache_bytes == values * context * 4
    assert affine.cache_bytes == values * context * 5 / 8
    for row, bits in ((rotor4, 4.375), (rotor3, 3.375)):
        # 4 bytes per channel for its scale.
        assert row.cache_bytes == values * (packed * bits / 8 + (context - packed) * 4 + 4)

    # 8,192 tokens: 128 of them are exact.
    ratios = [32 * 8192 / (8064 * bits + 128 * 32 + 32) for bits in (4.375, 3.375)]
    assert [row.long_context_ratio for row in rows] == pytest.approx([1, 32 / 5, *ratios])

    assert exact.quality is None
    for row in rows[1:]:
        assert row.quality is not None
        # The prompt but its last token, without the first three chunks.
        assert row.quality.predictions == 405 - 192
        assert row.quality.kl_mean > 0
    assert affine.packed_share > rotor4.packed_share == rotor3.packed_share > 0.3
    printed = console.file.getvalue()
    assert "…" not in printed  # nothing is cut off
    for row in rows:
        assert f"{row.name}:" in printed
        assert f"{row.cache_bytes / 1e6:.2f} MB" in printed
        assert f"{row.packed_tokens} of {context}" in printed


class Saying(Progress):
    """Keeps what a bar said."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self.said: list[str] = []

    def update(self, task: TaskID, **given: Any) -> None:  # type: ignore[override]
        self.said += [given["description"]] if "description" in given else []
        super().update(task, **given)


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, Saying]:
    """The path of a model, what a short demo of it prints, and what its bar said."""
    path = tiny_models.save(tmp_path / "a model", "llama")
    bar, console = Saying(), Console(width=80, file=io.StringIO())
    monkeypatch.setattr(demo, "progress_bar", lambda console: bar)
    demo.run(model=path, prompt="Why?", max_tokens=2, score_tokens=256, console=console)
    return path, console.file.getvalue(), bar


def test_demo_says_what_it_does_now(small_demo) -> None:
    caches = ("exact", "mlx-lm 4 bit", "rotormlx 4 bit", "rotormlx 3 bit")
    assert small_demo[2].said == [
        said
        for name in caches
        for said in (
            f"reading 262 tokens through the {name} cache",
            f"answering from the {name} cache",
        )
    ]


def test_demo_draws_memory_and_kl(small_demo) -> None:
    """The longest bar is the largest number, and each other is as long as it should be."""
    lines = small_demo[1].splitlines()
    for title, form in (("memory, MB", r"[\d.]+"), ("KL, nats", r"0\.\d{4}")):
        start = lines.index(next(line for line in lines if line.strip() == title))
        drawn = {}
        for line in lines[start + 1 : start + 5]:
            name, bar, number = re.fullmatch(rf"(.*?) +([█▉▊▋▌▍▎▏]*) +({form}) *", line).groups()
            eighths = sum(8 - "█▉▊▋▌▍▎▏".index(sign) for sign in bar)
            drawn[name] = eighths / 8, float(number)
        assert list(drawn) == ["exact", "mlx-lm 4 bit", "rotormlx 4 bit", "rotormlx 3 bit"]
        largest = max(number for _, number in drawn.values())
        for length, number in drawn.values():
            # A bar is drawn to an eighth, a number to two digits or more.
            assert length == pytest.approx(demo.BAR_WIDTH * number / largest, abs=1.5)


def test_demo_names_commands_that_run(small_demo) -> None:
    path, printed, _ = small_demo
    end = printed[printed.index("Try next:") :]
    commands = [shlex.split(line) for line in end.splitlines() if line.startswith("  rotormlx")]
    assert [command[:2] for command in commands] == [
        ["rotormlx", "demo"],
        ["rotormlx", "info"],
        ["rotormlx", "generate"],  # the model has no chat template
    ]
    for command in commands:
        assert path in command
    for command in commands[1:]:  # demo --long has tests of its own
        done = CliRunner().invoke(main.app, command[1:])
        assert done.exit_code == 0, (command, done.output)


def test_a_home_directory_is_typed_as_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert demo.as_typed("/home/me/.cache/a model") == "~/'.cache/a model'"
    assert demo.as_typed("/opt/a model") == "'/opt/a model'"
    assert demo.as_typed("mlx-community/model") == "mlx-community/model"


@pytest.mark.parametrize("cpu", [True, False])
def test_demo_multiplies_with_numpy_on_a_cpu_alone(
    cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = mx.Device(mx.cpu if cpu else mx.gpu)
    monkeypatch.setattr(mx, "default_device", lambda: device)
    before = Linear.__call__, mx.fast.scaled_dot_product_attention
    console = Console(file=io.StringIO())
    with demo.fast_on_a_cpu(console):
        now = Linear.__call__, mx.fast.scaled_dot_product_attention
    assert [a is b for a, b in zip(before, now, strict=True)] == [not cpu] * 2
    assert ("numpy multiplies" in console.file.getvalue()) == cpu


# ---- the long demo ------------------------------------------------------------------------------


def test_long_demo_shows_what_each_cache_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_models.save(tmp_path / "model", "llama")
    asked: list[Any] = []

    def answered(model: Any, question: Any, caches: Any) -> tuple[int, ...]:
        """The 4 bit cache finds all, the 3 bit cache none but the first."""
        asked.append(question)
        is_right = len(asked) <= 2 * demo_long.NUMBERS + 1
        return question.answer if is_right else question.answer[::-1]

    monkeypatch.setattr(needle, "answered", answered)
    console = Console(width=80, file=io.StringIO())
    exact, rotor4, rotor3 = demo_long.run(model=path, length=600, console=console)
    assert [column.cache for column in (exact, rotor4, rotor3)] == ["exact", "4 bit", "3 bit"]
    packed = (600 - 4 - 64) // 64 * 64
    assert [c.packed_tokens for c in (exact, rotor4, rotor3)] == [0, packed, packed]
    assert exact.found == rotor4.found == (True,) * 5
    assert rotor3.found == (True, *[False] * 4)
    printed = console.file.getvalue()
    assert "…" not in printed
    assert re.search(
        r"Reading 600 tokens through 3 caches takes about \d+ (seconds|minutes)", printed
    )
    assert printed.index("takes about") < printed.index("5 numbers in 600 tokens")
    assert re.search(r"found +│ +│ +5 of 5 │ +5 of 5 │ +1 of 5 │", printed)
    summary = "the 5 numbers that the exact cache finds, rotormlx finds 5 at 4 bit and 1 at 3 bit."
    assert summary in " ".join(printed.split())
    for answer in exact.answers:
        assert len(answer) == 4
        assert re.search(rf"The secret number of \w+ is {answer} +│ +[\d,]+ │ +{answer} ", printed)


def test_long_demo_asks_in_packed_bytes(tmp_path: Path) -> None:
    """As the model answers: from caches that hold the text, exact or packed."""
    path = tiny_models.save(tmp_path / "model", "llama")
    columns = demo_long.run(model=path, length=600, console=Console(file=io.StringIO()))
    model, tokenizer = mlx_lm.load(path)
    stack = haystack.haystack(tokenizer, "fact", 600, demo_long.NUMBERS, seed=demo_long.SEED)
    exact = []
    for question in stack.questions:
        logits = model(mx.array([[*stack.tokens, *question.tokens]]))[0, -len(question.answer) :]
        best = np.array(mx.argmax(logits, axis=-1)).tolist()
        exact.append(tokenizer.decode(best).strip())
    assert columns[0].answers == tuple(exact)


def test_demo_refuses_a_short_passage() -> None:
    with pytest.raises(ValueError, match=r"at least 256 tokens .* but 255 and 32 were given"):
        demo.run(score_tokens=255)
