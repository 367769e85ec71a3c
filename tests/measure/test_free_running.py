"""What a model writes by itself, and where two continuations part."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from rotormlx.measure import free_running, scoring
from rotormlx.measure.free_running import Settings
from tests.support import models as tiny_models

TOKENS = [int(t) for t in np.random.default_rng(7).integers(0, tiny_models.VOCABULARY, 101)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.build("llama", seed=3)


def filled(model: Any) -> list[KVCache]:
    """Caches that hold all of the text but its last token."""
    caches = [KVCache() for _ in model.layers]
    scoring.score(model, TOKENS, caches)
    return caches


def test_continuations_are_what_the_model_without_cache_would_write(model: Any) -> None:
    settings = Settings(greedy=6, sampled=5, seeds=2, temperature=0.7)
    steps: list[int] = []
    written = free_running.continuations(model, TOKENS[-1], filled(model), settings, steps.append)
    assert [len(own) for own in written] == [6, 5, 5]
    assert sorted(steps) == [5, 5, 6]
    for own, choose in zip(written, (None, 0, 1), strict=True):
        text = list(TOKENS)
        for step, token in enumerate(own):
            logits = model(mx.array([text]))[0, -1]
            if choose is None:
                assert token == int(np.array(logits).argmax())
            else:
                # A noise of its own for each seed and step.
                noise = np.random.default_rng([choose, step]).gumbel(size=logits.shape)
                assert token == int((np.array(logits) / 0.7 + noise).argmax())
            text.append(token)
    assert len({tuple(own[:5]) for own in written}) == 3


def test_every_continuation_begins_where_the_text_ends(model: Any) -> None:
    """What one has written is not there for the next."""
    offsets: list[int] = []

    def watched(tokens: mx.array, cache: Any) -> mx.array:
        offsets.append(cache[0].offset)
        return model(tokens, cache=cache)

    settings = Settings(greedy=3, sampled=2, seeds=2)
    free_running.continuations(watched, TOKENS[-1], filled(model), settings)
    assert offsets == [100, 101] * 2 + [100, 101, 102]


def test_samples_have_the_probabilities_of_the_temperature() -> None:
    logits = mx.array([0.0, 1.0, -1.0, 0.5])
    drawn = [free_running.sampler(seed, 0.5)(logits, 3) for seed in range(4000)]
    found = np.bincount(drawn, minlength=4) / 4000
    wanted = np.exp(2 * np.array(logits))
    wanted /= wanted.sum()
    # Four deviations of a share of 4,000.
    assert np.abs(found - wanted).max() < 4 * 0.5 / np.sqrt(4000)


def test_the_same_noise_parts_only_where_distributions_do() -> None:
    """Two logits a little apart give the same sample but for about their total variation."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=40)
    other = logits + 0.05 * rng.normal(size=40)
    pairs = [
        [free_running.sampler(seed, 1.0)(mx.array(x), 0) for x in (logits, other)]
        for seed in range(2000)
    ]
    differing = np.mean([a != b for a, b in pairs])
    p, q = (np.exp(x) / np.exp(x).sum() for x in (logits, other))
    distance = np.abs(p - q).sum() / 2
    # Gumbel noise parts at most twice as often as any coupling must, independent draws nearly
    # always; three deviations of a share of 2,000 besides.
    assert 0 < differing < 2 * distance + 3 * np.sqrt(2 * distance / 2000) < 0.2


@pytest.mark.parametrize("part", ["greedy", "sampled"])
def test_a_part_can_be_left_out(model: Any, part: str) -> None:
    settings = Settings(**({"greedy": 3, "sampled": 2, "seeds": 2} | {part: 0}))
    written = free_running.continuations(model, TOKENS[-1], filled(model), settings)
    assert [len(own) for own in written] == ([3] if part == "sampled" else [0, 2, 2])
    assert settings.tokens == sum(map(len, written))


@pytest.mark.parametrize(
    ("a", "b", "common"), [([1, 2, 3], [1, 2, 4], 2), ([1], [2], 0), ([1, 2], [1, 2], 2)]
)
def test_common_start(a: list[int], b: list[int], common: int) -> None:
    assert free_running.common_start(a, b) == common


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")},
              {"temperature": float("inf")}, {"greedy": -1}, {"seeds": -1}]
)  # fmt: skip
def test_settings_refuse(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="temperature above 0 and no negative number"):
        Settings(**wrong)
