import copy
import errno
import gc
import json
import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.models.base as base
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import (
    CacheList,
    KVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from rotormlx.cli import usage
from rotormlx.config import RotorConfig
from rotormlx.mlx import hosts, integration, prompt_cache
from rotormlx.mlx.cache import files
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.fingerprint import fingerprint
from rotormlx.mlx.host_caches import leaves
from rotormlx.mlx.probe import compress
from rotormlx.storage import cache_file, tensor_file
from rotormlx.storage.fingerprint import MODEL
from tests.support import models as tiny
from tests.support.mlx_lm_versions import model_types, since_0_32

K8V8 = RotorConfig(key_bits=8, value_bits=8)
COARSE = RotorConfig(key_bits=2, value_bits=2)

# Model type -> classes of its caches once compressed.
COMPRESSED = {
    "llama": ["RotorKVCache", "RotorKVCache"],
    "qwen2": ["RotorKVCache", "RotorKVCache"],
    "gemma3_text": ["RotatingKVCache", "RotorKVCache"] * 2,
    "gpt_oss": ["RotatingKVCache", "RotorKVCache"],
    "afm7": ["RotorKVCache", "RotorKVCache"],
    "llama4": ["ChunkedKVCache"] * 3 + ["RotorKVCache"],
    "falcon_h1": ["ArraysCache [0]", "RotorKVCache [1]"] * 2,
}

# Model type -> classes of its caches, those of layers that compute with keys and values themselves.
DECODED = {
    "gemma2": ["DecodedRotorKVCache"] * 2,
    "stablelm": ["DecodedRotorKVCache"] * 2,
    "phi3small": ["DecodedRotorKVCache", "RotorKVCache"],
}


class Attention(nn.Module):
    """Attention of one head, with faults to choose from."""

    def __init__(self, fault: str, head_dim: int) -> None:
        super().__init__()
        self.fault = fault
        self.head_dim = head_dim
        self.o_proj = nn.Linear(head_dim, 8)

    def __call__(self, x: mx.array, cache: object) -> mx.array:
        fresh, other = mx.zeros((2, 1, 1, x.shape[1], self.head_dim))
        if self.fault == "ignores the cache":
            return x
        if self.fault == "index":
            other = fresh
        keys, values = cache.update_and_fetch(fresh, other)
        if self.fault == "index":
            keys, values = keys[:, :, -4:], values[:, :, -4:]
        if self.fault == "attends elsewhere":
            keys = values = fresh
        if self.fault == "only at prefill" and x.shape[1] == 1:
            return x
        if self.fault == "keys as values":
            values = keys
        if self.fault == "a window" and keys.shape[2] > 512:
            keys, values = keys[:, :, -512:], values[:, :, -512:]
        if self.fault == "raises":
            raise KeyError("a bug. And more words.")
        mask = None
        out = base.scaled_dot_product_attention(fresh, keys, values, cache, 1.0, mask)
        return self.o_proj(out[:, 0])


class ToyModel(nn.Module):
    model_type = "toy"

    def __init__(self, fault: str = "", head_dim: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tiny.VOCABULARY, 8)
        self.layers = [Attention("", head_dim), Attention(fault, head_dim)]

    def __call__(self, inputs: mx.array, cache: list) -> mx.array:
        x = self.embedding(inputs)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, layer_cache)
        return x


@pytest.fixture(autouse=True)
def original_code():
    """mlx-lm as it came, before and after each test."""
    hosts.MLX_LM.remove()
    yield base.scaled_dot_product_attention.__code__
    hosts.MLX_LM.remove()


def classes(caches: list) -> list[str]:
    return [label for _, label, _ in leaves(caches)]


def relative_error(got: mx.array, want: mx.array) -> float:
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()


def fill(caches: list, model: nn.Module, count: int) -> list:
    tiny.logits(model, tiny.tokens(count), caches)
    mx.eval([cache.state for cache in caches])
    return caches


# ---- apply --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", model_types(COMPRESSED))
def test_apply_replaces_exactly_the_growing_caches(model_type: str) -> None:
    model = tiny.build(model_type)
    report = integration.apply(model, COARSE)
    caches = make_prompt_cache(model)
    assert classes(caches) == COMPRESSED[model_type]
    rotors = [(i, c) for i, _, c in leaves(caches) if isinstance(c, RotorKVCache)]
    assert all(c.config == COARSE and c.layer == i for i, c in rotors)
    # A line per layer and the summary; a reason exactly where something is left alone.
    lines = str(report).splitlines()
    assert len(lines) == len(COMPRESSED[model_type]) + 1
    for line, name, layer in zip(lines, COMPRESSED[model_type], report.layers, strict=False):
        assert layer.compressed == name.startswith("Rotor") == (not layer.reason)
        assert ("bits per value" in line) == layer.compressed
        assert ("left alone, " in line) != layer.compressed


@pytest.mark.parametrize("model_type", DECODED)
def test_a_layer_with_attention_of_its_own_gets_decoded_tokens(model_type: str) -> None:
    model = tiny.build(model_type)
    report = integration.apply(model, COARSE)
    assert classes(make_prompt_cache(model)) == DECODED[model_type]
    lines = str(report).splitlines()
    for line, name, layer in zip(lines, DECODED[model_type], report.layers, strict=False):
        why = ", decoded for the model's own attention, since the model computes with keys and"
        assert layer.compressed
        assert (why in line) == name.startswith("Decoded")
    count = sum(name.startswith("Decoded") for name in DECODED[model_type])
    assert lines[-1].endswith(f", {count} decoded for the model's own attention")


