"""What a cache does to the attention of one layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from rotormlx.codec import reference
from rotormlx.measure import attention_error, cache_contents, schemes, scoring
from rotormlx.measure.attention_error import Attended, layer_error
from rotormlx.mlx import hook, hosts
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.cache.view import KVView
from tests.support import models as tiny_models

H, K, L, S, D = 6, 2, 5, 150, 40
RNG = np.random.default_rng(11)


def layer(sharpness: float = 3.0) -> Attended:
    keys, values = RNG.normal(size=(2, K, S, D)).astype(np.float32)
    queries = sharpness * RNG.normal(size=(H, L, D)).astype(np.float32)
    return Attended(4, queries, keys, values, D**-0.5)


class Damaged(KVCache):
    """Gives back keys and values with something done to them."""

    def __init__(self, keys: Any, values: Any) -> None:
        super().__init__()
        self.damaged = mx.array(keys[None]), mx.array(values[None])

    def keys_and_values(self) -> Any:
        return self.damaged


def judged(exact: Attended, keys: Any, values: Any) -> dict[str, float]:
    """Every measure by loops in float64."""
    found: dict[str, list[float]] = {name: [] for name in ("scores", "out", "top1", "top5")}
    for head in range(H):
        group = head * K // H
        for row in range(L):
            seen = S - L + row + 1
            q = exact.queries[head, row].astype(np.float64)
            a = exact.scale * exact.keys[group, :seen] @ q
            b = exact.scale * keys[group, :seen] @ q
            found["scores"].append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            order = np.argsort(-b)
            found["top1"].append(a.argmax() in order[:1])
            found["top5"].append(a.argmax() in order[:5])
            x, y = (
                np.exp(s - s.max()) / np.exp(s - s.max()).sum() @ v[group, :seen]
                for s, v in ((a, exact.values), (b, values))
            )
            found["out"].append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    return {name: float(np.mean(numbers)) for name, numbers in found.items()}


def test_layer_error_against_loops() -> None:
    exact = layer()
    keys = exact.keys + 0.3 * RNG.normal(size=exact.keys.shape).astype(np.float32)
    values = exact.values + 0.2 * RNG.normal(size=exact.values.shape).astype(np.float32)
    error, truth = layer_error(exact, Damaged(keys, values)), judged(exact, keys, values)
    # float32 sums of 40 and 150 terms.
    assert error.score_cosine == pytest.approx(truth["scores"], abs=1e-5)
    assert error.cosine == pytest.approx(truth["out"], abs=1e-5)
    assert error.top1 == pytest.approx(truth["top1"])
    assert error.top5 == pytest.approx(truth["top5"])
    assert 0.3 < error.top1 < error.top5
    assert error.layer == 4
    # Squares of 0.3 and 0.2; 12,000 numbers give them within 2 %.
    assert error.key_error == pytest.approx(0.09, rel=0.05)
    assert error.value_error == pytest.approx(0.04, rel=0.05)


def test_layer_error_counts_five() -> None:
    """The best key falls behind four, then behind five others."""
    exact = layer(sharpness=1)
    direction = np.zeros(D, np.float32)
    direction[0] = 1
    queries = np.broadcast_to(direction, (H, L, D))
    base = np.zeros((K, S, D), np.float32)
    base[:, 10, 0] = 2
    exact = Attended(0, queries, base, exact.values, 1.0)
    for better, kept in ((0, (1, 1)), (1, (0, 1)), (4, (0, 1)), (5, (0, 0))):
        keys = base.copy()
        keys[:, 20 : 20 + better, 0] = 3
        error = layer_error(exact, Damaged(keys, exact.values))
        assert (error.top1, error.top5) == kept


def test_exact_cache_loses_nothing() -> None:
    error = layer_error(layer(), KVCache())
    assert (error.key_error, error.value_error, error.top1, error.top5) == (0, 0, 1, 1)
    assert error.cosine == pytest.approx(1, abs=1e-6)
    assert error.score_cosine == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["k2v3", "rotor3-k3v2:bare", "turboquant-k4v4", "kivi-k2v2"])
def test_output_is_what_attention_gives(name: str) -> None:
    exact, cache = layer(), schemes.scheme(name).make(4)
    error = layer_error(exact, cache)
    views = cache.keys_and_values()
    if isinstance(views[0], KVView):
        q = mx.array(exact.queries[None])
        found = np.array(attend_view(q, *views, scale=exact.scale, mask="causal"))
    else:
        arrays = (np.array(x.astype(mx.float32)) for x in cache_contents.decoded(cache))
        given = {"scale": exact.scale, "mask": "causal"}
        found = reference.attend(exact.queries[None], *arrays, **given)
    arrays = (exact.queries[None], exact.keys[None], exact.values[None])
    truth = reference.attend(*arrays, scale=exact.scale, mask="causal")
    sizes = np.linalg.norm(found, axis=-1) * np.linalg.norm(truth, axis=-1)
    assert error.cosine == pytest.approx(((found * truth).sum(-1) / sizes).mean(), abs=1e-5)


def test_more_bits_lose_less() -> None:
    exact = layer()
    for names in (("k8v8:bare", "k4v4:bare", "k2v2:bare"), ("k4v4", "k4v4:bare")):
        errors = [layer_error(exact, schemes.scheme(name).make(0)) for name in names]
        for better, worse in pairwise(errors):
            assert better.cosine > worse.cosine
            assert 0 < better.key_error < worse.key_error
            assert 0 < better.value_error < worse.value_error


def test_recorded_queries_are_those_of_the_model() -> None:
    """Attention over what was recorded is what the layer's output projection got."""
    model = tiny_models.build("llama", seed=3)
    tokens = np.array(tiny_models.tokens(100)[0]).tolist()
    caches = schemes.scheme("exact").caches(model)
    seen: list[mx.array] = []
    attend = hook.attend
    hosts.MLX_LM.install()
    try:
        with attention_error.record_queries() as latest:
            recording = hook.attend

            def spy(*args: Any, **rest: Any) -> mx.array:
                seen.append(recording(*args, **rest))
                return seen[-1]

            hook.attend = spy
            scoring.score(model, tokens, caches, chunk=64)
            hook.attend = recording
        layers = list(attention_error.attended(caches, latest))
    finally:
        hook.attend = attend
        hosts.MLX_LM.remove()
    assert hook.attend is attend
    assert [one.layer for one in layers] == [0, 1]
    for one, output in zip(layers, seen[-2:], strict=True):
        assert one.keys.shape == (2, 99, 64)
        assert one.queries.shape == (4, 35, 64)  # the last chunk of 99 tokens
        arrays = (one.queries[None], one.keys[None], one.values[None])
        expected = reference.attend(*arrays, scale=one.scale, mask="causal")
        # float32 against float64.
        np.testing.assert_allclose(np.array(output), expected, atol=1e-5)
