"""The CUDA kernels on a GPU, through the torch operators, against the float64 reference.

``scripts/gpu_check.sh`` runs these tests. What they cover on a GPU the emulator covers more widely;
they are about what it cannot show: the compiler, the tensor cores, asynchronous copies, streams.
"""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch

from rotormlx.codec import reference
from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.torch import ops, prefill
from rotormlx.torch.layer import RotorLayer
from rotormlx.torch.prompt_cache import state_of
from rotormlx.torch.static_layer import RotorStaticLayer
from rotormlx.torch.torch_ops import AttendCall, KVView
from tests.support import codec_cases, noise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")

# Each is compiled on first use, so its tests stay in one process: a head_dim, widths of keys and
# values, a rotation.
CONFIGURATIONS = [
    (128, RotorConfig(4, 4)),
    (80, RotorConfig(3, 2, rotation="rotor3", channel_scale="none")),
    (256, RotorConfig(2, 8)),
]
GROUPS = [f"d{dim}-k{config.key_bits}v{config.value_bits}" for dim, config in CONFIGURATIONS]
configurations = pytest.mark.parametrize(
    ("head_dim", "config"),
    [
        pytest.param(*configuration, id=group, marks=pytest.mark.xdist_group(group))
        for group, configuration in zip(GROUPS, CONFIGURATIONS, strict=True)
    ],
)
of_the_first = pytest.mark.xdist_group(GROUPS[0])
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
# Half a unit in the last place of 1.
ROUNDING = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}
B, K = 2, 3


def rows(shape, seed, dtype):
    """Normal numbers with unequal channels and an offset, what keys look like."""
    random = np.random.default_rng(seed)
    spread = np.exp(random.normal(size=shape[-1]) * 0.5)
    x = random.normal(size=shape) * spread + random.normal(size=shape[-1]) * 2
    return torch.tensor(x, dtype=DTYPES[dtype], device="cuda")


def float64(x):
    return x.double().cpu().numpy()


def as_numpy(packed):
    words = packed.words.cpu().numpy().view(np.uint32)
    rest = (None if a is None else a.cpu().numpy() for a in packed[1:])
    return Packed(words, *rest)


@configurations
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_and_decode_are_the_reference(head_dim, config, role, dtype):
    chosen = codec(config, head_dim, layer=3, role=role)
    x = rows((B, K, 5 * BLOCK, head_dim), 0, dtype)
    packed = ops.encode(x, config, layer=3, role=role)
    found = as_numpy(packed)
    expected = reference.encode(float64(x), chosen, centres=found.centres)
    z = codec_cases.unit_rows(float64(x), chosen, centres=found.centres)
    codec_cases.compare(found, expected, chosen, z)
    if role == KEY:
        means = reference.block_means(float64(x).reshape(B, K, -1, BLOCK, head_dim))
        assert np.allclose(found.centres, means, rtol=2**-10, atol=0)
    decoded = ops.decode(packed, config, head_dim=head_dim, layer=3, role=role)
    vectors = reference.decode(found, chosen)
    # The bound of docs/FORMAT.md, section 9.
    assert np.abs(float64(decoded) - vectors).max() <= 1e-5 * np.abs(vectors).max()


BLOCKS = 37


def lengths_of(blocks):
    """Packed and all tokens of each batch row."""
    return [(blocks * BLOCK - 5, blocks * BLOCK + 65), (130, 180)]


@cache
def sources_of(head_dim, config, dtype, blocks):
    """Keys and values of a partly packed cache."""
    sources = []
    for seed, role in enumerate(ROLES):
        x = rows((B, K, blocks * BLOCK, head_dim), seed, dtype)
        packed = ops.encode(x, config, layer=1, role=role)
        exact = rows((B, K, 80, head_dim), 2 + seed, dtype)
        sources.append(KVView(codec(config, head_dim, layer=1, role=role), exact, packed, None))
    return sources


@cache
def vectors_of(head_dim, config, dtype):
    """The keys and values that these stand for, each batch row by itself."""
    vectors = []
    for source in sources_of(head_dim, config, dtype, BLOCKS):
        ends = float64(source.exact)
        middle = reference.decode(as_numpy(source.packed), source.codec)
        vectors.append(
            [
                np.concatenate(
                    [
                        ends[row, :, : config.sink],
                        middle[row, :, :packed_tokens],
                        ends[row, :, config.sink : tokens - packed_tokens],
                    ],
                    1,
                )[None]
                for row, (packed_tokens, tokens) in enumerate(lengths_of(BLOCKS))
            ]
        )
    return vectors


def call_of(head_dim, config, dtype, repeats, length, blocks=BLOCKS):
    """What an operator is given: queries, lengths, keys, values and their configuration."""
    query = rows((B, K * repeats, length, head_dim), 7, dtype) / 4
    lengths = torch.tensor(lengths_of(blocks), dtype=torch.int32, device="cuda")
    return (query, lengths, *sources_of(head_dim, config, dtype, blocks), config)