@pytest.mark.parametrize(
    "model_type", model_types([*COMPRESSED, "gemma2", "stablelm", "deepseek_v3"])
)
def test_packed_logits_are_close_to_the_float_cache(model_type: str) -> None:
    model = tiny.build(model_type)
    inputs = tiny.tokens(300)
    want = tiny.logits(model, inputs, make_prompt_cache(model))
    errors = []
    for config in (K8V8, COARSE):
        integration.apply(model, config)
        caches = make_prompt_cache(model)
        errors.append(relative_error(tiny.logits(model, inputs, caches), want))
        rotors = [c for _, _, c in leaves(caches) if isinstance(c, RotorKVCache)]
        assert all(c.packed_tokens == 192 for c in rotors)
    # 8 bit: a relative error of a code of about 0.006, through two to four layers. 2 bit: 0.34 of
    # that size. A cache that is not read at all gives 0 for both or the same for both.
    assert 0 < errors[0] < 0.02, errors
    assert errors[1] > 4 * errors[0]


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "gemma3_text"])
def test_short_generation_is_the_float_cache_token_for_token(model_type: str) -> None:
    model = tiny.build(model_type)
    prompt = tiny.tokens(20)[0]

    def generated() -> list[int]:
        # 20 + 40 tokens are fewer than sink, window and a block: all of them exact.
        return [token for token, _ in generate_step(prompt, model, max_tokens=40)]

    want = generated()
    assert len(set(want)) > 1
    integration.apply(model, K8V8)
    assert generated() == want


def test_apply_again_replaces_the_configuration() -> None:
    model = tiny.build("llama")
    integration.apply(model, COARSE)
    report = integration.apply(model, K8V8)
    assert report.config == K8V8
    assert integration.model_report(model) is report
    assert [cache.config for cache in make_prompt_cache(model)] == [K8V8, K8V8]
    integration.remove(model)
    assert classes(make_prompt_cache(model)) == ["KVCache", "KVCache"]


def test_apply_computes_nothing() -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096}
    module = __import__("mlx_lm.models.llama", fromlist=["Model"])
    config = {"model_type": "llama"} | tiny.CONFIGS["llama"] | wide
    model = module.Model(module.ModelArgs.from_dict(config))  # weights are not evaluated
    size = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    before = mx.get_active_memory()
    integration.apply(model)
    assert mx.get_active_memory() - before < size / 10


# ---- refusals -----------------------------------------------------------------------------------


def assert_refused(model: nn.Module, reason: str, original_code: object) -> None:
    own = vars(model).get("make_cache")
    with pytest.raises(ValueError, match=r"^\[apply\] .* without rotormlx\.$") as error:
        integration.apply(model)
    message = str(error.value)
    assert model.model_type in message
    assert reason in message
    assert "\n" not in message
    assert vars(model).get("make_cache") is own
    assert base.scaled_dot_product_attention.__code__ is original_code


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("ignores the cache", "left alone, the model does not use this cache"),
        ("index", "left alone, the model selects tokens with this cache, so it must stay exact"),
        ("attends elsewhere", "since the model computes with keys and values itself"),
        ("only at prefill", "since the model computes with keys and values itself"),
        ("keys as values", "read packed in decode steps, since the model keeps latents"),
        ("a window", "since the model computes with keys and values itself"),
    ],
)
def test_a_layer_that_handles_do_not_suit_is_served_otherwise(fault: str, reason: str) -> None:
    fine, other, _ = str(integration.apply(ToyModel(fault))).splitlines()
    assert fine.endswith("bits per value")
    assert reason in other


def test_a_model_that_fails_is_refused(original_code) -> None:
    reason = "the model fails with compressed caches (KeyError: 'a bug); use"
    assert_refused(ToyModel("raises"), reason, original_code)


def test_a_model_with_nothing_to_compress_says_what_it_keeps(original_code) -> None:
    model = tiny.build("mamba2")
    caches = make_prompt_cache(model)
    model(tiny.tokens(3), cache=caches)
    size = f"{sum(cache.nbytes for cache in caches) / 1e6:.2f} MB"
    reason = f"it keeps a state of constant size ({size}), so there is nothing to compress"
    assert_refused(model, reason, original_code)


def test_a_head_dim_that_no_rotation_does_is_refused(original_code) -> None:
    assert_refused(ToyModel(head_dim=44), "layer 0: head_dim must be", original_code)
    integration.apply(ToyModel(head_dim=48))


def test_a_refused_model_leaves_the_hook_of_another_in_place() -> None:
    model = tiny.build("llama")
    integration.apply(model)
    with pytest.raises(ValueError, match="mamba2"):
        integration.apply(tiny.build("mamba2"))
    assert hosts.MLX_LM.installed()


def test_an_incompatible_mlx_lm_changes_nothing(monkeypatch) -> None:
    monkeypatch.setattr(mlx_lm, "__version__", "0.1.0")
    monkeypatch.delattr(base, "scaled_dot_product_attention")
    model = tiny.build("llama")
    with pytest.raises(RuntimeError, match=r"0\.1\.0"):
        integration.apply(model)
    assert "make_cache" not in vars(model)


def test_the_pair_of_mlx_lm_load_is_not_a_model() -> None:
    pair = (tiny.build("llama"), "tokenizer")
    for function in (
        integration.apply,
        integration.remove,
        integration.make_prompt_cache,
        integration.model_report,
    ):
        with pytest.raises(ValueError, match="a tuple was given"):
            function(pair)


