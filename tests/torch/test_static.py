"""Static caches: the text and bytes of caches that grow, from buffers that keep their place."""

import copy

import pytest
import torch
from torch.library import opcheck
from transformers import CompileConfig, StaticCache

import rotormlx.torch as rt
from rotormlx.codec.format import BLOCK, ROLES, codec
from rotormlx.config import RotorConfig
from rotormlx.torch import ops
from rotormlx.torch.layer import RotorLayer
from rotormlx.torch.prompt_cache import state_of
from rotormlx.torch.static_layer import DeviceStep, RotorStaticLayer
from rotormlx.torch.torch_ops import AttendCall
from tests.support.torch_models import CACHE, build, padded, tokens

K, D, DV, LAYER = 3, 32, 40, 1
K8V8 = RotorConfig(8, 8, sink=2, window=8)
CONFIGS = {
    "8 bit": K8V8,
    "default": RotorConfig(),
    "2 and 3 bit": RotorConfig(2, 3, sink=0, window=0),
    "rotor3": RotorConfig(3, 2, "rotor3", window=70),
    "no scale": RotorConfig(4, 8, channel_scale="none", sink=5, window=33),
}


@pytest.fixture
def llama():
    return build("llama")


def vectors(count, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, K, count, d, generator=generator) for d in (D, DV)]


def pair_of_layers(config, batch=1, prompt=150, padding=None):
    """A layer that grows and a static one, both with a prompt."""
    layers = RotorLayer(config, LAYER), RotorStaticLayer(config, LAYER, max_cache_len=600)
    for layer in layers:
        handle, _ = layer.update(*vectors(prompt, batch))
        handle.step.read(padding)
    return layers


def attended(layer, new, query):
    """One token more, and attention over everything."""
    key, _ = layer.update(*new)
    if isinstance(key.step, DeviceStep):
        return key.step.attend(query, None, 0.2, None)
    view = key.step.read(None)
    call = AttendCall(
        query, view.lengths, view.keys, view.values, layer.config.sink, 0.2, True, None, None
    )
    return ops.attend_fitting(call)


def decode(layers, steps, batch=1, first=0):
    for number in range(first, first + steps):
        new, query = vectors(1, batch, seed=100 + number), torch.randn(batch, 2 * K, 1, D)
        grown, static = (attended(layer, new, query) for layer in layers)
        assert torch.equal(grown, static)


def assert_same(layers):
    states = [state_of(layer) for layer in layers]
    for a, b in zip(*states, strict=True):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same if isinstance(same, bool) else same.all()


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_and_attention_are_those_of_a_layer_that_grows(name):
    """Over more than two blocks, from a prompt with and without packed ones."""
    for prompt in (3, 150, 2 * BLOCK + 2):
        layers = pair_of_layers(CONFIGS[name], prompt=prompt)
        decode(layers, 150)
        assert layers[1].is_on_device
        assert_same(layers)


@pytest.mark.parametrize("name", ["default", "no scale"])
def test_rows_of_other_lengths(name):
    padding = (0, 70, 149)
    layers = pair_of_layers(CONFIGS[name], batch=3, padding=padding)
    decode(layers, 130, batch=3)
    for row in range(3):
        alone = [copy.deepcopy(layer) for layer in layers]
        for layer in alone:
            layer.batch_select_indices([row])
        assert_same(alone)


def test_what_the_host_does_between_steps():
    """Crops, other rows, other prompts; each time the device goes on with it."""
    layers = pair_of_layers(K8V8, batch=2)
    places = [x.data_ptr() for x in layers[1].buffers if x is not None]
    decode(layers, 20, batch=2)
    for layer in layers:
        layer.crop(-90)
    decode(layers, 70, batch=2, first=20)
    for layer in layers:
        layer.reorder_cache(torch.tensor([1, 1]))
    decode(layers, 10, batch=2, first=90)
    new, query = vectors(77, 2, seed=9), torch.randn(2, K, 77, D)
    assert torch.equal(*(attended(layer, new, query) for layer in layers))
    decode(layers, 70, batch=2, first=100)
    assert_same(layers)
    assert places == [x.data_ptr() for x in layers[1].buffers if x is not None]
    for layer in layers:
        layer.batch_repeat_interleave(2)
    decode(layers, 3, batch=4, first=200)


