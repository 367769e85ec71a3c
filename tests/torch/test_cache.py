"""One compressed layer: the bytes of the MLX cache, however tokens come, go and are batched."""

import copy

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import rotormlx.torch as rt
from rotormlx.codec.format import BLOCK
from rotormlx.config import RotorConfig
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.torch.layer import RotorLayer
from rotormlx.torch.prompt_cache import state_of
from tests.support.both_hosts import assert_same_state

K, D, DV, LAYER = 3, 64, 80, 2
CONFIGS = {
    "default": RotorConfig(),
    "rotor3": RotorConfig(3, 2, "rotor3", sink=0, window=10),
    "hadamard": RotorConfig(8, 3, "hadamard", sink=7, window=0),
    "dense": RotorConfig(2, 4, "dense", window=30),
}


def vectors(tokens, batch=1, seed=0):
    """Keys and values, float16 ``[batch, K, tokens, D]`` and ``[..., DV]``."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=D))
    keys = rng.normal(size=(batch, K, tokens, D)) * spread + rng.normal(size=D)
    values = rng.normal(size=(batch, K, tokens, DV))
    return tuple(torch.from_numpy(x.astype(np.float16)) for x in (keys, values))


def add(layer, keys, values, padding=None):
    """One step of a layer, as the attention function makes it."""
    handle, _ = layer.update(keys, values)
    return handle.step.read(padding)


def part(pair, start, stop):
    return tuple(x[:, :, start:stop] for x in pair)


def to_mlx(pair):
    return tuple(mx.array(x.numpy()) for x in pair)


# Chunks of tokens that come, and negative numbers that go.
CHANGES = st.lists(st.integers(-150, 250).filter(bool), min_size=1, max_size=6)


@settings(max_examples=12, deadline=None)
@given(changes=CHANGES, name=st.sampled_from(sorted(CONFIGS)))
def test_bytes_are_those_of_the_mlx_cache(changes, name):
    config, total = CONFIGS[name], 0
    layer, cache = RotorLayer(config, LAYER), RotorKVCache(config, LAYER)
    everything = vectors(2000)
    for change in changes:
        if change > 0:
            new = part(everything, total, total + change)
            total += change
            add(layer, *new)
            cache.update_and_fetch(*to_mlx(new))
        else:
            layer.crop(change)
            cache.trim(-change)
        assert layer.length == cache.offset
        assert layer.packed_tokens == cache.packed_tokens
    assert_same_state(state_of(layer), cache.state)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_is_filled_up_with_its_own_centre(name):
    """Forgetting reaches into a block; other tokens come behind it, few at a time."""
    everything = vectors(800)
    layer, cache = RotorLayer(CONFIGS[name], LAYER), RotorKVCache(CONFIGS[name], LAYER)
    for start, stop in ((0, 300), (300, 310), (310, 350), (350, 530)):
        add(layer, *part(everything, start, stop))
        cache.update_and_fetch(*to_mlx(part(everything, start, stop)))
        if start == 0:
            layer.crop(-160)
            cache.trim(160)
            assert layer.packed_tokens % BLOCK
    assert layer.packed_tokens == cache.packed_tokens >= 256
    assert_same_state(state_of(layer), cache.state)


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_do_not_depend_on_the_chunks(name):
    everything = vectors(400)
    whole, cut = RotorLayer(CONFIGS[name], LAYER), RotorLayer(CONFIGS[name], LAYER)
    add(whole, *everything)
    for start in range(0, 400, 37):
        add(cut, *part(everything, start, start + 37))
    assert whole.packed_tokens > 256
    for a, b in zip(state_of(whole), state_of(cut), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_new_tokens_are_exact_in_the_view_and_packed_behind_it():
    layer = RotorLayer(RotorConfig(), LAYER)
    keys, values = vectors(300)
    view = add(layer, keys, values)
    assert view.lengths.tolist() == [[0, 300]]
    assert torch.equal(view.keys.exact[:, :, :300], keys)
    assert torch.equal(view.values.exact[:, :, :300], values)
    assert layer.packed == [192]
    later = add(layer, keys[:, :, :1], values[:, :, :1])
    assert later.lengths.tolist() == [[192, 301]]
    # The older view still holds what it held.
    assert torch.equal(view.keys.exact[:, :, :300], keys)


def test_rows_of_a_batch_have_the_bytes_they_have_alone():
    """Rows of other lengths: padding at the left, over several chunks, then single tokens."""
    config = RotorConfig(4, 3, window=10)
    padding, total = (0, 90, 237, 130), 380
    everything = vectors(total, batch=4)
    together = RotorLayer(config, LAYER)
    start = 0
    for size in (100, 60, 150, *(1 for _ in range(70))):
        # Of rows that hold tokens, nothing that a later mask says changes the padding.
        told = padding if start < 310 else (5, 5, 5, 5)
        add(together, *part(everything, start, start + size), told)
        start += size
    assert together.packed == [320, 256, 128, 192]
    for row, padded in enumerate(padding):
        alone = RotorLayer(config, LAYER)
        add(alone, *(x[row : row + 1, :, padded:] for x in everything))
        one = copy.deepcopy(together)
        one.batch_select_indices(torch.tensor([row]))
        for a, b in zip(state_of(one), state_of(alone), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_rows_are_forgotten_each_at_its_own_length():
    config = RotorConfig(window=10)
    padding = (0, 150, 195)
    everything = vectors(300, batch=3)
    together = RotorLayer(config, LAYER)
    add(together, *part(everything, 0, 200), padding)
    together.crop(-60)
    assert together.padding == [0, 140, 140]
    together.padding[1] = 140
    assert together.packed == [128, 0, 0]
    assert together.tokens == [140, 0, 0]
    add(together, *part(everything, 140, 300), (0, 140, 140))
    alone = RotorLayer(config, LAYER)
    add(alone, *(x[1:2, :, 140:] for x in everything))
    together.batch_select_indices(torch.tensor([False, True, False]))
    for a, b in zip(state_of(together), state_of(alone), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_rows_are_repeated_and_reordered():
    layer = RotorLayer(RotorConfig(), LAYER)
    layer.batch_repeat_interleave(2)  # nothing to repeat
    add(layer, *vectors(250, batch=2))
    before = copy.deepcopy(layer)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert layer.batch_size == 4
    for store, old in zip(layer.stores, before.stores, strict=True):
        for a, b in ((store.exact, old.exact), *zip(store.packed, old.packed, strict=True)):
            assert a is b is None or torch.equal(a, b[[1, 0, 0, 1]])
    add(layer, *vectors(80, batch=4))
    assert layer.packed == [256 - BLOCK] * 4 or layer.packed == [256] * 4


def test_reset_makes_an_empty_layer():
    layer = RotorLayer(RotorConfig(), LAYER)
    add(layer, *vectors(250, batch=2))
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes, layer.packed_tokens) == (0, 0, 0)
    add(layer, *vectors(250))
    fresh = RotorLayer(RotorConfig(), LAYER)
    add(fresh, *vectors(250))
    assert torch.equal(state_of(layer)[6], state_of(fresh)[6])


def test_memory_is_what_the_format_says():
    """Room for growth: a sink, a window and a block; four blocks, or a thirty-second."""
    config = RotorConfig(4, 3)
    layer = RotorLayer(config, LAYER)
    for _ in range(16):
        add(layer, *vectors(256))
    packed = (4096 - 4 - 64) // BLOCK
    assert layer.packed == [packed * BLOCK]
    allocated = layer.stores[0].packed.scales.shape[2]
    assert packed <= allocated <= packed + max(4, packed // 32)
    exact = (4 + 64 + BLOCK) * K * (D + DV) * 2
    bits = sum(store.codec.block_bytes for store in layer.stores)
    assert layer.nbytes == exact + K * allocated * bits + K * (D + DV) * 4


@pytest.mark.parametrize("kept", [300, 333, 140, 70, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_cropped_with_its_window_and_read_again_is_as_if_no_more_had_come(name, kept):
    """As docs/TORCH.md says; a crop alone leaves tokens packed that would be exact."""
    config, pair = CONFIGS[name], vectors(500)
    layer, fresh = RotorLayer(config, LAYER), RotorLayer(config, LAYER)
    add(layer, *pair)
    layer.crop(kept)
    again = layer.rows[0].tokens_to_reread(config)
    if again:
        layer.crop(-again)
        add(layer, *part(pair, kept - again, kept))
    add(fresh, *part(pair, 0, kept))
    for a, b in zip(state_of(layer), state_of(fresh), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- handles and refusals -----------------------------------------------------------------------


def test_a_handle_tells_its_shape_and_refuses_the_rest():
    layer = RotorLayer(RotorConfig(), LAYER)
    add(layer, *vectors(10))
    keys, values = layer.update(*vectors(5))
    assert keys.shape == keys.size() == (1, K, 15, D)
    assert values.size(-1) == DV
    assert (keys.dtype, keys.device.type, keys.ndim) == (torch.float16, "cpu", 4)
    for use in (
        lambda: keys[:, :1],
        lambda: keys.transpose(1, 2),
        lambda: torch.matmul(torch.ones(5, D), keys),
        lambda: torch.nn.functional.softmax(keys, dim=-1),
    ):
        with pytest.raises(ValueError, match=r"layer 2 must be passed to attention unchanged"):
            use()
    assert not hasattr(keys, "__array__")


def test_a_step_that_attention_never_saw_is_refused():
    layer = RotorLayer(RotorConfig(), LAYER)
    layer.update(*vectors(5))
    with pytest.raises(RuntimeError, match="previous step never reached attention in layer 2"):
        layer.update(*vectors(5))


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((1, K, 5), (1, K, 5, DV), r"shape \[B, K, L, head_dim\]"),
        ((1, K, 5, D), (1, K, 4, DV), "but the values have shape"),
        ((1, K, 5, D + 8), (1, K, 5, DV), "holds keys of shape"),
        ((2, K, 5, D), (2, K, 5, DV), "use a new cache"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(keys, values, message):
    layer = RotorLayer(RotorConfig(), LAYER)
    add(layer, *vectors(200))
    before = state_of(layer)
    with pytest.raises(ValueError, match=message):
        layer.update(torch.ones(keys), torch.ones(values))
    for a, b in zip(before, state_of(layer), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_dtypes_and_devices_that_do_not_fit_are_refused():
    layer = RotorLayer(RotorConfig(), LAYER)
    keys, values = vectors(5)
    with pytest.raises(ValueError, match=r"keys have shape .* and dtype torch.float64"):
        layer.update(keys.double(), values)
    with pytest.raises(ValueError, match="keys are on cpu and the values on meta"):
        layer.update(keys, values.to("meta"))
    add(layer, keys, values)
    with pytest.raises(ValueError, match="This cache is on cpu, but keys on meta were appended"):
        layer.update(keys.to("meta"), values.to("meta"))
    with pytest.raises(ValueError, match="cannot be offloaded"):
        layer.offload()


def test_a_model_may_come_in_another_dtype_than_its_cache():
    """The first tokens fix the dtype of exact ones; later ones are converted."""
    layer = RotorLayer(RotorConfig(), LAYER)
    keys, values = vectors(5)
    add(layer, keys.bfloat16(), values.bfloat16())
    add(layer, keys.float(), values.float())
    assert state_of(layer)[5].dtype == torch.bfloat16
    assert torch.equal(state_of(layer)[5][:, :, 5:], keys.bfloat16())


def test_a_cache_is_a_list_of_layers():
    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=2)
    config._attn_implementation = "rotormlx"
    cache = rt.RotorCache(config, RotorConfig(window=10))
    assert [layer.layer for layer in cache.rotor_layers] == [0, 1, 2]
    assert (cache.get_seq_length(), cache.packed_tokens, cache.nbytes) == (0, 0, 0)
    for index in range(3):
        handle, _ = cache.update(*vectors(100), index)
        handle.step.read(None)
    assert (cache.get_seq_length(), cache.packed_tokens) == (100, 64)
    assert cache.nbytes == sum(layer.nbytes for layer in cache.rotor_layers) > 0
    assert cache.get_mask_sizes(7, 0) == (107, 0)
    assert all(layer.is_croppable for layer in cache.layers)
    cache.crop(-90)
    assert cache.get_seq_length() == 10
    cache.crop(4)
    assert cache.get_seq_length() == 4
    assert cache.get_max_length() == -1
