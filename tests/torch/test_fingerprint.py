"""One checkpoint is one model to both hosts, in every dtype; other weights are another."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from rotormlx.mlx import fingerprint as of_mlx
from rotormlx.storage.fingerprint import Fingerprint, Weights, canonical_names
from rotormlx.torch import fingerprint as of_torch
from tests.support.both_hosts import by_mlx, by_torch, written

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def are_one(a, b):
    """Whether two fingerprints are of one model; they must agree on it, read from a file too."""
    said = {x.difference(y) for x, y in ((a, b), (b, a))}
    read = Fingerprint.from_text(a.text)
    assert read == a
    assert len(said) == 1
    return said == {None}


@pytest.mark.parametrize("saved", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_both_hosts_agree_on_a_checkpoint(tmp_path, name, saved):
    directory = written(tmp_path, name, saved)
    own = of_mlx.fingerprint(by_mlx(directory))
    for dtype in DTYPES:
        other = of_torch.fingerprint(by_torch(directory, dtype))
        assert are_one(own, other)
        # Nothing is rounded where the dtype is that of the file or wider.
        assert dtype not in (saved, torch.float32) or other.digest == own.digest
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        model = by_mlx(directory)
        model.set_dtype(dtype)
        assert are_one(own, of_mlx.fingerprint(model))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_count_however_they_are_stacked(tmp_path, kind):
    """By one host under another name, with gate and up in one weight or in two."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    experts = {
        **{"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
    }
    latent = {f"{name}_head_dim": 16 for name in ("qk_rope", "qk_nope", "v")}
    config = AutoConfig.for_model(
        **{"model_type": kind, "vocab_size": 257, "num_hidden_layers": 2},
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "shared_expert_intermediate_size": 32},
        **(sizes | heads | experts | latent),
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    own, loaded = of_mlx.fingerprint(by_mlx(tmp_path)), by_torch(tmp_path)
    assert are_one(own, of_torch.fingerprint(loaded))
    down = next(p for name, p in loaded.named_parameters() if name.endswith("experts.down_proj"))
    with torch.no_grad():
        down[2] += 0.01
    assert "layers.0.experts.down_proj has other numbers" in (
        own.difference(of_torch.fingerprint(loaded))
    )