def test_counts_are_told_at_any_time():
    layers = pair_of_layers(K8V8, batch=2, padding=(0, 60))
    decode(layers, 100, batch=2)
    grown, static = layers
    assert (static.tokens, static.packed) == (grown.tokens, grown.packed)
    assert int(static.get_seq_length()) == grown.get_seq_length() == 250
    assert static.get_mask_sizes(1) == (600, 0)
    assert static.get_mask_sizes(5) == (255, 0)
    assert static.get_max_length() == 600


def test_the_host_is_told_of_a_block_that_is_due():
    """The operator packs it with the next step; until then whoever asks has it packed."""
    layers = pair_of_layers(K8V8)
    for number in range(70):
        decode(layers, 1, first=number)
        assert layers[1].packed == layers[0].packed


def test_keys_get_the_dtype_of_values():
    layer = RotorStaticLayer(K8V8, LAYER, max_cache_len=600)
    keys, values = vectors(150)
    handle, _ = layer.update(keys, values.bfloat16())
    handle.step.read(None)
    keys, values = vectors(1)
    out = attended(layer, (keys, values.bfloat16()), torch.randn(1, K, 1, D).bfloat16())
    assert out.dtype == layer.buffers[0].dtype == torch.bfloat16
    assert out.isfinite().all()


