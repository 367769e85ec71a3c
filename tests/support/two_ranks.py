"""One rank of a model that is spread over ranks; ``tests/torch/test_tensor_parallel.py`` runs it.

    python two_ranks.py OUTPUT MODEL:BITS[:CALIBRATION] ...

Writes to ``OUTPUT/NUMBER-RANK.pt`` what this rank finds with each setting, counted from 0. Without
``WORLD_SIZE`` it is alone.
"""

import os
import sys

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


def found(path, output, bits, calibration=None):
    """What this rank finds with a setting; saved caches and facts begin with ``output``."""
    spread = {"distributed_config": {"tp_plan": "auto"}} if "WORLD_SIZE" in os.environ else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **spread).eval()
    config = RotorConfig(bits, bits)
    facts = {"refusal": refusal(rotormlx.torch.apply, model, config, calibration)}
    if facts["refusal"]:
        return facts
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
        "save": refusal(rotormlx.torch.save_prompt_cache, f"{output}.safetensors", model, cache),
        "load": refusal(rotormlx.torch.load_prompt_cache, "none.safetensors", model),
        "fingerprint": fingerprint(model).text,
    }
    if calibration:  # the file again, and what was read from it
        loaded = rotormlx.torch.load_calibration(calibration, model)
        facts["loaded"] = refusal(rotormlx.torch.apply, model, config, loaded)
        facts["heads"] = {len(array) for array in loaded.without_losses.numbers.values()}
    return facts


def main(output, *chosen):
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    for number, setting in enumerate(chosen):
        path, bits, *calibration = setting.split(":")
        place = f"{output}/{number}-{rank}"
        torch.save(found(path, place, int(bits), *calibration), f"{place}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