# ---- remove -------------------------------------------------------------------------------------


def test_remove_restores_model_and_mlx_lm(original_code) -> None:
    model = tiny.build("llama")
    integration.apply(model)
    integration.remove(model)
    assert "make_cache" not in vars(model)
    assert base.scaled_dot_product_attention.__code__ is original_code
    integration.remove(model)  # nothing left to do
    with pytest.raises(ValueError, match="uses its own"):
        integration.model_report(model)


def test_remove_puts_back_an_attribute_of_the_instance() -> None:
    model = tiny.build("llama")

    def own() -> list:
        return [KVCache(), RotatingKVCache(max_size=8)]

    model.make_cache = own
    integration.apply(model)
    assert classes(model.make_cache()) == ["RotorKVCache", "RotatingKVCache"]
    integration.apply(model, K8V8)
    integration.remove(model)
    assert model.make_cache is own


def test_what_makes_the_caches_outlives_its_model() -> None:
    model = tiny.build("llama")
    model.make_cache = lambda: [KVCache()]
    integration.apply(model)
    maker = model.make_cache
    del model
    gc.collect()
    hosts.MLX_LM.release(None)
    assert not hosts.MLX_LM.installed()
    assert classes(maker()) == ["RotorKVCache"]
    assert hosts.MLX_LM.installed()


def test_two_models_live_side_by_side(original_code) -> None:
    models = [tiny.build("llama", seed) for seed in range(3)]
    inputs = tiny.tokens(150)
    want = tiny.logits(models[2], inputs, make_prompt_cache(models[2]))
    integration.apply(models[0], COARSE)
    integration.apply(models[1], K8V8)
    assert mx.array_equal(tiny.logits(models[2], inputs, make_prompt_cache(models[2])), want)
    integration.remove(models[0])
    integration.remove(models[2])  # never applied
    assert hosts.MLX_LM.installed()
    assert classes(make_prompt_cache(models[0])) == ["KVCache", "KVCache"]
    assert [cache.config for cache in make_prompt_cache(models[1])] == [K8V8, K8V8]
    fill(make_prompt_cache(models[1]), models[1], 150)
    integration.remove(models[1])
    assert base.scaled_dot_product_attention.__code__ is original_code


def test_a_dead_model_does_not_keep_the_hook(original_code) -> None:
    model, other = tiny.build("llama"), ToyModel()
    integration.apply(model)
    integration.apply(other)
    del other
    integration.remove(model)
    assert base.scaled_dot_product_attention.__code__ is original_code


def test_a_copy_works_after_the_model_is_gone() -> None:
    model = tiny.build("llama")
    integration.apply(model, K8V8)
    clone = copy.deepcopy(model)
    integration.remove(model)
    del model
    assert fill(make_prompt_cache(clone), clone, 150)[0].packed_tokens == 64


# ---- load and make_prompt_cache -----------------------------------------------------------------


def test_load_passes_its_arguments_on(tmp_path) -> None:
    path = tiny.save(tmp_path)
    model, tokenizer, config = integration.load(path, COARSE, return_config=True)
    assert integration.model_report(model).config == COARSE
    assert config["model_type"] == "llama"
    assert tokenizer.encode("abc")
    assert integration.model_report(integration.load(path)[0]).config == RotorConfig()


@pytest.mark.parametrize("lazy", [False, True])
def test_load_reads_weights_unless_lazy(tmp_path, lazy: bool) -> None:
    path = tiny.save(tmp_path, hidden_size=512)
    size = (tmp_path / "model.safetensors").stat().st_size
    before = mx.get_active_memory()
    loaded = integration.load(path, lazy=lazy)
    assert (mx.get_active_memory() - before > 0.9 * size) != lazy
    assert loaded


def test_load_refuses_before_it_reads_weights(tmp_path) -> None:
    path = tiny.save(tmp_path, "mamba2", hidden_size=512, num_heads=64)
    size = (tmp_path / "model.safetensors").stat().st_size
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(ValueError, match="mamba2"):
        integration.load(path)
    assert mx.get_peak_memory() - before < size / 10


def test_make_prompt_cache_leaves_the_model_as_it_is(original_code) -> None:
    model = tiny.build("llama")
    caches = integration.make_prompt_cache(model, COARSE)
    assert [cache.config for cache in caches] == [COARSE, COARSE]
    assert classes(make_prompt_cache(model)) == ["KVCache", "KVCache"]
    assert fill(caches, model, 150)[0].packed_tokens == 64
    integration.remove(model)
    assert base.scaled_dot_product_attention.__code__ is original_code


def test_make_prompt_cache_takes_the_configuration_of_the_model() -> None:
    model = tiny.build("llama")
    integration.apply(model, K8V8)
    assert integration.make_prompt_cache(model)[0].config == K8V8
    assert integration.make_prompt_cache(model, COARSE)[0].config == COARSE
    assert make_prompt_cache(model)[0].config == K8V8
    with pytest.raises(ValueError, match="mamba2"):
        integration.make_prompt_cache(tiny.build("mamba2"))


# ---- report -------------------------------------------------------------------------------------


