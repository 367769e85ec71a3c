"""Small random models of mlx-lm, and a directory that ``mlx_lm.load`` reads."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 257  # every byte and the end of a text


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _BASE | {"head_dim": 64, "tie_word_embeddings": False},
    "qwen2": _BASE | {"hidden_size": 128, "tie_word_embeddings": True},
    "gemma2": _BASE | {"head_dim": 32},
    "gemma3_text": _BASE
    | {"head_dim": 32, "num_hidden_layers": 4, "sliding_window": 32, "sliding_window_pattern": 2},
    "stablelm": _BASE
    | {
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000,
        "use_qkv_bias": True,
    },
    # Every other layer computes its scores itself.
    "phi3small": _BASE
    | {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 64,
        "gegelu_limit": 1.0,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 100352,
    },
    # Layers 2 and 3 attend over the keys and values of layers 0 and 1 with cache=None.
    "afm7": {
        "vocab_size": VOCABULARY,
        "hidden_dim": 128,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "gpt_oss": _BASE
    | {
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "rope_theta": 10000,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # A CacheList of a state and a KVCache in each layer.
    "falcon_h1": _BASE
    | {
        "head_dim": 32,
        "mamba_d_ssm": 64,
        "mamba_d_head": 16,
        "mamba_n_heads": 4,
        "mamba_d_state": 16,
        "ssm_multipliers": [1.0] * 5,
    },
    "llama4": {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 4,
        "text_config": _BASE
        | {
            "model_type": "llama4",
            "attention_bias": False,
            "attention_chunk_size": 32,
            "head_dim": 32,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
            "max_position_embeddings": 1000,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "num_local_experts": 2,
            "rope_scaling": None,
            "rope_theta": 1000,
            "use_qk_norm": True,
        },
    },
    "deepseek_v3": _BASE
    | {
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 16,
        "qk_nope_head_dim": 32,
        "rope_scaling": None,
    },
    "mamba2": {
        "vocab_size": VOCABULARY,
        "num_heads": 8,
        "head_dim": 16,
        "hidden_size": 128,
        "intermediate_size": 128,
        "state_size": 16,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-4,
        "conv_kernel": 3,
        "n_groups": 4,
        "use_bias": False,
        "use_conv_bias": False,
        "tie_word_embeddings": True,
        "time_step_limit": (0.01, 10.0),
        "time_step_rank": "auto",
    },
}


def build(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights, the same for the same arguments."""
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    config = {"model_type": model_type} | CONFIGS[model_type] | changes
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    return model.eval()


def visible(p: mx.array) -> mx.array:
    """A parameter in float32; random where it starts from zeros, which would hide a layer."""
    if not mx.issubdtype(p.dtype, mx.floating):
        return p
    p = p.astype(mx.float32)
    return p if p.size == 0 or mx.any(p != 0) else 0.1 * mx.random.normal(p.shape)


def save(directory: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> str:
    """Write a model directory with a tokenizer whose tokens are bytes; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(build(model_type, seed, **changes).parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    config = {"model_type": model_type, "eos_token_id": 256} | CONFIGS[model_type] | changes
    (directory / "config.json").write_text(json.dumps(config))

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(directory)


def tokens(count: int, seed: int = 1) -> mx.array:
    """Random tokens, ``[1, count]``."""
    return mx.random.randint(0, VOCABULARY - 1, (1, count), key=mx.random.key(seed))


def logits(model: Any, inputs: mx.array, cache: list[Any], chunk: int = 60) -> mx.array:
    """The logits of a prefill in chunks, so that most tokens are read back from the cache."""
    parts = [inputs[:, i : i + chunk] for i in range(0, inputs.shape[1], chunk)]
    return mx.concatenate([model(part, cache=cache) for part in parts], axis=1).astype(mx.float32)