def test_of_a_model_with_vision_the_text_decoder_counts(tmp_path):
    """mlx-lm loads no more of it; layers of both parts have the same names."""
    text = {
        **{"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    }
    vision = {
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    config = Gemma3Config(text_config=text, vision_config=vision, vocab_size=257)
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    own, other = of_torch.fingerprint(model), of_mlx.fingerprint(by_mlx(tmp_path))
    assert own.digest == other.digest
    assert "layers.1.self_attn.k_proj.weight" in own.weights
    assert are_one(own, other)


def test_another_checkpoint_is_another_model(tmp_path):
    first, second = (written(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    own = of_mlx.fingerprint(by_mlx(first))
    for other in (of_mlx.fingerprint(by_mlx(second)), of_torch.fingerprint(by_torch(second))):
        assert not are_one(own, other)


@pytest.mark.parametrize("weight", range(21))
def test_a_fine_tune_of_any_weight_is_another_model(tmp_path, weight):
    """A change of three percent of a weight's size, in bfloat16, as a training makes it."""
    directory = written(tmp_path, dtype=torch.bfloat16)
    own, model = of_mlx.fingerprint(by_mlx(directory)), by_torch(directory, torch.bfloat16)
    name, parameter = list(model.named_parameters())[weight]
    with torch.no_grad():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        parameter.add_((noise * 0.03 * parameter.float().square().mean().sqrt()).bfloat16())
    # No cache depends on the head.
    assert are_one(own, of_torch.fingerprint(model)) == (name == "lm_head.weight")


def test_a_quantized_model_is_another_model(tmp_path):
    directory = written(tmp_path)
    model, own = by_mlx(directory), of_torch.fingerprint(by_torch(directory))
    nn.quantize(model, group_size=32, bits=4)
    quantized = of_mlx.fingerprint(model)
    assert own.difference(quantized) == (
        "embed_tokens.weight has other sizes or another quantization"
    )
    assert are_one(quantized, of_mlx.fingerprint(model))
    layer = model.layers[0].self_attn.k_proj
    layer.weight = layer.weight.at[0, 0].add(1)
    assert quantized.difference(of_mlx.fingerprint(model)) == (
        "layers.0.self_attn.k_proj.weight has other numbers"
    )


def test_an_adapter_makes_another_model(tmp_path):
    """Its weights have names of their own; those that it changes go by another name then."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    directory = written(tmp_path)
    model, other = by_mlx(directory), of_torch.fingerprint(by_torch(directory))
    own = of_mlx.fingerprint(model)
    keys = ["self_attn.q_proj"]
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": keys})
    adapted = of_mlx.fingerprint(model)
    assert {name for name, _ in tree_flatten(model.parameters()) if "lora" in name}
    for base in (own, other):
        assert "only one of them has" in base.difference(adapted)


def test_buffers_that_a_file_keeps_are_weights_too(tmp_path):
    """Where others quantize, the packed weights are buffers. A float of 8 bits is read as well."""
    model = by_torch(written(tmp_path))
    layer = model.model.layers[0].mlp.up_proj
    packed = layer.weight.data.to(torch.float8_e4m3fn)
    del layer.weight
    layer.register_buffer("weight", packed)
    own = of_torch.fingerprint(model)
    assert own.weights["layers.0.mlp.up_proj.weight"].sizes == (64, 96)
    layer.weight = (packed.float() * 2).to(packed.dtype)
    assert "up_proj.weight has other numbers" in own.difference(of_torch.fingerprint(model))


# ---- what is compared ---------------------------------------------------------------------------


def fingerprint_of(host="mlx", **weights):
    """Of arrays by name, where ``__`` stands for a dot."""
    arrays = {name.replace("__", "."): np.asarray(x) for name, x in weights.items()}

    def sample(places):
        return {n: arrays[n][(p,) * arrays[n].ndim].ravel() for n, p in places.items()}

    return Weights(host, {name: x.shape for name, x in arrays.items()}, sample).fingerprint


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_order_of_axes_does_not_matter():
    square, experts = floats(9, 9), floats(4, 12, 10)
    own = fingerprint_of(layers__0__a=square, layers__0__b=experts)
    turned = fingerprint_of("torch", layers__0__a=square.T, layers__0__b=experts.transpose(2, 0, 1))
    assert are_one(own, turned)
    other = fingerprint_of("torch", layers__0__a=square.T[::-1], layers__0__b=experts)
    assert not are_one(own, other)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_norms_to_which_mlx_lm_adds_1_are_the_same(dtype):
    norm, matrix = (floats(16) * 0.1).astype(dtype), floats(16, 16)

    def own(host, shift):
        moved = (norm + dtype(shift)).astype(np.float32)
        return fingerprint_of(host, layers__0__norm=moved, layers__0__a=matrix)

    assert are_one(own("torch", 0), own("mlx", 1))
    assert not are_one(own("torch", 0), own("mlx", 0.5))
    assert not are_one(own("mlx", 0), own("mlx", 1))


def test_packed_words_are_not_rounded():
    """As float32, one of these would be the other in bfloat16."""
    words = np.full((8, 8), 0x3F800000, np.uint32)
    own, other = (
        fingerprint_of(layers__0__a=x, layers__0__b=floats(8, 8)) for x in (words, words + 1)
    )
    assert not are_one(own, other)


def test_hosts_compare_what_both_name_in_every_layer():
    a, b, c = (floats(8, 8, seed=seed) for seed in range(3))
    own = fingerprint_of(layers__0__a=a, layers__1__a=b, layers__1__gate=c)
    assert are_one(own, fingerprint_of("torch", layers__0__a=a, layers__1__a=b, layers__1__up=c))
    without = fingerprint_of("torch", layers__0__a=a, layers__1__up=b)
    assert "in layers.1 no weight has the same name in mlx-lm and transformers" in (
        own.difference(without)
    )
    assert not are_one(own, fingerprint_of("mlx", layers__0__a=a, layers__1__a=b))
    deeper = fingerprint_of("torch", layers__0__a=a, layers__1__a=b, layers__2__a=c)
    assert not are_one(own, deeper)


def test_names_that_hosts_share():
    names = canonical_names(
        [
            "model.language_model.layers.3.mlp.up_proj.weight",
            "transformer.h.0.attn.c_attn.weight",
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.layers.0.mlp.experts.7.w1.weight",
            "model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight",
            "layers.1.experts.gate_up_proj",
            "layers.1.mlp.shared_experts.up_proj.weight",
            "a.layers.5.b",
            "c.layers.5.b",
        ]
    )
    assert sorted(names) == [
        "embed_tokens.weight",
        "h.0.attn.c_attn.weight",
        "layers.0.experts.up_proj",
        "layers.1.experts.gate_up_proj",
        "layers.1.mlp.shared_experts.up_proj.weight",
        "layers.3.mlp.up_proj.weight",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_may_be_rounded_to_a_dtype_and_no_further(dtype):
    """Ties, signs, what overflows and what is subnormal in the dtype; torch is the judge."""
    bits = [0x3F808000, 0x3F818000, 0xBF80FFFF, 0x3F808001, 0x477FFFFF, 0x33000001, 0x80000001, 1]
    numbers = torch.tensor(bits).to(torch.int32).view(torch.float32)
    rounded = numbers.to(dtype).float()

    def made(x):
        return fingerprint_of(layers__0__a=torch.diag(x[:4]), layers__0__b=torch.diag(x[4:]))

    assert made(numbers) != made(rounded)
    assert are_one(made(numbers), made(rounded))
    for place in range(5):
        off = rounded.clone()
        off[place] = torch.nextafter(off[place].to(dtype), torch.tensor(0.0, dtype=dtype)).float()
        assert not are_one(made(numbers), made(off))


def test_numbers_of_one_dtype_are_compared_to_the_last_bit():
    """As a training with a small rate leaves them: a few numbers, one unit away."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    moved = x.clone()
    moved[21, 21] = torch.nextafter(x[21, 21], torch.tensor(9.0, dtype=x.dtype))
    a, b = (fingerprint_of(layers__0__a=y.float()) for y in (x, moved))
    assert not are_one(a, b)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f" * 64,
        "rotormlx fingerprint 2 mlx\nlayers.0.a 8x8 3f800000",
        "rotormlx fingerprint 1 jax\nlayers.0.a 8x8 3f800000",
        "rotormlx fingerprint 1 mlx\nlayers.0.a 8x8 3f8000",
        "rotormlx fingerprint 1 mlx\nlayers.0.a 8x8 i3f80",
        "rotormlx fingerprint 1 mlx\nlayers.0.a 8x8 j3f800000",
        "rotormlx fingerprint 1 mlx\nlayers.0.a 8x8",
        "rotormlx fingerprint 1 mlx\n\n",
    ],
)
def test_another_text_is_none(text):
    assert Fingerprint.from_text(text) is None


def test_weights_that_are_not_in_memory_are_named(tmp_path):
    model = by_torch(written(tmp_path))
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj.weight is on the device meta"):
        of_torch.fingerprint(model)

    class Unreadable(torch.Tensor):
        """As a quantized one may be."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.__getitem__:
                raise NotImplementedError
            return super().__torch_function__(function, types, args, kwargs or {})

    model = by_torch(tmp_path)
    weight = model.model.layers[0].mlp.up_proj.weight.data.as_subclass(Unreadable)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight is a \w+ of torch.float32"):
        of_torch.fingerprint(model)
    with pytest.raises(ValueError, match="must be a model of transformers, but a Linear"):
        of_torch.fingerprint(torch.nn.Linear(2, 2))