def test_report_counts_bytes() -> None:
    config = RotorConfig(key_bits=4, value_bits=3)
    report = integration.apply(tiny.build("llama"), config)
    layer = report.layers[1]
    assert (layer.kv_heads, layer.head_dim_k, layer.head_dim_v) == (2, 64, 64)
    # Code, scale, centre: 4 + 16 / 64 + 16 / 64 for a key, 3 + 16 / 64 for a value.
    assert (layer.key_bits, layer.value_bits) == (4.5, 3.25)
    assert report.bits_per_value == layer.bits_per_value == (4.5 + 3.25) / 2
    # Two layers of two heads; 4 + 64 + 49 of 501 tokens stay exact in float32.
    assert report.float_bytes(501) == 2 * 2 * 501 * 128 * 2
    packed = 2 * 2 * 384 * 64 * (4.5 + 3.25) / 8
    scales = 2 * 2 * 128 * 4
    assert report.compressed_bytes(501) == packed + 2 * 2 * (501 - 384) * 128 * 4 + scales
    for tokens in (3, 131):
        assert report.compressed_bytes(tokens) == 2 * 2 * tokens * 128 * 4


def test_report_counts_what_is_left_alone_at_float16() -> None:
    report = integration.apply(tiny.build("gemma3_text"))
    window, growing = report.layers[0], report.layers[1]
    assert window.float_bytes(10_000) == window.float_bytes(32) == 32 * 2 * 64 * 2
    assert window.compressed_bytes(10_000, report.config) == window.float_bytes(32)
    assert growing.float_bytes(10_000) == 10_000 * 2 * 64 * 2
    total = 2 * (window.float_bytes(32) + growing.compressed_bytes(10_000, report.config))
    assert report.compressed_bytes(10_000) == total


def test_report_counts_states_of_constant_size() -> None:
    model = tiny.build("falcon_h1")
    report = integration.apply(model)
    caches = fill(model.make_cache(), model, 100)
    assert (
        report.layers[0].float_bytes(5) == report.layers[0].float_bytes(500) == caches[0][0].nbytes
    )


@pytest.mark.parametrize("count", [90, 1000])
def test_report_foresees_the_bytes_of_a_filled_cache(count: int) -> None:
    model = tiny.build("llama")
    report = integration.apply(model)
    caches = fill(model.make_cache(), model, count)
    # Exactly what is saved, and what is allocated but for room: a chunk of 60 exact tokens, and
    # four blocks once there is one.
    size = sum(part.nbytes for c in caches for part in c.state if isinstance(part, mx.array))
    assert report.compressed_bytes(count) == size
    layer = report.layers[0]
    room = 64 * layer.values_per_token * 4 + 4 * 64 * layer.packed_bits_per_token / 8
    assert 0 <= sum(cache.nbytes for cache in caches) - size <= len(caches) * room
    said = usage.describe(report, caches)
    packed = (count - 68) // 64 * 64
    assert f"{packed:,} of {count:,} tokens packed" in said
    assert ("all exact: packing starts at 132 tokens" in said) == (packed == 0)
    assert f"{size / 1e6:.2f} MB against {report.float_bytes(count) / 1e6:.2f} MB" in said


# ---- prompt cache files -------------------------------------------------------------------------


def saved(path, model: nn.Module, count: int = 150) -> str:
    save_prompt_cache(str(path), fill(make_prompt_cache(model), model, count), {"model": "m"})
    return str(path)


def test_a_saved_compressed_cache_continues_bit_for_bit(tmp_path) -> None:
    model = tiny.build("falcon_h1")
    integration.apply(model, COARSE)
    path = saved(tmp_path / "cache.safetensors", model)
    want = tiny.logits(model, tiny.tokens(70, seed=2), fill(make_prompt_cache(model), model, 150))
    hosts.MLX_LM.remove()
    caches, metadata = prompt_cache.read_prompt_cache(path, model)
    assert metadata == {"model": "m"}
    assert prompt_cache.adopt_prompt_cache("c.safetensors", model, caches) == 0
    assert mx.array_equal(tiny.logits(model, tiny.tokens(70, seed=2), caches), want).item()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "falcon_h1"])
def test_a_plain_cache_is_compressed_in_place(tmp_path, model_type: str) -> None:
    model = tiny.build(model_type)
    path = saved(tmp_path / "cache.safetensors", model, 300)
    report = integration.apply(model, COARSE)
    caches, _ = prompt_cache.read_prompt_cache(path, model)
    converted = prompt_cache.adopt_prompt_cache("c.safetensors", model, caches)
    assert converted == sum(layer.compressed for layer in report.layers)
    assert classes(caches) == COMPRESSED[model_type]
    rotors = [(i, c) for i, _, c in leaves(caches) if isinstance(c, RotorKVCache)]
    assert all(c.layer == i and c.config == COARSE and c.packed_tokens == 192 for i, c in rotors)
    assert tiny.logits(model, tiny.tokens(3), caches).shape == (1, 3, tiny.VOCABULARY)


def llama_cache(**changes) -> list:
    model = tiny.build("llama", **changes)
    return fill(make_prompt_cache(model), model, 10)


