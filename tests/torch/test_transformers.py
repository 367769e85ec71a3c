"""Models of transformers through RotorCache: the text of the exact cache, from packed bytes."""

import warnings

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

import rotormlx.torch as rt
from rotormlx.codec.counts import Counts
from rotormlx.config import RotorConfig
from rotormlx.torch.attention import left_padding, of_tokens
from rotormlx.torch.layer import RotorLayer
from tests.support.torch_models import CACHE, MODELS, build, padded, tokens

K8V8 = RotorConfig(8, 8, sink=2, window=8)
NEW = 12


def generate(model, cache=None, count=NEW, **inputs):
    """The new tokens, ``[B, count]``."""
    length = inputs["input_ids"].shape[1]
    out = model.generate(**{CACHE: cache}, max_new_tokens=count, **inputs)
    return out[:, length:]


@pytest.fixture(scope="module")
def llama():
    return build("llama")


@pytest.fixture
def rotor_llama(llama):
    """The same model with rotormlx's attention."""
    llama.set_attn_implementation("rotormlx")
    yield llama
    llama.set_attn_implementation("sdpa")


# ---- every family -------------------------------------------------------------------------------


@torch.inference_mode()
def logits(model, cache, ids, chunk=50):
    parts = [model(part, **{CACHE: cache}).logits for part in ids.split(chunk, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_exact_cache(name):
    """Eager attention over an exact cache is the judge; it knows attention-sink logits."""
    model, ids = build(name), tokens(230)
    model.set_attn_implementation("eager")
    expected = logits(model, DynamicCache(config=model.config), ids)
    rt.apply(model)
    errors = {}
    for bits in (8, 4, 2):
        cache = rt.RotorCache(model.config, RotorConfig(bits, bits, sink=2, window=8))
        found = logits(model, cache, ids)
        # Beyond 74 tokens, a token's keys are read packed; 192 of the 230 are at the end.
        assert cache.packed_tokens == 192
        errors[bits] = float((found - expected).norm() / expected.norm())
    # A code of 8 bits is off by 0.9 % (its codebook's root mean square error), layers add up; and
    # each bit less makes it about twice as much, which an exact path would not show.
    assert 1e-4 < errors[8] < 0.04
    assert errors[8] * 3 < errors[4] < errors[2]


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_sliding_windows_stay_exact_and_are_reported(name):
    model = build(name)
    report = rt.apply(model, K8V8)
    kinds = [type(layer) for layer in rt.RotorCache(model.config).layers]
    assert kinds == [DynamicSlidingWindowLayer, RotorLayer] * 2
    assert [layer.compressed for layer in report.layers] == [False, True] * 2
    assert "never keeps more than 32 tokens" in str(report.layers[0])
    assert "2 of 4 caches compressed, K8 V8" in report.summary
    # 100 tokens: a window keeps 32 of them, of 2 heads, 2 x 32 numbers in float16.
    assert report.layers[0].compressed_bytes(100, K8V8) == 32 * 2 * 64 * 2


def test_report_tells_what_a_cache_takes(rotor_llama):
    report = rt.report(rotor_llama, RotorConfig(4, 3, window=0))
    assert len(report.layers) == 2
    layer = report.layers[1]
    assert (layer.kv_heads, layer.head_dim_k, layer.head_dim_v) == (2, 32, 32)
    cache = rt.RotorCache(rotor_llama.config, RotorConfig(4, 3, window=0))
    with torch.inference_mode():
        rotor_llama(tokens(200), **{CACHE: cache})
    stores = cache.layers[1].stores
    size = sum(
        part.nbytes
        for store in stores
        for part in store.saved(Counts(200, 192), single=True)
        if part is not None
    )
    assert size == layer.compressed_bytes(200, RotorConfig(4, 3, window=0))


# ---- generation ---------------------------------------------------------------------------------


def test_greedy_text_is_that_of_the_exact_cache(rotor_llama, llama):
    ids = tokens(150)
    cache = rt.RotorCache(llama.config, K8V8)
    found = generate(llama, cache, input_ids=ids)
    assert cache.packed_tokens == 128
    llama.set_attn_implementation("sdpa")
    assert torch.equal(found, generate(llama, input_ids=ids))


def test_sampling_draws_what_the_exact_cache_draws(rotor_llama, llama):
    ids, found = tokens(150), []
    for cache in (rt.RotorCache(llama.config, K8V8), None):
        torch.manual_seed(7)
        found.append(generate(llama, cache, input_ids=ids, do_sample=True, top_k=3))
        llama.set_attn_implementation("sdpa")
    assert torch.equal(*found)
    assert not torch.equal(found[0], generate(llama, input_ids=ids))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_padded_batch_is_its_rows(name):
    """Every row has the text that it has alone, and packs when it would alone."""
    model = build(name)
    rt.apply(model)
    config = RotorConfig(8, 8, window=0)
    prompts, batch = padded([140, 60, 70, 9])
    cache = rt.RotorCache(model.config, config)
    together = generate(model, cache, **batch)
    assert cache.rotor_layers[0].packed == [128, 64, 64, 0]
    for row, prompt in enumerate(prompts):
        own = rt.RotorCache(model.config, config)
        alone = generate(model, own, input_ids=prompt)
        assert torch.equal(together[row], alone[0])
        assert cache.rotor_layers[0].packed[row] == own.rotor_layers[0].packed[0]


def test_padding_may_span_chunks_of_a_prompt(rotor_llama):
    _, batch = padded([100, 30])
    whole, cut = (rt.RotorCache(rotor_llama.config, K8V8) for _ in range(2))
    with torch.inference_mode():
        positions = batch["attention_mask"].cumsum(-1) - 1
        expected = rotor_llama(**batch, position_ids=positions, **{CACHE: whole}).logits
        for stop in range(20, 101, 20):
            part = slice(stop - 20, stop)
            found = rotor_llama(
                batch["input_ids"][:, part],
                attention_mask=batch["attention_mask"][:, :stop],
                position_ids=positions[:, part],
                **{CACHE: cut},
            ).logits
    assert cut.layers[0].padding == whole.layers[0].padding == [0, 70]
    assert cut.layers[0].packed == whole.layers[0].packed == [64, 0]
    # The tokens of a chunk are read exact in one of them and packed at 8 bits in the other.
    assert (found - expected[:, -20:]).norm() < 0.05 * expected[:, -20:].norm()


def test_assisted_decoding_crops_both_caches(rotor_llama, llama):
    ids = tokens(150)
    assistant = build("llama", seed=3)
    rt.apply(assistant, RotorConfig(window=0))
    cache = rt.RotorCache(llama.config, K8V8)
    with warnings.catch_warnings():
        # transformers warns of its own settings for assistants.
        warnings.simplefilter("ignore")
        found = generate(llama, cache, input_ids=ids, count=40, assistant_model=assistant)
    assert cache.packed_tokens == 128
    assert torch.equal(found, generate(llama, rt.RotorCache(llama.config, K8V8), 40, input_ids=ids))


def test_beam_search_reorders_rows(rotor_llama, llama):
    ids = tokens(150)
    cache = rt.RotorCache(llama.config, K8V8)
    found = generate(llama, cache, input_ids=ids, num_beams=3)
    assert cache.layers[0].batch_size == 3
    llama.set_attn_implementation("sdpa")
    assert torch.equal(found, generate(llama, input_ids=ids, num_beams=3))


def test_apply_compresses_what_generate_makes_itself(llama):
    ids = tokens(150)
    rt.apply(llama, K8V8)
    try:
        out = llama.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
        assert isinstance(getattr(out, CACHE), rt.RotorCache)
        assert getattr(out, CACHE).rotor_config == K8V8
        assert getattr(out, CACHE).packed_tokens == 128
        rt.apply(llama, RotorConfig())
    finally:
        rt.remove(llama)
    out = llama.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True)
    assert type(getattr(out, CACHE)) is DynamicCache
    assert llama.config._attn_implementation == "sdpa"
    rt.remove(llama)


# ---- masks --------------------------------------------------------------------------------------


def test_a_mask_of_its_own_is_kept(rotor_llama):
    """A mask that is more than causal with padding reaches the scores, column by column."""
    _, batch = padded([100, 60])
    steps = tokens(5, 9, batch=2)
    shape = torch.ones(2, 1, 5, 105, dtype=torch.bool).tril(100)
    shape &= torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=1).bool()[:, None, None]
    holes = shape.clone()
    holes[:, :, :, 70:80] = False
    results = []
    for mask in (shape, shape.float().log(), holes, holes.float().log()):
        cache = rt.RotorCache(rotor_llama.config, K8V8)
        with torch.inference_mode():
            rotor_llama(**batch, **{CACHE: cache})
            results.append(rotor_llama(steps, attention_mask=mask, **{CACHE: cache}).logits)
    # Sums are in float32, in another order.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[2], results[3], rtol=1e-4, atol=1e-4)
    assert (results[0] - results[2]).abs().max() > 0.1


