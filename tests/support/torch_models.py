"""Tiny models of transformers with random weights, one of each family."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers

# What models call the cache, as an argument and in their output; renamed in transformers 5.24.
_ARGUMENTS = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"
VOCABULARY = 257
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SLIDING = {
    "num_hidden_layers": 4,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

# Name of the configuration's class, and what differs.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma3": ("Gemma3Text", _SLIDING),
    "gpt-oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2} | _SLIDING,
    ),
}
_MODEL_CLASSES = {"Gemma3Text": "Gemma3ForCausalLM"}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights, the same for the same arguments."""
    kind, differences = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(_BASE | differences | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, _MODEL_CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    # Larger weights than usual, so that predictions depend on far tokens and ties are rare.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.generation_config.do_sample = False
    return model


def tokens(count: int, seed: int = 1, batch: int = 1) -> torch.Tensor:
    """Random tokens, ``[batch, count]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, count), generator=generator)


def padded(lengths: list[int], seed: int = 1) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Prompts ``[1, n]`` of these lengths, and the batch of them with padding at the left."""
    prompts = [tokens(n, seed + i) for i, n in enumerate(lengths)]
    longest = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(p), (longest - p.shape[1], 0)) for p in prompts]
    )
    return prompts, {"input_ids": ids, "attention_mask": mask}