def rotor_cache(config: RotorConfig, layers: tuple[int, ...] = (0, 1)) -> list:
    model = tiny.build("llama")
    integration.apply(model, config)
    caches = [RotorKVCache(config, layer) for layer in layers]
    return fill(caches, model, 10)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: llama_cache(num_hidden_layers=3), "requires 2 caches, but c.safetensors has 3"),
        (lambda: llama_cache(head_dim=32), "of 64 and 64 dimensions in layer 0, but .* 32 and 32"),
        (lambda: llama_cache(num_key_value_heads=4), "2 KV heads .* but c.safetensors has 4 of"),
        (lambda: [KVCache(), RotatingKVCache(8)], "KVCache in layer 1, but .* RotatingKVCache"),
        (lambda: [KVCache(), CacheList(KVCache(), KVCache())], "requires 2 caches, .* has 3"),
        (lambda: [c.to_quantized() for c in llama_cache()], "but .* QuantizedKVCache"),
        (lambda: rotor_cache(K8V8, (1, 0)), "layer 0 at position 0, but .* has layer 1"),
    ],
)
def test_a_cache_of_another_model_is_refused(make, reason: str) -> None:
    model, caches = tiny.build("llama"), make()
    integration.apply(model, K8V8)
    before = list(caches)
    with pytest.raises(ValueError, match=rf"^\[prompt cache\] .*{reason}.*\.$"):
        prompt_cache.adopt_prompt_cache("c.safetensors", model, caches)
    assert all(cache is old for cache, old in zip(caches, before, strict=True))


def test_a_cache_of_another_configuration_goes_on_with_its_own(tmp_path) -> None:
    """Its bits stay, the report says so, and None for the channel scale is what it stands for."""
    model = tiny.build("llama")
    path = str(tmp_path / "c.safetensors")
    integration.apply(model, RotorConfig(8, 3, channel_scale="prefill", window=10))
    caches = fill(integration.make_prompt_cache(model), model, 150)
    prompt_cache.save_prompt_cache(path, model, caches)
    want = tiny.logits(model, tiny.tokens(70, seed=2), caches)
    own = integration.apply(model, RotorConfig(2, 2, "rotor3"))
    loaded, _ = prompt_cache.load_prompt_cache(path, model)
    assert mx.array_equal(tiny.logits(model, tiny.tokens(70, seed=2), loaded), want).item()
    said = prompt_cache.report_of(model, loaded)
    assert "K8 V3 cascade" in said.summary
    assert said.bits_per_value == pytest.approx(loaded[0].bits_per_value)
    assert prompt_cache.report_of(model, integration.make_prompt_cache(model)) is own
    own = integration.apply(model, RotorConfig(8, 3, window=10))
    assert prompt_cache.report_of(model, loaded) is own


def test_a_sliding_window_of_another_size_is_refused() -> None:
    model, other = tiny.build("gemma3_text"), tiny.build("gemma3_text", sliding_window=16)
    caches = make_prompt_cache(other)
    integration.apply(model)
    with pytest.raises(ValueError, match=r"a window of 32 tokens in layer 0, but .* has 16"):
        prompt_cache.adopt_prompt_cache("c.safetensors", model, caches)


def another_version(path) -> None:
    arrays, metadata = mx.load(str(path), return_metadata=True)
    arrays["0.0"] = mx.array(99)  # the first field of the first cache
    mx.save_safetensors(str(path), arrays, metadata)


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def text(path) -> None:
    path.write_text("this is no prompt cache at all")


def weights(path) -> None:
    mx.save_safetensors(str(path), {"model.weight": mx.zeros(3)})


def another_class(path) -> None:
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.save_safetensors(str(path), arrays, metadata | {"1.0": "FutureCache"})


def another_number(path) -> None:
    arrays, metadata = mx.load(str(path), return_metadata=True)
    arrays["0.15"] = arrays.pop("0.14")  # the last field of the first cache
    metadata = {k: "0.15" if v == "0.14" else v for k, v in metadata.items()}
    mx.save_safetensors(str(path), arrays, metadata)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (another_version, "99"),
        (another_number, "number its entries from 0"),
        (truncate, r"must have \d+ bytes of tensors, but it has \d+"),
        (cut_header, "must have a safetensors header"),
        (text, "must have a safetensors header"),
        (weights, "another safetensors file"),
        (another_class, "FutureCache"),
        (lambda path: path.unlink(), "existing file"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path, damage, reason: str) -> None:
    model = tiny.build("llama")
    integration.apply(model)
    path = tmp_path / "cache.safetensors"
    saved(path, model)
    prompt_cache.read_prompt_cache(str(path), model)
    damage(path)
    with pytest.raises(ValueError, match=rf"(?s)^\[prompt cache\] .*{reason}") as error:
        prompt_cache.read_prompt_cache(str(path), model)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def sealed_file(path) -> tuple[Any, list]:
    """A model, and the caches that it has saved with a checksum."""
    model = tiny.build("llama")
    integration.apply(model)
    caches = fill(make_prompt_cache(model), model, 150)
    prompt_cache.save_prompt_cache(str(path), model, caches, {"note": "kept"})
    return model, caches