def check_attend(head_dim, config, dtype, repeats, length, **options):
    call = call_of(head_dim, config, dtype, repeats, length)
    scale = head_dim**-0.5
    output = ops.attend(*call, layer=1, scale=scale, **options)
    assert output.dtype == DTYPES[dtype]
    logits = options.get("sink_logits")
    vectors = vectors_of(head_dim, config, dtype)
    packed = as_numpy(call[2].packed)
    for row, (keys, values) in enumerate(zip(*vectors, strict=True)):
        packed_tokens, tokens = lengths_of(BLOCKS)[row]
        query = float64(call[0][row : row + 1])
        taken = noise.of_sequence(
            query,
            packed,
            call[2].codec,
            scale=scale,
            channel_scale=None,
            sink=config.sink,
            packed_tokens=packed_tokens,
            tokens=tokens,
            row=row,
        )
        expected = reference.attend(
            query,
            keys,
            values,
            scale=scale,
            noise=taken,
            mask="causal" if options.get("causal") else None,
            sink_logits=None if logits is None else float64(logits),
        )
        # Two roundings of the output; in float32 sums of some thousand numbers on top.
        bound = {"f16": 2, "bf16": 2, "f32": 64}[dtype] * ROUNDING[dtype]
        assert (
            np.abs(float64(output[row : row + 1]) - expected).max()
            <= bound * np.abs(expected).max()
        )


@configurations
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("repeats", "length"), [(1, 1), (4, 1), (8, 1), (5, 2), (2, 40)])
def test_attend_is_the_reference(head_dim, config, dtype, repeats, length):
    check_attend(head_dim, config, dtype, repeats, length, causal=True)


@configurations
def test_attend_with_sink_logits_and_no_mask(head_dim, config):
    logits = torch.linspace(-3, 6, 4 * K, device="cuda")
    check_attend(head_dim, config, "bf16", 4, 1, sink_logits=logits)


@configurations
def test_attend_repeats_itself(head_dim, config):
    """Every run gives the same bytes; a race would show sooner or later."""
    call = call_of(head_dim, config, "bf16", 8, 1, blocks=500)
    first = ops.attend(*call, layer=1, scale=0.1)
    for _ in range(50):
        assert torch.equal(ops.attend(*call, layer=1, scale=0.1), first)


@of_the_first
def test_another_stream_and_a_graph():
    call = call_of(*CONFIGURATIONS[0], "f16", 4, 1)
    expected = ops.attend(*call, layer=1, scale=0.1)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        other = ops.attend(*call, layer=1, scale=0.1)
    torch.cuda.synchronize()
    assert torch.equal(other, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.attend(*call, layer=1, scale=0.1)
    for _ in range(2):
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)


@of_the_first
def test_values_are_encoded_like_keys_of_centre_zero():
    """Both roles of one configuration are in one library, and do not take each other's place."""
    head_dim, config = CONFIGURATIONS[0]
    x = rows((1, 1, BLOCK, head_dim), 0, "f32")
    zero = torch.zeros((1, 1, 1, head_dim), dtype=torch.float16, device="cuda")
    key = ops.encode(x, config, layer=0, role=KEY, centres=zero)
    value = ops.encode(x, config, layer=0, role=VALUE)
    assert key.words.shape != value.words.shape or not torch.equal(key.words, value.words)


@configurations
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["causal", "none", "bool"])
def test_prefill_is_attend(head_dim, config, dtype, name, monkeypatch):
    """Torch's attention over decoded tiles, merged, against the kernels over packed tokens."""
    monkeypatch.setattr(prefill, "TILE_NUMBERS", 2**19)  # several tiles
    query, lengths, keys, values, _ = call_of(head_dim, config, dtype, 2, 40)
    mask = None
    if name == "bool":
        longest = max(tokens for _, tokens in lengths_of(BLOCKS))
        mask = torch.from_numpy(np.random.default_rng(1).random((B, 1, 40, longest)) > 0.4).cuda()
    logits = torch.linspace(-3, 6, 2 * K, device="cuda")
    call = AttendCall(
        query, lengths, keys, values, config.sink, 0.1, name == "causal", mask, logits
    )
    expected = ops.attend_fitting(call).float()
    error = (prefill.attend(call, lengths_of(BLOCKS)).float() - expected).abs().max()
    # Decoded vectors, weights, parts and both outputs are rounded.
    assert (
        error <= {"f16": 8, "bf16": 8, "f32": 128}[dtype] * ROUNDING[dtype] * expected.abs().max()
    )


@configurations
def test_steps_of_a_static_cache_replay_as_a_graph(head_dim, config):
    """Over more than two blocks: what a cache that grows gives, and its bytes."""
    grown = RotorLayer(config, 1)
    static = RotorStaticLayer(config, 1, max_cache_len=600)
    for layer in (grown, static):
        handle, _ = layer.update(*(rows((B, K, 300, head_dim), s, "bf16") for s in (0, 1)))
        handle.step.read((0, 100))
    query = rows((B, 4 * K, 1, head_dim), 2, "bf16")
    new = [rows((B, K, 1, head_dim), seed, "bf16") for seed in (3, 4)]

    def step(layer):
        key, _ = layer.update(*new)
        return key.step.attend(query, None, 0.1, None)

    step(copy.deepcopy(static))  # compiles, and makes tables
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(static)
    for number in range(150):
        for place, buffer in enumerate((query, *new)):
            buffer.copy_(rows(buffer.shape, 10 + 3 * number + place, "bf16"))
        graph.replay()
        handle, _ = grown.update(*new)
        view = handle.step.read(None)
        call = AttendCall(
            query, view.lengths, view.keys, view.values, config.sink, 0.1, True, None, None
        )
        expected = ops.attend_fitting(call).float()
        # Each output is rounded; sums are cut into other parts.
        assert (output.float() - expected).abs().max() <= 4 * ROUNDING[
            "bf16"
        ] * expected.abs().max()
    assert static.packed == grown.packed
    for row in range(B):
        for layer in (twins := [copy.deepcopy(grown), copy.deepcopy(static)]):
            layer.batch_select_indices([row])
        for a, b in zip(*(state_of(layer) for layer in twins), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
