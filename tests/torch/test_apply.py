"""After ``apply`` a model uses compressed caches or says in a sentence why not; never another."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.generation import configuration_utils

import rotormlx.torch as rt
from rotormlx.config import RotorConfig
from rotormlx.torch.layer import RotorLayer
from tests.support import torch_zoo
from tests.support.torch_models import CACHE, build, tokens

K8V8 = RotorConfig(8, 8, sink=2, window=8)
COARSE = RotorConfig(2, 2, window=0)
ONE_SENTENCE = r"^\[apply\] [^\n]+\.$"


def generate(model, ids, **more):
    """Text, and the cache that it was written with."""
    out = model.generate(
        ids,
        **{"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | more,
        return_dict_in_generate=True,
    )
    return out.sequences, getattr(out, CACHE)


@pytest.fixture
def llama():
    return build("llama")


# ---- another cache ------------------------------------------------------------------------------

# For transformers, "hybrid" means None.
PLAIN = ("dynamic", "hybrid", "static")
KINDS = [kind for kind in configuration_utils.ALL_CACHE_IMPLEMENTATIONS if kind not in PLAIN]


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_cache_is_refused(llama, kind):
    """Asked for in the call, in the model's settings, and before ``apply``."""
    ids = tokens(10)
    rt.apply(llama, K8V8)
    said = f"cache_implementation=None or 'static' to be compressed, but '{kind}' is set"
    with pytest.raises(ValueError, match=ONE_SENTENCE) as call:
        generate(llama, ids, cache_implementation=kind)
    llama.generation_config.cache_implementation = kind
    with pytest.raises(ValueError, match=ONE_SENTENCE) as setting:
        generate(llama, ids)
    rt.remove(llama)
    with pytest.raises(ValueError, match=ONE_SENTENCE) as before:
        rt.apply(llama, K8V8)
    assert all(said in str(error.value) for error in (call, setting, before))
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_cache_by_its_name_is_compressed(llama, name):
    rt.apply(llama, K8V8)
    assert generate(llama, tokens(150), cache_implementation=name)[1].packed_tokens == 128
    rt.remove(llama)
    llama.generation_config.cache_implementation = name
    rt.apply(llama, K8V8)
    assert generate(llama, tokens(150))[1].packed_tokens == 128


def test_settings_without_a_cache_are_refused(llama):
    llama.generation_config.use_cache = False
    with pytest.raises(ValueError, match="use_cache is False; set it to True"):
        rt.apply(llama)
    llama.generation_config.use_cache = True
    rt.apply(llama)
    text = llama.generate(tokens(10), max_new_tokens=3, min_new_tokens=3, use_cache=False)
    assert text.shape == (1, 13)


CACHES = {
    "exact": lambda model: DynamicCache(config=model.config),
    "offloading": lambda model: DynamicCache(config=model.config, offloading=True),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=50),
    "both": lambda model: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "tuple": lambda model: ((torch.zeros(1, 2, 3, 32),) * 2,) * 2,
}


@pytest.mark.filterwarnings("ignore:.*past_key_values.* is deprecated")
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_of_the_users_own_is_refused(llama, kind, name):
    """In ``generate``, in a call of the model and of its inner part; a compressed one is used."""
    ids = tokens(10)
    rt.apply(llama, K8V8)
    llama.generation_config.max_new_tokens = 3
    for call in (llama.generate, llama, llama.model):
        with pytest.raises(ValueError, match=ONE_SENTENCE) as error:
            call(ids, **{name: CACHES[kind](llama)})
        assert "must be compressed, but a" in str(error.value)
        cache = rt.RotorCache(llama.config, K8V8)
        call(ids, **{name: cache})
        assert cache.layers[0].tokens[0] >= 10


def test_by_position_too(llama):
    rt.apply(llama)
    for cache in (DynamicCache(), rt.RotorCache(llama.config)):
        inputs = (tokens(5), None, None, cache)
        if isinstance(cache, rt.RotorCache):
            llama(*inputs)
            assert cache.layers[1].tokens == [5]
        else:
            with pytest.raises(ValueError, match="must be compressed, but a DynamicCache"):
                llama(*inputs)


def test_a_call_without_a_cache_makes_a_compressed_one(llama):
    """As the model itself would make one; and text goes on from it."""
    ids = tokens(150)
    expected, _ = generate(llama, ids)
    rt.apply(llama, K8V8)
    with torch.no_grad():
        for call in (llama.model, llama):
            out = call(ids)
            assert getattr(out, CACHE).rotor_config == K8V8
        assert getattr(llama(ids, None, None, None), CACHE).packed_tokens == 128
        text, cache = ids, getattr(out, CACHE)
        for _ in range(8):
            text = torch.cat([text, out.logits[:, -1:].argmax(-1)], dim=1)
            out = llama(text[:, -1:], **{CACHE: cache})
        assert getattr(llama(ids, use_cache=False), CACHE) is None
    assert torch.equal(text, expected)


# ---- apply and remove ---------------------------------------------------------------------------