@since_0_32("reads our files by our own code, which looks at the checksum")
def test_a_changed_number_is_seen_by_the_checksum(tmp_path) -> None:
    path = tmp_path / "cache.safetensors"
    model, _ = sealed_file(path)
    data = bytearray(path.read_bytes())
    data[-(len(data) // 3)] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^\[prompt cache\] .* must match its checksum"):
        prompt_cache.load_prompt_cache(str(path), model)
    assert len(load_prompt_cache(str(path))) == 2  # which mlx-lm does not look at


def test_a_file_without_the_suffix_gets_it(tmp_path) -> None:
    model, _ = sealed_file(tmp_path / "cache")
    assert prompt_cache.load_prompt_cache(str(tmp_path / "cache.safetensors"), model)[1] == {
        "note": "kept",
        MODEL: fingerprint(model).text,
    }


@pytest.mark.parametrize("name", ["print", "LRUPromptCache", "QuantizedKVCache", "_BaseCache", ""])
@pytest.mark.parametrize("in_list", [False, True], ids=["alone", "in-a-list"])
def test_a_class_that_is_not_listed_is_never_called(tmp_path, monkeypatch, name, in_list) -> None:
    model = tiny.build("llama")
    integration.apply(model)
    path = tmp_path / "cache.safetensors"
    called = []
    monkeypatch.setattr(mlx_lm_cache, name or "none", called.append, raising=False)
    if in_list:
        cache_file.write(path, ["CacheList"], [[[[None, None, 0], name]]], {}, None)
    else:
        cache_file.write(path, [name], [[None, None, 0]], {}, None)
    with pytest.raises(
        ValueError, match=r"must hold caches of KVCache, .* or CacheList, but it has"
    ):
        prompt_cache.load_prompt_cache(str(path), model)
    assert called == []


def test_a_cache_of_another_model_is_refused_before_an_array_is_read(tmp_path, monkeypatch) -> None:
    path = tmp_path / "cache.safetensors"
    sealed_file(path)
    other = tiny.build("llama", head_dim=32)
    integration.apply(other)
    monkeypatch.setattr(
        tensor_file.TensorFile, "tensors", lambda self: pytest.fail("arrays were read")
    )
    with pytest.raises(ValueError, match="requires 2 KV heads of 32 and 32"):
        prompt_cache.read_prompt_cache(str(path), other)


# entry of layer 0, what it is changed to, part of the message
STATES = {
    "version": (0, 1, "format version 2, which this rotormlx reads"),
    "version-true": (0, True, "format version 2"),
    "config": (1, "{}", "a configuration in a RotorKVCache"),
    "config-nested": (1, "[" * 5000, "a configuration in a RotorKVCache"),
    "config-number": (1, "9" * 5000, "a configuration in a RotorKVCache"),
    "layer": (2, -1, "integers from 0"),
    "layer-real": (2, 0.0, "integers from 0"),
    "tokens": (3, 149, "exact keys of dtype and shape"),
    "tokens-many": (3, 2**31 - 1, "exact keys of dtype and shape"),
    "packed": (4, 128, "exact keys of dtype and shape"),
    "packed-many": (4, 192, "counts that add up"),
    "exact": (5, mx.zeros((2, 86, 64)), "exact keys as a floating array of 4 dimensions"),
    "exact-dtype": (5, mx.zeros((1, 2, 86, 64), mx.int32), "exact keys as a floating array"),
    "exact-none": (5, None, "exact keys as a floating array"),
    "words": (6, mx.zeros((1, 2, 1, 8, 63), mx.uint32), "key words of dtype and shape"),
    "words-dtype": (6, mx.zeros((1, 2, 1, 8, 64), mx.int32), "key words of dtype and shape"),
    "scales": (7, mx.zeros((1, 2, 2, 64), mx.float16), "key scales of dtype and shape"),
    "centres": (8, None, "key centres of dtype and shape"),
    "channel-scale": (9, mx.ones((2, 63)), "key channel scale of dtype and shape"),
    "values": (10, mx.zeros((1, 4, 86, 64)), "value words of dtype and shape"),
    "value-centres": (13, mx.zeros((1, 2, 1, 64), mx.float16), "value centres of dtype and shape"),
    "one-more": (15, 0, "entries in a RotorKVCache"),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("in_batch", [False, True], ids=["single", "batch"])
def test_a_state_that_does_not_add_up_is_refused(tmp_path, monkeypatch, name, in_batch) -> None:
    """From the header alone; the checksum of the file is right."""
    entry, value, message = STATES[name]
    path = tmp_path / "cache.safetensors"
    model, caches = sealed_file(path)
    held = BatchRotorKVCache.merge(caches[:1]) if in_batch else caches[0]
    state = list(held.state)
    if in_batch and entry in (3, 4):  # a table of the counts of each row
        counts = np.array(state[4])
        counts[0, entry - 3] = value
        entry, value = 4, mx.array(counts)
    if name == "one-more" and in_batch:
        state += [0]
    state[entry : entry + 1] = [value]
    monkeypatch.setattr(
        tensor_file.TensorFile, "tensors", lambda self: pytest.fail("arrays were read")
    )
    message = message.replace("a RotorKVCache", f"a {type(held).__name__}")
    cache_file.write(path, [type(held).__name__], [state], {}, files._tensor)
    with pytest.raises(ValueError, match=rf"^\[prompt cache\] .*{message}"):
        prompt_cache.load_prompt_cache(str(path), model)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "cache.safetensors"
    model, caches = sealed_file(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"\[prompt cache\] .* could not be written: No space left"):
        prompt_cache.save_prompt_cache(str(path), model, caches, {"note": "new"})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_mlx_lm_itself_loads_the_cache_once_installed(tmp_path) -> None:
    model = tiny.build("llama")
    integration.apply(model, COARSE)
    caches = load_prompt_cache(saved(tmp_path / "cache.safetensors", model))
    assert [json.loads(cache.config.to_json())["key_bits"] for cache in caches] == [2, 2]


def test_other_weights_of_the_same_shape_are_refused(tmp_path) -> None:
    """The fingerprint tells models apart that agree in every shape."""
    models = [tiny.build("llama", seed=seed) for seed in (0, 1)]
    for model in models:
        integration.apply(model)
    path = str(tmp_path / "c.safetensors")
    caches = fill(make_prompt_cache(models[0]), models[0], 150)
    prompt_cache.save_prompt_cache(path, models[0], caches, {"note": "kept"})
    loaded, metadata = prompt_cache.load_prompt_cache(path, models[0])
    assert metadata["note"] == "kept"
    for ours, theirs in zip(loaded, caches, strict=True):
        assert mx.array_equal(ours.state[6], theirs.state[6])
    with pytest.raises(
        ValueError, match=r"c\.safetensors must be of this llama, but other weights"
    ):
        prompt_cache.load_prompt_cache(path, models[1])
    # One number of one matrix more or less.
    weight = models[1].layers[1].self_attn.k_proj.weight
    before = fingerprint(models[1])
    models[1].layers[1].self_attn.k_proj.weight = weight + mx.zeros_like(weight).at[0, 0].add(1.0)
    assert fingerprint(models[1]) != before


def test_what_a_file_says_is_fit_to_be_printed(tmp_path) -> None:
    model = tiny.build("llama")
    integration.apply(model)
    path = str(tmp_path / "c.safetensors")
    save_prompt_cache(path, make_prompt_cache(model), {MODEL: "\x1b[2J\u0663"})
    with pytest.raises(ValueError, match="name its model") as error:
        prompt_cache.load_prompt_cache(path, model)
    assert str(error.value).isascii()
    assert str(error.value).isprintable()


def test_a_file_of_mlx_lm_alone_has_no_fingerprint_and_is_taken(tmp_path) -> None:
    model = tiny.build("llama")
    path = saved(tmp_path / "c.safetensors", model)
    integration.apply(model)
    caches, _ = prompt_cache.load_prompt_cache(path, model)
    assert classes(caches) == ["RotorKVCache"] * 2


# ---- a limit ------------------------------------------------------------------------------------


def greedy(model: nn.Module, prompt: mx.array, count: int, **options) -> list[int]:
    steps = generate_step(prompt, model, max_tokens=count, **options)
    return [token for token, _ in steps]


def test_max_kv_size_of_generate_is_honoured(monkeypatch) -> None:
    """mlx-lm drops it where a model makes its caches itself; it must not be dropped silently."""
    model = tiny.build("llama")
    integration.apply(model, RotorConfig(8, 8))
    made = []
    limited = integration.CompressedCaches.limited

    def recording(maker, size):
        made.append(limited(maker, size))
        return made[-1]

    monkeypatch.setattr(integration.CompressedCaches, "limited", recording)
    prompt = tiny.tokens(600)[0]
    got = greedy(model, prompt, 20, max_kv_size=300, prefill_step_size=64)
    for cache in made[0]:
        assert (cache.max_size, cache.offset >= 619) == (300, True)
        assert 300 - 128 < cache.size() <= 300
    own = integration.make_prompt_cache(model, max_kv_size=300)
    assert greedy(model, prompt, 20, prompt_cache=own, prefill_step_size=64) == got
    # A limit that is never reached changes nothing; one that is reached does.
    free = greedy(model, prompt, 20, prefill_step_size=64)
    assert greedy(model, prompt, 20, max_kv_size=1000, prefill_step_size=64) == free
    assert got != free
    with pytest.raises(ValueError, match="max_kv_size must be at least 195"):
        greedy(model, prompt, 20, max_kv_size=100)


def test_max_kv_size_of_an_uncompressed_model_is_mlx_lms() -> None:
    other = tiny.build("qwen2", seed=1)
    integration.apply(other)
    model = tiny.build("qwen2")  # has no make_cache of its own
    assert classes(make_prompt_cache(model, 64)) == ["RotatingKVCache"] * 2
    assert classes(make_prompt_cache(other, 400)) == ["RotorKVCache"] * 2


@pytest.mark.parametrize("start", [0, 5000])
@pytest.mark.parametrize("model_type", model_types(COMPRESSED))
def test_kv_bits_is_a_warning_whatever_else_a_model_has(model_type: str, start: int) -> None:
    """mlx-lm cannot quantize a sliding window, and says so in the middle of the prompt."""
    model = tiny.build(model_type)
    integration.apply(model, RotorConfig(8, 8))
    prompt = tiny.tokens(150)[0]
    want = greedy(model, prompt, 5)
    caches = make_prompt_cache(model)
    with pytest.warns(UserWarning, match="kv_bits=8 asks for mlx-lm's own"):
        got = greedy(model, prompt, 5, prompt_cache=caches, kv_bits=8, quantized_kv_start=start)
    assert (got, classes(caches)) == (want, COMPRESSED[model_type])


def test_kv_bits_of_an_uncompressed_model_is_mlx_lms() -> None:
    other = tiny.build("qwen2", seed=1)
    integration.apply(other)
    model = tiny.build("llama")
    caches = make_prompt_cache(model)
    greedy(model, tiny.tokens(20)[0], 2, prompt_cache=caches, kv_bits=8, quantized_kv_start=0)
    assert classes(caches) == ["QuantizedKVCache"] * 2


# ---- caches that meet a model that is not compressed --------------------------------------------


def by_hand(model: nn.Module) -> list:
    return compress(make_prompt_cache(model), lambda layer: RotorKVCache(layer=layer))


@pytest.mark.parametrize("make", [by_hand, integration.make_prompt_cache])
@pytest.mark.parametrize("model_type", model_types(sorted(COMPRESSED)))
def test_without_a_compressed_model_a_cache_is_refused(model_type: str, make) -> None:
    model = tiny.build(model_type)
    caches = make(model)
    batch = [c.merge([c]) if hasattr(c, "merge") else c for c in make(model)]
    integration.remove(model)
    for held in (caches, batch):
        with pytest.raises(
            ValueError, match=r"RotorKVCache\] .*; call rotormlx.apply\(model\) fir"
        ):
            model(tiny.tokens(70), cache=held)
    # A model that is compressed has taught mlx-lm; that is all that was missing.
    other = tiny.build("llama", seed=1)
    integration.apply(other)
    assert model(tiny.tokens(70), cache=make(model)).shape == (1, 70, tiny.VOCABULARY)


def test_a_model_that_takes_views_apart_is_told_what_to_do() -> None:
    """Though the attention can read them: another model is compressed."""
    other = tiny.build("llama")
    integration.apply(other)
    model = tiny.build("deepseek_v3")
    with pytest.raises(AttributeError, match=r"uses their swapaxes; call rotormlx.apply\(model"):
        model(tiny.tokens(3), cache=by_hand(model))


def test_a_view_is_no_array() -> None:
    x = mx.ones((1, 2, 3, 64))
    keys, _ = RotorKVCache().update_and_fetch(x, x)
    for use in (lambda: keys[0], lambda: keys @ x, lambda: keys + x, lambda: -keys):
        with pytest.raises(TypeError, match=r"call rotormlx.apply\(model\) first"):
            use()
    assert not hasattr(keys, "transpose")
    assert copy.copy(keys).exact is keys.exact


# ---- speculative decoding -----------------------------------------------------------------------


@pytest.mark.parametrize("accepts", [True, False], ids=["good draft", "bad draft"])
def test_a_draft_model_changes_no_token(accepts: bool) -> None:
    """Both caches are compressed; rejected drafts are trimmed away, into packed blocks too."""
    model = tiny.build("llama")
    draft = tiny.build("llama", seed=0 if accepts else 1)
    for m in (model, draft):
        integration.apply(m, RotorConfig(8, 8, window=0))
    prompt = tiny.tokens(200)[0]
    want = greedy(model, prompt, 80)
    caches = make_prompt_cache(model) + make_prompt_cache(draft)
    steps = speculative_generate_step(
        prompt, model, draft, num_draft_tokens=4, max_tokens=80, prompt_cache=caches
    )
    got = list(steps)
    assert [token for token, _, _ in got] == want
    drafted = sum(from_draft for _, _, from_draft in got)
    assert drafted > 40 if accepts else drafted < 40
    assert {type(cache) for cache in caches} == {RotorKVCache}
    assert all(cache.packed_tokens >= 192 for cache in caches)


@pytest.mark.parametrize("accepts", [True, False], ids=["good draft", "bad draft"])
def test_a_draft_model_with_limited_caches(accepts: bool) -> None:
    """Tokens are evicted before, and rejected ones are taken back from the window."""
    model = tiny.build("llama")
    draft = tiny.build("llama", seed=0 if accepts else 1)
    for m in (model, draft):
        integration.apply(m, RotorConfig(8, 8))
    prompt = tiny.tokens(400)[0]
    want = greedy(model, prompt, 30, prompt_cache=make_prompt_cache(model, 300))
    caches = make_prompt_cache(model, 300) + make_prompt_cache(draft, 300)
    steps = speculative_generate_step(
        prompt, model, draft, num_draft_tokens=4, max_tokens=30, prompt_cache=caches
    )
    got = []
    for token, _, from_draft in steps:
        got.append((token, from_draft))
        assert can_trim_prompt_cache(caches)
    assert [token for token, _ in got] == want
    drafted = sum(from_draft for _, from_draft in got)
    assert drafted > 15 if accepts else drafted < 15
    assert all(cache.counts.evicted and cache.size() <= 300 for cache in caches)
    # What was written, but for the last token, which nobody has read.
    assert caches[0].offset in (400 + 29, 400 + 30)
    assert not can_trim_prompt_cache(caches)


def test_a_draft_beyond_the_window_needs_caches_without_a_limit() -> None:
    model = tiny.build("llama")
    integration.apply(model, RotorConfig(8, 8, window=3))
    caches = make_prompt_cache(model, 300) + make_prompt_cache(model)
    options = {"num_draft_tokens": 4, "max_tokens": 300, "prompt_cache": caches}
    with pytest.raises(ValueError, match="may add 704 tokens"):
        speculative_generate_step(tiny.tokens(400)[0], model, model, **options)


# ---- what mlx-lm documents of prompt caches -----------------------------------------------------


def test_a_trimmed_cache_answers_again_as_the_first_time() -> None:
    model = tiny.build("llama")
    integration.apply(model, RotorConfig(8, 8))
    caches = make_prompt_cache(model)
    prompt = tiny.tokens(150)[0]
    first = greedy(model, prompt, 30, prompt_cache=caches)
    assert can_trim_prompt_cache(caches)
    # One token more than it gave was computed; the last of the prompt is read again.
    count = caches[0].offset - (len(prompt) - 1)
    assert trim_prompt_cache(caches, count) == count
    assert greedy(model, prompt[-1:], 30, prompt_cache=caches) == first


def test_a_copied_cache_goes_its_own_way() -> None:
    model = tiny.build("llama")
    integration.apply(model, RotorConfig(8, 8))
    caches = fill(make_prompt_cache(model), model, 150)
    twin = copy.deepcopy(caches)
    a, b = tiny.tokens(5, seed=5)[0], tiny.tokens(5, seed=6)[0]
    first = greedy(model, a, 30, prompt_cache=caches)
    other = greedy(model, b, 30, prompt_cache=copy.deepcopy(twin))
    assert greedy(model, a, 30, prompt_cache=twin) == first
    assert other != first