def test_left_padding_is_read_from_a_mask():
    mask = torch.ones(3, 1, 4, 9, dtype=torch.bool).tril(5)
    mask[1, :, :, :2] = False
    mask[2] = False
    assert left_padding(mask) == (0, 2, 9)
    holed = mask.clone()
    holed[1, :, :, 4] = False
    early = mask.clone()
    early[0, :, 0, 8] = True
    for other in (holed, early, mask.float(), mask[:, 0]):
        assert left_padding(other) is None


def test_columns_of_a_mask_move_to_the_tokens():
    mask = torch.arange(6).expand(2, 1, 1, 6)
    assert of_tokens(mask, (0, 2))[:, 0, 0].tolist() == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 5, 5]]


# ---- what is refused ----------------------------------------------------------------------------


def test_another_attention_is_refused_before_generating(llama):
    with pytest.raises(ValueError, match=r"must be 'rotormlx', but it is 'sdpa'; call model.set_"):
        rt.RotorCache(llama.config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_is_refused_later(rotor_llama, attention):
    cache = rt.RotorCache(rotor_llama.config)
    rotor_llama.set_attn_implementation(attention)
    with pytest.raises(ValueError, match="keys of layer 0 must be passed to attention unchanged"):
        rotor_llama(tokens(5), **{CACHE: cache})
    with pytest.raises(RuntimeError, match="never reached attention in layer 0"):
        rotor_llama(tokens(5), **{CACHE: cache})


def test_models_that_cannot_be_compressed_are_refused():
    model = build("mistral", sliding_window=32)
    with pytest.raises(ValueError, match="only plain full-attention layers"):
        rt.apply(model)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("rotormlx")
    with pytest.raises(ValueError, match="can be compressed, but the model has only Dyn"):
        rt.RotorCache(model.config)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8"):
        rt.apply(build("llama", head_dim=44))
    with pytest.raises(ValueError, match="that can generate is required, but a Linear"):
        rt.apply(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"configuration is required first, but a RotorConfig"):
        rt.RotorCache(RotorConfig())


def test_an_attention_that_asks_for_more_is_refused(rotor_llama):
    attention = rotor_llama.model.layers[0].self_attn
    cache = rt.RotorCache(rotor_llama.config)
    keys, values = cache.update(torch.ones(1, 2, 3, 32), torch.ones(1, 2, 3, 32), 0)
    forward = torch.ones(1, 4, 3, 32), keys, values, None
    function = rotor_llama_attention()
    with pytest.raises(ValueError, match=r"passes softcap to its attention \(LlamaAttention"):
        function(attention, *forward, softcap=30.0)
    with pytest.raises(ValueError, match="passes dropout to its attention"):
        function(attention, *forward, dropout=0.1)
    with pytest.raises(ValueError, match=r"passes block_indices to its attention \(LlamaAttention"):
        function(attention, *forward, block_indices=torch.ones(3))
    with pytest.raises(ValueError, match=r"\(LlamaAttention\) is not causal without a mask"):
        function(attention, *forward, is_causal=False)
    with pytest.raises(ValueError, match="the keys' head_dim 32 and a multiple of their 2 heads"):
        function(attention, torch.ones(1, 3, 3, 32), keys, values, None)
    _, others = cache.update(torch.ones(1, 2, 3, 32), torch.ones(1, 2, 3, 32), 1)
    with pytest.raises(ValueError, match="Keys must come with the values of their own layer"):
        function(attention, forward[0], keys, others, None)


def rotor_llama_attention():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["rotormlx"]


def test_models_without_a_compressed_cache_run_all_the_same(llama):
    """With rotormlx's attention, an exact cache gives what it gives with torch's own."""
    ids = tokens(40)
    expected = generate(llama, input_ids=ids)
    llama.set_attn_implementation("rotormlx")
    try:
        assert torch.equal(generate(llama, input_ids=ids), expected)
    finally:
        llama.set_attn_implementation("sdpa")


def test_configuration_without_an_attention_is_refused():
    with pytest.raises(ValueError, match=r"must be 'rotormlx', but it is (None|'sdpa'|'eager')"):
        rt.RotorCache(LlamaConfig())