def test_memory_is_that_of_all_positions_at_once():
    layers = pair_of_layers(RotorConfig())
    blocks = -(-(600 - 4) // BLOCK)
    bits = sum(
        codec(RotorConfig(), d, layer=0, role=r).block_bytes
        for r, d in zip(ROLES, (D, DV), strict=True)
    )
    exact = (4 + 64 + 127) * K * (D + DV) * 4
    before = layers[1].nbytes
    assert before == exact + K * blocks * bits + K * (D + DV) * 4
    decode(layers, 100)
    assert layers[1].nbytes == before


def test_more_tokens_than_there_is_room_for_are_refused():
    _, layer = pair_of_layers(K8V8, prompt=590)
    with pytest.raises(
        ValueError, match=r"11 more came to 590 of 600; make it with a larger max_c"
    ):
        layer.update(*vectors(11))
    small = RotorStaticLayer(RotorConfig(8, 8, sink=0, window=0), LAYER, max_cache_len=64)
    handle, _ = small.update(*vectors(3))
    handle.step.read(None)
    for _ in range(188):
        attended(small, vectors(1), torch.randn(1, K, 1, D))
    with pytest.raises(ValueError, match=r"1 more came to row 0 with 191, and it holds 191 at"):
        attended(small, vectors(1), torch.randn(1, K, 1, D))


# ---- whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_text_is_that_of_a_cache_that_grows(name):
    model = build(name)
    rt.apply(model, K8V8)
    for inputs in ({"input_ids": tokens(150)}, padded([150, 90, 20])[1]):
        texts = [
            model.generate(**inputs, max_new_tokens=80, cache_implementation=kind)
            for kind in (None, "static")
        ]
        assert torch.equal(*texts)


def test_beams_and_a_second_prompt(llama):
    rt.apply(llama, K8V8)
    facts = {"input_ids": tokens(100), "max_new_tokens": 30, "num_beams": 3}
    texts = [llama.generate(**facts, cache_implementation=kind) for kind in (None, "static")]
    assert torch.equal(*texts)
    found = []
    for length in (None, 400):
        cache = rt.RotorCache(llama.config, K8V8, max_cache_len=length)
        text = tokens(100)
        for more in (40, 30):
            text = llama.generate(input_ids=text, max_new_tokens=more, **{CACHE: cache})
            text = torch.cat([text, tokens(20, seed=more)], dim=1)
        found.append(text)
    assert torch.equal(*found)


def test_masks_that_hide_other_tokens(llama):
    """A boolean mask of a step, whose columns are positions."""
    llama.set_attn_implementation("rotormlx")
    ids, step = padded([150, 90])[1], tokens(2, batch=1).T
    found = []
    for length in (None, 200):
        cache = rt.RotorCache(llama.config, K8V8, max_cache_len=length)
        with torch.inference_mode():
            llama(**ids, **{CACHE: cache})
            columns = cache.get_mask_sizes(1, 0)[0]
            mask = torch.ones(2, 1, 1, columns, dtype=torch.bool)
            mask[0, ..., 100:130] = False
            mask[1, ..., :60] = False
            mask[..., 151:] = False
            found.append(llama(step, attention_mask=mask, **{CACHE: cache}).logits)
    assert torch.equal(*found)


def test_a_decode_step_is_one_graph_and_one_operator_a_layer(llama):
    """One graph serves steps that pack and steps that do not."""
    llama.set_attn_implementation("rotormlx")
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ids = tokens(150)
    caches = [rt.RotorCache(llama.config, K8V8, max_cache_len=400) for _ in range(2)]
    compiled = torch.compile(llama.forward, fullgraph=True, backend=keep)
    with torch.no_grad():
        for cache in caches:
            llama(ids, **{CACHE: cache})
        for number in range(150):
            one = tokens(1, seed=number)
            expected = llama(one, **{CACHE: caches[0]}).logits
            assert torch.equal(compiled(input_ids=one, **{CACHE: caches[1]}).logits, expected)
    assert len(graphs) == 1
    calls = [str(node.target) for node in graphs[0].graph.nodes if "rotormlx" in str(node.target)]
    assert len(calls) == len(caches[0].rotor_layers)
    assert caches[1].packed_tokens > 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
def test_generate_compiles_by_itself(llama):
    """As it does on a GPU; inductor then owns the step."""
    rt.apply(llama, K8V8)
    compiling = CompileConfig(fullgraph=True, backend="inductor", mode="default")
    compiling._compile_all_devices = True
    facts = {"input_ids": tokens(60), "max_new_tokens": 40}
    expected = llama.generate(**facts)
    found = llama.generate(**facts, cache_implementation="static", compile_config=compiling)
    assert torch.equal(found, expected)


def test_the_operator_passes_opcheck():
    _, layer = pair_of_layers(RotorConfig(2, 4, sink=2, window=8), prompt=137)
    new = vectors(1, seed=5)
    buffers = (layer.lengths, layer.counter, *layer.buffers)
    arguments = (torch.randn(1, 2 * K, 1, D), *new, *buffers, None, None)
    opcheck(torch.ops.rotormlx.step.default, arguments, {"scale": 0.2, **layer.facts})


def test_steps_that_do_not_fit_are_refused():
    _, layer = pair_of_layers(K8V8)
    facts = {"scale": 0.2, **layer.facts}
    query, new = torch.randn(1, 2 * K, 1, D), vectors(1)
    rest = (layer.lengths, layer.counter, *layer.buffers, None, None)

    def refused(message, query=query, new=new, rest=rest):
        with pytest.raises(ValueError, match=message):
            torch.ops.rotormlx.step(query, *new, *rest, **facts)

    refused(r"New keys must have shape \[1, 3, L, 32\]", new=(new[1], new[1]))
    refused(r"queries' L of 65, from 1 to 64", torch.randn(1, K, 65, D), vectors(65))
    short = [*rest]
    short[2], short[7] = (x[:, :, :20] for x in (rest[2], rest[7]))
    refused("at least 74 exact tokens", rest=short)
    refused("The counter must have shape", rest=(rest[0], rest[0], *rest[2:]))


def test_an_exact_static_cache_is_refused(llama):
    rt.apply(llama, K8V8)
    exact = StaticCache(config=llama.config, max_cache_len=100)
    with pytest.raises(ValueError, match="must be compressed, but a StaticCache was given"):
        llama.generate(input_ids=tokens(5), max_new_tokens=1, **{CACHE: exact})
