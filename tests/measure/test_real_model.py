"""SmolLM2-135M read through the cache: the quality that the project promises.

The text goes through in chunks of 64 tokens, so a chunk attends to itself and to at most 131 tokens
more (sink and tail) exactly, and to everything else as packed bytes.
"""

from dataclasses import replace
from functools import cache

import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from rotormlx.config import RotorConfig
from rotormlx.measure import scoring
from rotormlx.measure.cpu_attention import numpy_attention
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.haystack import haystack
from rotormlx.measure.needle import search
from rotormlx.measure.schemes import scheme
from rotormlx.measure.text import default_text
from rotormlx.mlx import hosts
from rotormlx.mlx.cache.single import RotorKVCache

CHUNK = 64
# Before it, a cache with window and sink has packed nothing: two chunks and a block must be read.
FIRST = 192
# Predictions compared: many for what is promised, fewer for what is only put in order.
PROMISED, ORDERED = 512, 256
MLX_LM = "mlx-lm 4 bit"


@pytest.fixture(scope="module")
def compared(smollm2):
    """Quality of a configuration or of mlx-lm's 4-bit cache, and the exact cache's perplexity.

    Every text is read once through each.
    """
    model, tokenizer = smollm2
    layers = range(len(model.layers))
    tokens = tokenizer.encode(default_text()[:8000])

    @cache
    def read(config, predictions):
        """Scores of the text through fresh caches, which must have read packed bytes."""
        if config is None:
            caches = [KVCache() for _ in layers]
        elif config == MLX_LM:
            caches = [QuantizedKVCache(group_size=64, bits=4) for _ in layers]
        else:
            caches = [RotorKVCache(config, layer) for layer in layers]
        scores = scoring.score(model, tokens[: FIRST + predictions + 1], caches, chunk=CHUNK)
        if config is not None:
            # Every prediction compared read at least a block of packed tokens, the last ones most.
            assert scores.packed_tokens[FIRST:].min() >= 64
            assert scores.packed_tokens[-1] >= FIRST + predictions - 4 * CHUNK
            scoring.assert_packed(caches, FIRST + predictions - 4 * CHUNK)
        return scores

    @cache
    def compared(config, predictions):
        exact = read(None, PROMISED).first(FIRST + predictions)
        through = read(config, PROMISED if config in (K4V4, K3V3, ROTOR3, MLX_LM) else ORDERED)
        found = scoring.compare(exact, through.first(FIRST + predictions), start=FIRST)
        assert found.predictions == predictions
        return found, exact.perplexity(FIRST)

    with hosts.MLX_LM.in_place(), numpy_linear():
        yield compared


@pytest.fixture
def compare(compared, figure):
    """Quality of a configuration, or of mlx-lm's 4-bit cache."""

    def compare(config, predictions):
        found, exact = compared(config, predictions)
        name = config if isinstance(config, str) else NAMES[config]
        figure(
            f"{name}: KL {found.kl_mean:.4f}, top-1 {found.top1:.1%}, perplexity {found.ppl:.2f} "
            f"(exact {exact:.2f}), {predictions} predictions"
        )
        return found

    return compare


K4V4, K3V3 = RotorConfig(), RotorConfig(3, 3)
ROTOR3 = RotorConfig(rotation="rotor3")


# Neither sink nor window: only the chunk being read, and less than a block, are exact.
BARE4, BARE3 = RotorConfig(sink=0, window=0), RotorConfig(3, 3, sink=0, window=0)
BARE_ROTOR3 = replace(BARE4, rotation="rotor3")
BARE_UNSCALED = replace(BARE_ROTOR3, channel_scale="none")
NAMES = {
    K4V4: "rotormlx 4 bit",
    K3V3: "rotormlx 3 bit",
    ROTOR3: "rotor3 4 bit",
    BARE4: "rotormlx 4 bit, no window and sink",
    BARE3: "rotormlx 3 bit, no window and sink",
    BARE_ROTOR3: "rotor3 4 bit, no window and sink",
    BARE_UNSCALED: "rotor3 4 bit, no window, sink and channel scale",
}


@pytest.mark.parametrize(("config", "bound"), [(K4V4, 0.020), (K3V3, 0.085), (ROTOR3, 0.05)])
def test_divergence_is_small(compare, config, bound):
    assert compare(config, PROMISED).kl_mean <= bound


@pytest.mark.parametrize("config", [K4V4, K3V3])
def test_divergence_is_below_that_of_mlx_lm_at_4_bits(compare, config):
    ours, theirs = compare(config, PROMISED), compare(MLX_LM, PROMISED)
    assert ours.kl_mean < theirs.kl_mean
    assert ours.top1 > theirs.top1


def test_order_of_schemes_without_window_and_sink(compare):
    """More bits are better, the cascade beats one stage, a channel scale rescues the one stage."""
    cascade = compare(BARE4, ORDERED).kl_mean
    assert cascade < compare(BARE3, ORDERED).kl_mean
    assert cascade < compare(BARE_ROTOR3, ORDERED).kl_mean
    assert compare(BARE_ROTOR3, ORDERED).kl_mean < compare(BARE_UNSCALED, ORDERED).kl_mean


def test_window_and_sink_help(compare):
    assert compare(K4V4, ORDERED).kl_mean < compare(BARE4, ORDERED).kl_mean
    assert compare(K3V3, ORDERED).kl_mean < compare(BARE3, ORDERED).kl_mean


def test_chains_are_neither_too_easy_nor_too_hard(smollm2, figure):
    """Random digits would solve less than one in a hundred."""
    model, tokenizer = smollm2
    made = haystack(tokenizer, "chain", 512, 16, seed=0)
    with hosts.MLX_LM.in_place(), numpy_linear(), numpy_attention():
        found = [trial.found for trial in search(model, made, scheme("exact"))]
    figure(f"chains of two sums through the exact cache: {sum(found)} of 16 solved")
    assert 3 <= sum(found) <= 15
