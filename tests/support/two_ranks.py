"""One rank of a model that is spread over ranks; ``tests/torch/test_tensor_parallel.py`` runs it.

    python two_ranks.py MODEL OUTPUT BITS [CALIBRATION]

Writes to ``OUTPUT-RANK.pt`` what this rank has found. Without ``WORLD_SIZE`` it is alone.
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import rotormlx.torch
from rotormlx import RotorConfig
from rotormlx.torch.fingerprint import fingerprint

PROMPT_TOKENS, NEW_TOKENS = 200, 30


def refusal(function, *arguments):
    """What a call refuses with; nothing if it does not."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def main(path, output, bits, calibration=None):
    torch.set_num_threads(1)
    spread = {"distributed_config": {"tp_plan": "auto"}} if "WORLD_SIZE" in os.environ else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **spread).eval()
    rank = os.environ.get("RANK", "0")
    config = RotorConfig(bits, bits)
    facts = {"refusal": refusal(rotormlx.torch.apply, model, config, calibration)}
    if not facts["refusal"]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, 257, (1, PROMPT_TOKENS), generator=generator)
        made = model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
        )
        cache = getattr(made, "cache", None) or made.past_key_values
        report = rotormlx.torch.report(model)
        facts |= {
            "tokens": made.sequences[0].tolist(),
            "report": [layer.kv_heads for layer in report.layers],
            "packed": [
                [(*store.packed, store.channel_scale) for store in layer.stores]
                for layer in cache.rotor_layers
            ],
            "save": refusal(
                rotormlx.torch.save_prompt_cache, f"{output}-{rank}.safetensors", model, cache
            ),
            "load": refusal(rotormlx.torch.load_prompt_cache, "none.safetensors", model),
            "fingerprint": fingerprint(model).text,
        }
        if calibration:  # the file again, and what was read from it
            loaded = rotormlx.torch.load_calibration(calibration, model)
            facts["loaded"] = refusal(rotormlx.torch.apply, model, config, loaded)
            facts["heads"] = {len(array) for array in loaded.without_losses.numbers.values()}
    torch.save(facts, Path(f"{output}-{rank}.pt"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
