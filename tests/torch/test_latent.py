"""Latents that models of transformers keep in their cache (MLA), compressed as such."""

import copy

import pytest
import torch

import rotormlx.torch as rt
from rotormlx.codec.parts import ROPE_BITS
from rotormlx.config import RotorConfig
from rotormlx.storage import cache_file
from rotormlx.torch.cache import RotorCache
from rotormlx.torch.latent_layer import RotorIndexedLatentLayer, RotorLatentLayer
from rotormlx.torch.probe import own_cache
from tests.support import torch_zoo

K8V8 = RotorConfig(8, 8, sink=2, window=8)
COARSE = RotorConfig(2, 2, sink=2, window=8)
DENSE = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash", "youtu")
SPARSE = ("deepseek_v32", "glm_moe_dsa", "hy_v4")
PROMPT, STEPS = 150, 6


def read(model, ids, cache, *, mask=None):
    """Logits behind a prompt that is read at once: a chunk, then steps."""
    logits, place = [], 0
    with torch.no_grad():
        for count in (PROMPT, 40, *[1] * STEPS):
            given = {"input_ids": ids[:, place : place + count], "cache": cache}
            place += count
            if mask is not None:
                given["attention_mask"] = mask[:, :place]
            logits.append(model(**given, use_cache=True).logits)
    return torch.cat(logits[1:], 1)


def errors(got, want):
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


def compressed(model, config):
    rt.apply(model, config)
    return model._prepare_cache_for_generation.new()


@pytest.mark.parametrize("model_type", [*DENSE, *SPARSE])
def test_logits_are_near_the_exact_ones(model_type):
    model, ids = torch_zoo.build(model_type), torch_zoo.tokens(PROMPT + 40 + STEPS)
    attention = model.config._attn_implementation
    want = read(model, ids, own_cache(model))
    found = []
    for config in (K8V8, COARSE):
        cache = compressed(model, config)
        assert model.config._attn_implementation == attention
        found.append(errors(read(model, ids, cache), want).median())
        kind = RotorIndexedLatentLayer if model_type in SPARSE else RotorLatentLayer
        assert {type(layer) for layer in cache.rotor_layers} == {kind}
        assert cache.packed_tokens == 128
    # 8 bits leave 0.7 % of a latent; the median, since a router may choose other experts.
    assert 0 < found[0] < 0.01
    assert found[1] > 4 * found[0]
    rt.remove(model)
    assert torch.equal(read(model, ids, own_cache(model)), want)


def test_the_report_says_what_is_compressed():
    model = torch_zoo.build("deepseek_v3")
    report = rt.report(model, RotorConfig(3, 4))
    layer = report.layers[0]
    assert layer.holds_latents
    assert "latent of 32 and RoPE part of 16" in str(layer)
    # Codes of 4 and 8 bits, two scales, two centres of a block.
    assert layer.packed_bits_per_token / 8 == 32 / 2 + 16 * ROPE_BITS / 8 + 2 * 2 + 48 / 32


def test_packed_bytes_do_not_depend_on_chunks():
    ids = torch.randn(2, 1, 300, 32), torch.randn(2, 1, 300, 16)
    layers = []
    for chunk in (300, 37, 1):
        layer = RotorLatentLayer(RotorConfig(3, 3), 0)
        for start in range(0, 300, chunk):
            layer.update(*(x[:, :, start : start + chunk] for x in ids))
        layers.append(layer)
    for layer in layers[1:]:
        assert layer.packed == layers[0].packed == [192, 192]
        for store, other in zip(layer.stores, layers[0].stores, strict=True):
            for a, b in zip(store.packed, other.packed, strict=True):
                assert (a is b is None) or torch.equal(a[:, :, :3], b[:, :, :3])


def test_left_padding_is_hidden_by_the_models_mask():
    model, ids = torch_zoo.build("deepseek_v3"), torch_zoo.tokens(PROMPT + 40 + STEPS)
    want = read(model, ids, own_cache(model))
    padded = torch.cat([torch.full((1, 20), 7), ids[:, :-20]], 1)
    both = torch.cat([ids, padded])
    mask = torch.ones_like(both)
    mask[1, :20] = 0
    exact = read(model, both, own_cache(model), mask=mask)
    got = read(model, both, compressed(model, K8V8), mask=mask)
    assert errors(got[0], want[0]).median() < 0.01
    assert errors(got[1], exact[1]).median() < 0.01


def test_cropped_copied_and_repeated():
    model, ids = torch_zoo.build("deepseek_v32"), torch_zoo.tokens(PROMPT + 40 + STEPS)
    cache = compressed(model, K8V8)
    want = read(model, ids, cache)
    with torch.no_grad():
        cache.crop(-STEPS)
        assert cache.get_seq_length() == PROMPT + 40
        twin = copy.deepcopy(cache)
        twin.batch_repeat_interleave(2)
        last = ids[:, -STEPS : -STEPS + 1]
        once = model(input_ids=last, cache=cache).logits
        twice = model(input_ids=last.repeat(2, 1), cache=twin).logits
    assert errors(once[:, 0], want[:, -STEPS]).max() < 1e-4
    assert errors(twice[:, 0], want[0, -STEPS]).max() < 1e-4


def test_saved_and_loaded(tmp_path):
    model, ids = torch_zoo.build("deepseek_v3"), torch_zoo.tokens(PROMPT + 40 + STEPS)
    cache = compressed(model, K8V8)
    read(model, ids, cache)
    path = tmp_path / "cache.safetensors"
    rt.save_prompt_cache(path, model, cache)
    with cache_file.opened(path) as saved:
        assert set(saved.classes) == {"LatentKVCache"}
    loaded, _ = rt.load_prompt_cache(path, model)
    with torch.no_grad():
        step = ids[:, -1:]
        want = model(input_ids=step, cache=cache).logits
        assert torch.equal(model(input_ids=step, cache=loaded).logits, want)


def test_what_latents_cannot_do_is_said(tmp_path):
    model = torch_zoo.build("deepseek_v32")
    cache = compressed(model, K8V8)
    with pytest.raises(ValueError, match="but not the keys of the indexer in layer 0"):
        rt.save_prompt_cache(tmp_path / "cache", model, cache)
    with pytest.raises(ValueError, match="must be in a cache that grows, but a static one"):
        RotorCache(torch_zoo.build("deepseek_v3").config, max_cache_len=64)
    with pytest.raises(ValueError, match="keeps latents; leave the calibration out"):
        rt.apply(model, RotorConfig(rotation="calibrated"))
