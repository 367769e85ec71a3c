"""A layer whose keys carry a huge constant, as Qwen2.5's first layer does, costs no quality.

The constant lies on the slowest RoPE pairs and has norm 900, where the rest of a key has norm 11.
Codecs without a centre spend all their levels on it and answer with noise.
"""

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.config import RotorConfig
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.cache import store
from rotormlx.mlx.cache.single import RotorKVCache

K, H, S, L, D, VOCABULARY = 2, 6, 520, 40, 128, 400
ROPE_BASE = 1e6
SLOW_PAIRS = 4
BIAS_NORM = 900.0


def rope(x, position):
    return mx.fast.rope(x, D, traditional=False, base=ROPE_BASE, scale=1.0, offset=position)


def constant():
    """A vector of norm 900 on the slowest pairs: channels i and i + D / 2 for the last i."""
    pairs = np.arange(D // 2 - SLOW_PAIRS, D // 2)
    b = np.zeros(D, np.float32)
    b[pairs], b[pairs + D // 2] = 3.0, -2.0
    return b * np.float32(BIAS_NORM / np.linalg.norm(b))


def divergence(bias, position, bits=4):
    """Mean KL of the layer's next-token distributions, compressed against exact, in nats."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return mx.array(rng.normal(size=shape).astype(np.float32))

    keys = rope(normal(1, K, S, D) + mx.array(bias), position)
    values = normal(1, K, S, D)
    queries = rope(normal(1, H, L, D) * 1.5, position + S - L)
    head = normal(H * D, VOCABULARY) * 0.3

    def log_probs(out):
        logits = out.transpose(0, 2, 1, 3).reshape(L, H * D) @ head
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(np.float64)

    cache = RotorKVCache(RotorConfig(bits, bits, sink=0, window=0))
    cache.update_and_fetch(keys, values)
    assert cache.packed_tokens == S // 64 * 64
    packed = attend_view(queries, *cache.keys_and_values(), scale=D**-0.5, mask="causal")
    exact = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=D**-0.5, mask="causal"
    )
    p, q = log_probs(exact), log_probs(packed)
    return (np.exp(p) * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("position", [0, 30_000])
def test_huge_key_bias_costs_nothing(position, figure):
    plain, biased = divergence(np.zeros(D, np.float32), position), divergence(constant(), position)
    figure(
        f"key bias of norm 900 at position {position}: {biased / plain:.2f} times the KL without"
    )
    assert 0 < biased < 1.2 * plain


def test_without_centres_it_would_cost_everything(monkeypatch):
    """The same with centres forced to zero: the measurement can tell."""
    encode = store.backend().encode

    class Uncentred:
        prefill_scale = staticmethod(store.backend().prefill_scale)

        @staticmethod
        def encode(x, codec, *, channel_scale=None, centres=None):
            if codec.role == "key":
                batch, heads, tokens, head_dim = x.shape
                centres = mx.zeros((batch, heads, tokens // 64, head_dim), mx.float16)
            return encode(x, codec, channel_scale=channel_scale, centres=centres)

    plain = divergence(np.zeros(D, np.float32), 0)
    monkeypatch.setattr(store, "backend", lambda: Uncentred)
    assert divergence(constant(), 0) > 50 * plain
