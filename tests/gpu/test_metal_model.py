"""A whole model on the Metal backend: generation through the cache, and a step that is exported.

With a Metal GPU it runs there, elsewhere in the emulator.
"""

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.config import RotorConfig
from rotormlx.measure import scoring
from rotormlx.mlx import attention, hosts, integration
from rotormlx.mlx.backends.mlx_ops import MLXBackend
from rotormlx.mlx.cache import store
from rotormlx.mlx.cache.single import RotorKVCache
from tests.support import models as tiny_models
from tests.support.runners import METAL

REAL_METAL_KERNEL = mx.fast.metal_kernel
TOKENS = 210
# Tails of 64 to 127 tokens are exact; with 16 there is more to read from packed blocks.
CONFIG = RotorConfig(key_bits=4, value_bits=3, window=16)


@pytest.fixture
def use(monkeypatch):
    """Choose the backend of the cache and of attention."""

    def choose(backend):
        for module in (attention, store):
            monkeypatch.setattr(module, "backend", lambda: backend)

    yield choose
    hosts.MLX_LM.remove()


def read(model, tokens):
    """Logits of a prefill in chunks and of single tokens, and the caches."""
    caches = integration.make_prompt_cache(model, CONFIG)
    prefill = tiny_models.logits(model, tokens[:, :-3], caches)
    decode = tiny_models.logits(model, tokens[:, -3:], caches, chunk=1)
    mx.eval(prefill, decode)
    return np.array(mx.concatenate([prefill, decode], axis=1)), caches


@pytest.mark.skipif(METAL.missing() is not None, reason="neither a Metal GPU nor g++ is here")
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_model_on_metal_is_the_model_on_mlx(use, model_type):
    """The same packed bytes and the same logits; gpt_oss has sink logits and windows."""
    model, tokens = tiny_models.build(model_type), tiny_models.tokens(TOKENS)
    use(MLXBackend())
    expected, expected_caches = read(model, tokens)
    use(METAL.backend)
    with METAL.kernels():
        found, caches = read(model, tokens)

    scoring.assert_packed(caches, 128)
    # float32 sums in another order, through two layers; a code may fall to its neighbour.
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()
    for cache, other in zip(caches, expected_caches, strict=True):
        if isinstance(cache, RotorKVCache):
            words, others = (np.array(c.state[6]) for c in (cache, other))
            assert (words != others).mean() < 1e-2


def test_model_step_can_be_exported(use, tmp_path):
    """The launch code runs wherever MLX does; only Apple's compiler is missing."""
    model, tokens = tiny_models.build("llama"), tiny_models.tokens(TOKENS)
    use(MLXBackend())
    _, caches = read(model, tokens)
    use(METAL.backend)
    kernels = []

    def record(event):
        if event["type"] == "primitive" and event["name"] == "CustomKernel":
            kernels.append(event["arguments"][0])

    with METAL.kernels(REAL_METAL_KERNEL):
        mx.export_function(record, lambda t: model(t, cache=caches), tokens[:, :1])
    assert sum("attend_alone" in name for name in kernels) == len(model.layers)
