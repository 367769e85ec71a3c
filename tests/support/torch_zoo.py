"""Every type of language model of transformers as a tiny model with random weights.

A configuration is the type's own with small sizes: ``SIZES`` names what a setting becomes wherever
it stands, ``torch_zoo.json`` what differs for one model type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto import modeling_auto as auto

OVERRIDES: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("torch_zoo.json").read_text()
)
VOCABULARY = 257
# How much larger weights are than transformers makes them; more than this is noise in some models.
GAIN = 3.0
GAINS = {"chameleon": 1.0}
_DRAFTS = "it drafts for another model and reads the cache of that model"
NOT_RUN = {"gemma4_assistant": _DRAFTS, "gemma4_unified_assistant": _DRAFTS}

_NAMES: dict[Any, str] = {
    VOCABULARY: "vocab_size n_vocab text_vocab_size decoder_vocab_size vocab_size_per_layer_input "
    "unpadded_vocab_size shape_vocab_size pronunciation_vocab_size audio_vocab_size",
    64: "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim word_embed_proj_dim "
    "hidden_size_global input_embedding_size output_embedding_size lru_width embedding_dim "
    "attention_hidden_size backbone_hidden_size out_hidden_size text_hidden_size "
    "audio_hidden_size codebook_dim",
    96: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff dff dim_ff d_inner "
    "intermediate_size_mlp dense_intermediate_size ffn_hidden_size feed_forward_size mlp_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size shared_experts_intermediate_size "
    "q_lora_rank kv_lora_rank o_lora_rank sliding_window sliding_window_size attention_window_size "
    "image_size attention_chunk_size local_attention",
    16: "head_dim d_kv kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim dim_head "
    "swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_dim "
    "attention_head_size index_head_dim mamba_d_head mamba_headdim mamba_head_dim d_head "
    "ssm_state_size state_size mamba_d_state rotary_dim hidden_size_per_layer_input",
    8: "patch_size mamba_n_heads mamba_num_heads laurel_rank",
    4: "num_hidden_layers num_layers n_layer n_layers num_attention_heads n_head n_heads num_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts encoder_attention_heads "
    "decoder_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads "
    "attention_heads num_encoder_attention_heads num_decoder_attention_heads index_n_heads "
    "encoder_num_attention_heads decoder_num_attention_heads encoder_num_key_value_heads "
    "decoder_num_key_value_heads",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k linear_num_key_heads encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers depth encoder_num_hidden_layers "
    "decoder_num_hidden_layers",
    1: "n_group topk_group n_shared_experts num_shared_experts",
    2048: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions "
    "model_max_length context_length",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
# Lists with an entry per layer, which the configuration makes itself for another number of layers.
BY_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "indexer_types",
    "moe_layers",
    "layer_rope_theta",
    "full_attn_idxs",
    "num_attention_heads_per_layer",
    "activation_sparsity_pattern",
    "per_layer_config",
    "attention_layers",
    "kv_source_layers",
)
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


# Where transformers lists types, under the class that builds them.
KINDS = {
    "causal": (transformers.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": (
        transformers.AutoModelForSeq2SeqLM,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
    "speech": (
        transformers.AutoModelForSpeechSeq2Seq,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ),
    "image": (
        transformers.AutoModelForImageTextToText,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ),
}


def model_types() -> list[str]:
    """The types that transformers lists as language models: ``llama``, ``seq2seq/bart``."""
    names = []
    for kind, (_, mapping) in KINDS.items():
        names += [t if kind == "causal" else f"{kind}/{t}" for t in sorted(mapping)]
    return names


def tiny_config(model_type: str) -> Any:
    """A configuration of the type with small sizes."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    return config_class(**_shrunk(config_class().to_dict(), model_type))


def _shrunk(settings: dict[str, Any], model_type: str | None) -> dict[str, Any]:
    small: dict[str, Any] = {}
    latent = settings.get("kv_lora_rank") is not None
    for name, value in settings.items():
        if name in ("transformers_version", "architectures", "_name_or_path", *BY_LAYER):
            continue
        if isinstance(value, dict) and (name.endswith("_config") or "model_type" in value):
            small[name] = _shrunk(value, value.get("model_type"))
        elif latent and name in ("num_key_value_heads", "qk_head_dim"):
            # Keys of all heads come from one latent vector.
            small[name] = SIZES["num_attention_heads"] if name == "num_key_value_heads" else 32
        elif name == "is_decoder":
            small[name] = not settings.get("is_encoder_decoder")
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            small[name] = _rope(value, settings)
        elif name in SPECIAL:
            small[name] = SPECIAL[name]
        elif name in SIZES and type(value) is int:
            small[name] = SIZES[name]
        elif name in SIZES and isinstance(value, list):
            continue
        elif name.endswith(("token_id", "token_index")) and type(value) is int:
            # Marks what no text holds.
            small[name] = VOCABULARY - 1
        else:
            small[name] = value
    return small | OVERRIDES.get(model_type or "", {})


def _rope(rope: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Sections of rotary positions that add up to half of the dimensions that are turned."""
    if rope.get("mrope_section") is None:
        return rope
    share = rope.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0
    half = int(SIZES["head_dim"] * share) // 2
    return rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def tokens(count: int) -> torch.Tensor:
    """Random tokens ``[1, count]`` that stand for nothing special."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY - 5, (1, count), generator=generator)


def inputs(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """What a model's forward takes to read these tokens."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    if model.main_input_name == "input_ids":
        return {"input_ids": tokens(9), "decoder_input_ids": ids}
    generator = torch.Generator().manual_seed(2)
    width = model.get_encoder().config.get_text_config().hidden_size
    encoded = BaseModelOutput(torch.randn(1, 9, width, generator=generator))
    encoded.attention_mask = None  # some models ask for it
    return {"encoder_outputs": encoded, "decoder_input_ids": ids}


def generate_inputs(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """What ``generate`` takes to go on from these tokens."""
    given = inputs(model, ids)
    if "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    return given


def build(model_type: str) -> Any:
    """A float32 model with random weights, the same each time."""
    kind, _, name = model_type.rpartition("/")
    config = tiny_config(name)
    torch.manual_seed(0)
    model_class = KINDS[kind or "causal"][0]._model_mapping[type(config)]
    text = config.get_text_config(decoder=True)
    if not isinstance(config, model_class.config_class) and isinstance(
        text, model_class.config_class
    ):
        config = text
    model = model_class._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            _make_visible(parameter, GAINS.get(name, GAIN))
    return model


def _make_visible(parameter: torch.Tensor, gain: float) -> None:
    """Weights large enough that a prediction depends on far tokens; zeros would hide a layer."""
    if parameter.ndim > 1 and not parameter.any():
        parameter.normal_(0, 0.1)
    elif parameter.ndim > 1:
        parameter.mul_(min(gain, 0.5 / max(float(parameter.std()), 1e-6)))
