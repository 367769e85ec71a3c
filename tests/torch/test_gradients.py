"""Gradients and dtypes of a model after ``apply``: as before it, or refused in a sentence."""

import copy

import pytest
import torch
from transformers import DynamicCache

import rotormlx.torch as rt
from rotormlx.config import RotorConfig
from rotormlx.torch.layer import RotorLayer
from tests.support.torch_models import CACHE, build, padded, tokens

CONFIG = RotorConfig(8, 8, sink=2, window=8)
REFUSED = r"\[RotorCache\] Gradients need an exact cache, .* use_cache=False"


def gradients(model, **inputs):
    """The loss and every parameter's gradient of one step of training."""
    model.zero_grad()
    torch.manual_seed(3)
    inputs = inputs or {"input_ids": tokens(60, batch=2)}
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def checkpoint(model, **options):
    """Under the name that the installed transformers has for it."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(options)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("former", ["own", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_training_without_a_cache_is_as_before(name, former):
    """Bit for bit, with dropout, padding, checkpoints and autocast; attention-sink logits too."""
    model = build(name, attention_dropout=0.2).train()
    if former == "eager":
        model.set_attn_implementation("eager")
    applied = copy.deepcopy(model)
    rt.apply(applied, CONFIG)
    # A copy of a model that was applied to trains alike.
    applied = copy.deepcopy(applied)
    _, padded_batch = padded([50, 30])
    for inputs in ({}, padded_batch):
        assert_equal(gradients(applied, **inputs), gradients(model, **inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(gradients(applied), gradients(model))
    for reentrant in (False, True):
        for each in (model, applied):
            checkpoint(each, use_reentrant=reentrant)
        assert_equal(gradients(applied), gradients(model))
    for each in (model, applied):
        each.eval()  # no checkpoints, no dropout
    assert_equal(gradients(applied), gradients(model))


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_remove_gives_training_back(name):
    model = build(name).train()
    before, former = gradients(model), model.config._attn_implementation
    rt.apply(model, CONFIG)
    rt.remove(model)
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == former
    assert_equal(gradients(model), before)


@pytest.mark.parametrize("trained", ["all", "v_proj", "q_proj", "lm_head"])
def test_a_gradient_through_a_compressed_cache_is_refused(trained):
    """Also where only some weights are trained, as adapters are; nothing is missing in silence."""
    model = build("llama")
    rt.apply(model, CONFIG)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or trained in name)
    cache = rt.RotorCache(model.config, CONFIG)
    out = model(tokens(30), **{CACHE: cache}).logits
    assert out.requires_grad
    if trained == "lm_head":
        out.sum().backward()
        assert model.lm_head.weight.grad.abs().sum() > 0
        return
    with pytest.raises(ValueError, match=REFUSED):
        out.sum().backward()


def test_keys_that_once_required_a_gradient_refuse_it_later():
    """A learned prefix that a frozen model reads."""
    model = build("llama").requires_grad_(False)
    rt.apply(model, CONFIG)
    cache = rt.RotorCache(model.config, CONFIG)
    prefix = torch.randn(1, 2, 10, 32, requires_grad=True)
    for index in range(2):
        handle, _ = cache.update(prefix * 2, prefix * 3, index)
        handle.step.read(None)
    out = model(tokens(5), **{CACHE: cache}).logits
    with pytest.raises(ValueError, match=REFUSED):
        out.sum().backward()


# ---- dtypes -------------------------------------------------------------------------------------


@torch.inference_mode()
def both(model, ids, **options):
    """Logits of an exact cache and of a compressed one, in chunks."""
    results = []
    for make in (lambda: DynamicCache(config=model.config), None):
        if make is None:
            rt.apply(model, CONFIG)
        cache = make() if make else rt.RotorCache(model.config, CONFIG)
        parts = [model(part, **{CACHE: cache}).logits for part in ids.split(40, dim=1)]
        results.append(torch.cat(parts, dim=1))
    rt.remove(model)
    return results


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_it_gives_before(name, dtype):
    model, ids = build(name), tokens(150)
    with torch.autocast("cpu", dtype=dtype):
        expected, found = both(model, ids)
        rt.apply(model, CONFIG)
        out = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
    rt.remove(model)
    assert found.dtype == expected.dtype
    # 8 bits are off by 0.9 % and bfloat16 rounds by 0.4 %; layers add up, weights are large.
    assert (found - expected).float().norm() < 0.1 * expected.float().norm()
    layer = getattr(out, CACHE).rotor_layers[0]
    assert out.sequences.shape == (1, 154)
    assert layer.packed_tokens == 128
    assert {store.exact.dtype for store in layer.stores} == {dtype}


@pytest.mark.parametrize("dtypes", ["qf32 kbf16 vbf16", "qbf16 kf32 vbf16", "qf32 kf32 vbf16"])
def test_dtypes_may_differ(dtypes):
    """Keys and values keep their own; the output has that of the values."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kinds = {"f32": torch.float32, "bf16": torch.bfloat16}
    q, k, v = (kinds[word[1:]] for word in dtypes.split())
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 100, 32, generator=generator).bfloat16() for heads in (4, 2, 2)
    )
    layer, module = RotorLayer(CONFIG, 0), torch.nn.Module().eval()
    handles = layer.update(key.to(k), value.to(v))
    assert [handle.dtype for handle in handles] == [k, v]
    out, _ = ALL_ATTENTION_FUNCTIONS["rotormlx"](module, query.to(q), *handles, None)
    assert [store.exact.dtype for store in layer.stores] == [k, v]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    assert out.dtype == v
    # One rounding to bfloat16.
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=2**-8)
