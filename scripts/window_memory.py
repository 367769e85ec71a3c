"""Print the cache sizes of models with sliding windows or chunked attention, packed or not.

Models have their real shapes but no weights; nothing is computed.

    python scripts/window_memory.py
"""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx

import rotormlx

TOKENS = (8_192, 32_768, 131_072)
SLIDING, FULL = "sliding_attention", "full_attention"

# Model type, and the fields of its public config.json that the caches depend on.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 3 4B": (
        "gemma3_text",
        {
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
        },
    ),
    "Gemma 3 27B": (
        "gemma3_text",
        {
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
        },
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "layer_types": [SLIDING, FULL] * 12,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
        },
    ),
    "Ministral 8B 2410": (
        "llama",
        {
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "sliding_window": 32_768,
            "layer_types": [FULL, SLIDING, SLIDING, SLIDING] * 9,
        },
    ),
    "Llama 4 Scout": (
        "llama4",
        {
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_chunk_size": 8_192,
            "attention_bias": False,
            "interleave_moe_layer_step": 48,
            "intermediate_size_mlp": 64,
            "max_position_embeddings": 131_072,
            "num_experts_per_tok": 1,
            "num_local_experts": 2,
            "rope_scaling": None,
            "rope_theta": 500_000,
            "use_qk_norm": True,
        },
    ),
}
# Fields that caches do not depend on.
REST = {"hidden_size": 256, "intermediate_size": 64, "vocab_size": 64, "rms_norm_eps": 1e-5}


def model(model_type: str, shape: dict[str, Any]) -> Any:
    """Return a model of this shape in bfloat16 whose weights are never computed."""
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    arguments = REST | shape | {"model_type": model_type}
    if model_type == "llama4":
        layers = {"num_hidden_layers": shape["num_hidden_layers"], "vocab_size": 64}
        arguments = {"model_type": model_type, "text_config": arguments, **layers}
    made = module.Model(module.ModelArgs.from_dict(arguments))
    made.set_dtype(mx.bfloat16)
    return made


def megabytes(size: int) -> str:
    """Format bytes as MB of 10^6 bytes."""
    return f"{size / 1e6:,.0f}"


def main() -> None:
    """Print a Markdown table: MB of exact caches, with windows left exact, with windows packed."""
    columns = " | ".join(f"{tokens:,} tokens" for tokens in TOKENS)
    print(f"| model | windows | {columns} |\n|---|---|{'---|' * len(TOKENS)}")
    for name, (model_type, shape) in SHAPES.items():
        made = model(model_type, shape)
        off, on = (rotormlx.apply(made, sliding_windows=windows) for windows in (False, True))
        limit = min(layer.max_tokens for layer in off.layers if layer.max_tokens is not None)
        count = sum(layer.max_tokens is not None for layer in off.layers)
        cells = [
            f"{megabytes(off.float_bytes(n))} / {megabytes(off.compressed_bytes(n))} / "
            f"**{megabytes(on.compressed_bytes(n))}**"
            for n in TOKENS
        ]
        windows = f"{count} of {len(off.layers)} layers, {limit:,}"
        print(f"| {name} | {windows} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
