"""SmolLM2-135M read through the cache: the quality that the project promises.

The text goes through in chunks of 64 tokens, so a chunk attends to itself and to at most 131 tokens
more (sink and tail) exactly, and to everything else as packed bytes. Each run takes half a minute.
"""

from functools import cache

import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from rotormlx import hook, quality
from rotormlx.cache import RotorKVCache
from rotormlx.config import RotorConfig

# 512 predictions are compared, each of them reads packed tokens.
SCORED = 512
CHUNK = 64


@pytest.fixture(scope="module")
def compare(smollm2):
    """Quality of a configuration, or of mlx-lm's 4-bit cache; every run is made once."""
    model, tokenizer = smollm2
    layers = range(len(model.layers))

    @cache
    def exact(first):
        tokens = tokenizer.encode(quality.default_text()[:8000])[: first + SCORED + 1]
        scores = quality.score(model, tokens, [KVCache() for _ in layers], chunk=CHUNK)
        print(f"exact: PPL {scores.perplexity(first):.2f}")
        return tokens, scores

    @cache
    def run(config):
        # With window and sink nothing is packed before two chunks and a block have been read.
        first = 192
        tokens, reference = exact(first)
        if config == "mlx-lm 4 bit":
            caches = [QuantizedKVCache(group_size=64, bits=4) for _ in layers]
        else:
            caches = [RotorKVCache(config, layer) for layer in layers]
        scores = quality.score(model, tokens, caches, chunk=CHUNK)
        # Every prediction compared read at least a block of packed tokens, the last ones most.
        assert scores.packed_tokens[first:].min() >= 64
        assert scores.packed_tokens[-1] >= first + SCORED - 4 * CHUNK
        quality.assert_packed(caches, first + SCORED - 4 * CHUNK)
        found = quality.compare(reference, scores, start=first)
        assert found.predictions == SCORED
        print(f"{config}: KL {found.kl_mean:.4f}, top-1 {found.top1:.3f}, PPL {found.ppl:.2f}")
        return found

    hook.install()
    yield run
    hook.remove()


K4V4, K3V3 = RotorConfig(), RotorConfig(3, 3)
ROTOR3 = RotorConfig(rotation="rotor3")


def bare(key_bits, value_bits, **kw):
    """Neither sink nor window: only the chunk being read, and less than a block, are exact."""
    return RotorConfig(key_bits, value_bits, sink=0, window=0, **kw)


@pytest.mark.parametrize(("config", "bound"), [(K4V4, 0.020), (K3V3, 0.085), (ROTOR3, 0.05)])
def test_divergence_is_small(compare, config, bound):
    assert compare(config).kl_mean <= bound


@pytest.mark.parametrize("config", [K4V4, K3V3])
def test_divergence_is_below_that_of_mlx_lm_at_4_bits(compare, config):
    assert compare(config).kl_mean < compare("mlx-lm 4 bit").kl_mean
    assert compare(config).top1 > compare("mlx-lm 4 bit").top1


def test_order_of_schemes_without_window_and_sink(compare):
    """More bits are better, the cascade beats one stage, a channel scale rescues the one stage."""
    cascade = compare(bare(4, 4))
    assert cascade.kl_mean < compare(bare(3, 3)).kl_mean
    rotor3 = compare(bare(4, 4, rotation="rotor3"))
    unscaled = compare(bare(4, 4, rotation="rotor3", channel_scale="none"))
    assert cascade.kl_mean < rotor3.kl_mean < unscaled.kl_mean


def test_window_and_sink_help(compare):
    assert compare(K4V4).kl_mean < compare(bare(4, 4)).kl_mean
    assert compare(K3V3).kl_mean < compare(bare(3, 3)).kl_mean