def test_apply_again_replaces_and_a_refusal_changes_nothing(llama):
    ids = tokens(150)
    rt.apply(llama, COARSE)
    assert str(rt.report(llama, K8V8)) == str(rt.apply(llama, K8V8))
    assert generate(llama, ids)[1].rotor_config == K8V8
    for wrong in (RotorConfig(channel_scale="calibrated"), RotorConfig(rotation="calibrated")):
        with pytest.raises(ValueError, match="calibration"):
            rt.apply(llama, wrong)
    assert generate(llama, ids)[1].rotor_config == K8V8
    rt.remove(llama)
    assert type(generate(llama, ids)[1]) is DynamicCache
    assert llama.config._attn_implementation == "sdpa"
    assert not llama._forward_pre_hooks
    assert not llama.model._forward_pre_hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_model_of_its_own(llama, duplicate):
    ids = tokens(150)
    rt.apply(llama, K8V8)
    twin = duplicate(llama)
    assert generate(twin, ids)[1].packed_tokens == 128
    with pytest.raises(ValueError, match="must be compressed, but a DynamicCache"):
        twin(ids, **{CACHE: DynamicCache()})
    rt.remove(twin)
    assert type(generate(twin, ids)[1]) is DynamicCache
    assert generate(llama, ids)[1].packed_tokens == 128
    rt.apply(twin, COARSE)
    rt.remove(llama)
    assert generate(twin, ids)[1].rotor_config == COARSE


def vision_language_model():
    model = torch_zoo.build("image/llava")
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    return model


def test_a_vision_tower_keeps_its_attention():
    """Beside a compressed text model, and when it is exact again; each part has just its own."""
    model = vision_language_model()
    parts = model.config, model.config.text_config, model.config.vision_config
    before = [part._attn_implementation for part in parts]
    assert before[1:] == ["sdpa", "eager"]
    ids = torch_zoo.tokens(150)
    image = model.config.image_token_id
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    ids[:, 3 : 3 + side**2] = image
    pixels = torch.rand(1, 3, *[model.config.vision_config.image_size] * 2)
    expected, _ = generate(model, ids, pixel_values=pixels)
    rt.apply(model, K8V8)
    assert model.config.vision_config._attn_implementation == "eager"
    text, cache = generate(model, ids, pixel_values=pixels)
    assert cache.packed_tokens == 128
    assert torch.equal(text, expected)
    rt.apply(model, COARSE)
    rt.remove(model)
    assert [part._attn_implementation for part in parts] == before
    assert all(type(part._attn_implementation) in (str, type(None)) for part in parts)
    text, cache = generate(model, ids, pixel_values=pixels)
    assert type(cache) is DynamicCache
    assert torch.equal(text, expected)


# ---- encoder-decoder models ---------------------------------------------------------------------


def test_the_growing_cache_of_an_encoder_decoder_is_compressed():
    model, ids = torch_zoo.build("seq2seq/bart"), torch_zoo.tokens(30)
    prompt = torch_zoo.tokens(150)
    expected, _ = generate(model, ids, decoder_input_ids=prompt)
    report = rt.apply(model, K8V8)
    assert [layer.compressed for layer in report.layers] == [True, True, False, False]
    assert "keys and values of the encoder's output, which do not grow" in str(report.layers[2])
    text, cache = generate(model, ids, decoder_input_ids=prompt)
    assert cache.self_attention_cache.packed_tokens == 128
    assert cache.cross_attention_cache.get_seq_length() == 30
    assert torch.equal(text, expected)

    with torch.no_grad():
        made = getattr(model(ids, decoder_input_ids=prompt), CACHE)
    assert made.self_attention_cache.packed_tokens == 128
    for wrong in (
        EncoderDecoderCache(DynamicCache(), DynamicCache()),
        DynamicCache(),
        rt.RotorCache(model.config),
    ):
        with pytest.raises(ValueError, match=r"pass EncoderDecoderCache\(RotorCache\(model.con"):
            generate(model, ids, decoder_input_ids=prompt, **{CACHE: wrong})
    own = EncoderDecoderCache(rt.RotorCache(model.config, K8V8), DynamicCache(config=model.config))
    text, cache = generate(model, ids, decoder_input_ids=prompt, **{CACHE: own})
    assert cache is own
    assert own.self_attention_cache.packed_tokens == 128
    assert torch.equal(text, expected)


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.fixture
def no_graphs():
    """None that another test has left."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("no_graphs")
def test_a_compiled_model_reads_the_same_bytes(llama):
    """Between its graphs; one graph of all is refused in a sentence."""
    rt.apply(llama, K8V8)
    compiled = torch.compile(llama, backend="eager")
    caches = [rt.RotorCache(llama.config, K8V8) for _ in range(2)]
    with torch.no_grad():
        for ids in (tokens(150), tokens(1), tokens(1, 5)):
            found, expected = (
                run(ids, **{CACHE: cache}).logits
                for run, cache in zip((compiled, llama), caches, strict=True)
            )
            # The same operations, in float32.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert [cache.packed_tokens for cache in caches] == [128, 128]
        torch._dynamo.reset()
        one_graph = torch.compile(llama, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="one graph was requested; compile without fullgraph"):
            one_graph(tokens(5), **{CACHE: rt.RotorCache(llama.config)})


@pytest.mark.slow
@pytest.mark.usefixtures("no_graphs")
def test_a_model_that_was_compiled_in_place_is_tried_as_it_is(llama):
    ids = tokens(150)
    expected, _ = generate(llama, ids)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    llama.compile(backend=counted)
    rt.apply(llama, K8V8)
    assert graphs == [], "a trial run compiles nothing"
    text, cache = generate(llama, ids)
    assert graphs
    assert cache.packed_tokens == 128
    assert torch.equal(text, expected)
    assert any(isinstance(layer, RotorLayer) for layer in cache.layers)
