"""The torch operators against the shared vectors and the float64 reference, on both CPU paths."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import rotormlx.torch as rt
from rotormlx.codec import codebook, reference, trellis
from rotormlx.codec.format import BLOCK, KEY, ROLES, TRELLIS_BITS, VALUE, Packed, codec
from rotormlx.config import ROTATIONS, RotorConfig
from rotormlx.kernels import cpu_library
from rotormlx.torch import torch_ops
from rotormlx.torch.torch_ops import KVView
from scripts.make_vectors import CASES, DIRECTORY
from tests.support.bounds import check_encoded
from tests.support.codec_cases import badly_met_rows
from tests.support.torch_attend import (
    DTYPES,
    LAYER,
    LENGTHS,
    SINK,
    B,
    H,
    K,
    L,
    check,
    float64,
    make_sources,
    masks,
    noise_of_row,
    numpy_of,
    rows,
)

needs_library = pytest.mark.skipif(
    cpu_library.missing() is not None, reason=f"no CPU library: {cpu_library.missing()}"
)


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """Which implementation the CPU operators use."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_library, "missing", lambda: "this test wants torch operations")
    elif (reason := cpu_library.missing()) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.file_name.split(".")[0])
def vectors(request):
    with safe_open(DIRECTORY / request.param.file_name, "pt") as file:
        facts = json.loads(file.metadata()["rotormlx"])
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118


def config_of(facts, bits):
    return RotorConfig(bits, bits, facts["rotation"], seed=facts["seed"], sink=facts["sink"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("role", ROLES)
def test_encode_reproduces_every_bit(path, vectors, role, dtype):
    arrays, facts = vectors
    for bits in codebook.BITS:
        packed = rt.encode(
            arrays[f"{role}.input"].to(DTYPES[dtype]),
            config_of(facts, bits),
            layer=facts["layer"],
            role=role,
            channel_scale=arrays.get(f"{role}.channel_scale"),
        )
        assert torch.equal(packed.words.view(torch.uint32), arrays[f"{role}.words.{bits}"])
        assert torch.equal(packed.scales, arrays[f"{role}.scales.{bits}"])
        if role == KEY:
            assert torch.equal(packed.centres, arrays["key.centres"])


def packed_of(arrays, role, bits):
    words = arrays[f"{role}.words.{bits}"].view(torch.int32)
    return Packed(
        words, arrays[f"{role}.scales.{bits}"], arrays["key.centres"] if role == KEY else None
    )


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
def test_decode_reproduces_the_vectors(path, vectors, role, bits):
    arrays, facts = vectors
    expected = arrays[f"{role}.decoded.{bits}"]
    decoded = rt.decode(
        packed_of(arrays, role, bits),
        config_of(facts, bits),
        head_dim=facts["head_dim"],
        layer=facts["layer"],
        role=role,
        channel_scale=arrays.get(f"{role}.channel_scale"),
    )[:, :, : expected.shape[2]]
    # The bound of docs/FORMAT.md, section 9.
    assert (decoded - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("bits", codebook.BITS)
def test_attend_reproduces_the_outputs(path, vectors, bits):
    arrays, facts = vectors
    config = config_of(facts, bits)
    sources = []
    for role in ROLES:
        chosen = codec(config, facts["head_dim"], layer=facts["layer"], role=role)
        packed = packed_of(arrays, role, bits)
        scale = arrays.get(f"{role}.channel_scale")
        sources.append(KVView(chosen, arrays[f"{role}.exact"].float(), packed, scale))
    count = packed.scales.shape[2] * BLOCK - facts["missing"]
    tokens = count + sources[0].exact.shape[2]
    query = arrays["query"]
    lengths = torch.tensor([[count, tokens]] * len(query), dtype=torch.int32)
    output = rt.attend(
        query,
        lengths,
        *sources,
        config,
        layer=facts["layer"],
        scale=facts["head_dim"] ** -0.5,
        causal=True,
    )
    expected = arrays[f"output.{bits}"]
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("role", ROLES)
def test_prefill_scale_is_reproduced(vectors, role):
    arrays, facts = vectors
    first = arrays[f"{role}.input"][:, :, :BLOCK]
    found = rt.prefill_scale(first, config_of(facts, 4), layer=facts["layer"], role=role)
    # The bound of docs/FORMAT.md, section 9.
    assert torch.allclose(found[0], arrays[f"{role}.prefill"], rtol=1e-6, atol=0)


# ---- encoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("head_dim", [8, 80, 192])
def test_encode_is_the_reference(path, head_dim, name):
    """Other codes are right only where float32 leaves a doubt."""
    x = rows((B, K, 2 * BLOCK, head_dim))
    for bits, role in ((2, "key"), (3, "value"), (8, "key")):
        config = RotorConfig(bits, bits, name)
        chosen = codec(config, head_dim, layer=LAYER, role=role)
        scale = None
        if config.scales_channels:
            scale = rt.prefill_scale(x[:1, :, :BLOCK], config, layer=LAYER, role=role)[0]
        packed = rt.encode(x, config, layer=LAYER, role=role, channel_scale=scale)
        check_encoded(float64(x), numpy_of(packed), chosen, scale)


@pytest.mark.parametrize("name", ["cascade", "dense", "rotor3"])
def test_blocks_do_not_depend_on_their_company(path, name, monkeypatch):
    """A block encoded alone has the bytes that it has among others, and in other tiles."""
    monkeypatch.setattr(torch_ops, "TILE_VALUES", 3 * B * K * BLOCK * 96)
    config = RotorConfig(4, 3, name)
    x = rows((B, K, 5 * BLOCK, 96)).bfloat16()
    for role in ROLES:
        together = rt.encode(x, config, layer=LAYER, role=role)
        for n in range(5):
            part = x[1:, 2:, n * BLOCK : (n + 1) * BLOCK]
            alone = rt.encode(part, config, layer=LAYER, role=role)
            for a, b in zip(together, alone, strict=True):
                assert b is None or torch.equal(a[1:, 2:, n : n + 1], b)


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
def test_both_paths_write_the_same_words(monkeypatch, role, bits):
    if (reason := cpu_library.missing()) is not None:
        pytest.skip(reason)
    x = rows((B, K, 3 * BLOCK, 112)).half()
    config = RotorConfig(bits, bits)
    native = rt.encode(x, config, layer=LAYER, role=role)
    monkeypatch.setattr(cpu_library, "missing", lambda: "this test wants torch operations")
    for a, b in zip(native, rt.encode(x, config, layer=LAYER, role=role), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("kind", ["zero", "tiny", "nan", "inf", "huge"])
@pytest.mark.parametrize("role", ROLES)
def test_special_rows_are_the_reference(path, role, kind):
    config = RotorConfig(3, 3)
    chosen = codec(config, 80, layer=LAYER, role=role)
    x = rows((1, 2, BLOCK, 80))
    if kind == "zero":
        x[:] = 0
    elif kind == "tiny":
        # No size that float16 can hold, but by the levels of zeros it would have a scale.
        x *= 2e-8 * 80**0.5 / x.norm(dim=-1, keepdim=True)
    else:
        x[:, :, 5::7] = {"nan": np.nan, "inf": np.inf, "huge": 1e30}[kind]
    expected = reference.encode(x, chosen)
    packed = rt.encode(x, config, layer=LAYER, role=role)
    found = numpy_of(packed)
    broken = np.isnan(expected.scales)
    assert np.array_equal(np.isnan(found.scales), broken)
    assert (found.scales.view(np.uint16)[broken] == 0x7E00).all()
    assert np.array_equal(found.scales == 0, expected.scales == 0)
    check_encoded(float64(x), found, chosen)
    decoded = rt.decode(packed, config, head_dim=80, layer=LAYER, role=role)
    flat = torch.from_numpy(broken.reshape(1, 2, BLOCK))
    assert decoded[flat].isnan().all()
    assert decoded[~flat].isfinite().all()


@pytest.mark.parametrize("start", [1, 2, 3, 16, 17, 63])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_values_go_on_from_a_state(path, bits, start):
    """Behind tokens that have codes already, the path begins with what those leave."""
    config = RotorConfig(bits, bits)
    chosen = codec(config, 80, layer=LAYER, role="value")
    x, old = rows((B, K, BLOCK, 80)), rows((B, K, BLOCK, 80), seed=1)
    kept = rt.encode(old, config, layer=LAYER, role="value")
    state = trellis.state_after(kept.words, start)
    found = rt.encode(x, config, layer=LAYER, role="value", start=start, state=state)
    mask = torch.from_numpy(chosen.kept_bits(start).view("int32"))
    whole = numpy_of(found._replace(words=(kept.words & mask) | (found.words & ~mask)))
    both = torch.cat([old[:, :, :start], x[:, :, start:]], 2)
    scales = np.concatenate([numpy_of(kept).scales[..., :start], whole.scales[..., start:]], -1)
    check_encoded(float64(both), whole._replace(scales=scales), chosen, cuts=(start,))


@pytest.mark.parametrize(
    ("bits", "role", "start", "state", "message"),
    [
        (3, "value", 64, None, "start must be a number of tokens from 0 to 63, but it is 64"),
        (3, "value", -1, None, "start must be a number of tokens from 0 to 63, but it is -1"),
        (3, "key", 5, torch.zeros(1, 1, 1, 16, dtype=torch.int32), "Only values of 2 or 3 bits"),
        (4, "value", 5, torch.zeros(1, 1, 1, 16, dtype=torch.int32), "Only values of 2 or 3 bits"),
        (2, "value", 5, torch.zeros(1, 1, 16, dtype=torch.int32), "state must have shape"),
        (2, "value", 5, torch.zeros(1, 1, 1, 16), "dtype torch.int32"),
    ],
)
def test_encode_refuses_a_state_that_does_not_fit(bits, role, start, state, message):
    with pytest.raises(ValueError, match=message):
        rt.encode(
            torch.zeros(1, 1, BLOCK, 16),
            RotorConfig(bits, bits),
            layer=0,
            role=role,
            start=start,
            state=state,
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_ties_go_to_the_larger_magnitude(path, bits):
    """The identity keeps coordinates: a row of norm sqrt(D) is quantized as it stands."""
    config = RotorConfig(bits, bits, "identity")
    chosen = codec(config, 16, layer=LAYER, role="value")
    x = torch.ones(1, 1, BLOCK, 16)
    limit = float(codebook.boundaries(bits)[0])
    # D = 16: two numbers at the boundary, the rest makes the norm 4 exactly or not at all.
    below = float(np.nextafter(np.float32(limit), np.float32(0)))
    x[:, :, 0, 0], x[:, :, 1, 0] = limit, below
    for row, first in ((0, limit), (1, below)):
        x[:, :, row, 1] = (2 - first * first) ** 0.5
    codes = reference.unpack(
        numpy_of(rt.encode(x, config, layer=LAYER, role="value")).words, chosen
    )
    norm = (x[0, 0, :2].double() ** 2).sum(-1).sqrt().float()
    z = (x[0, 0, :2, 0] * (4 / norm)).numpy()
    expected = np.searchsorted(codebook.boundaries(bits), z, side="right")
    assert codes[0, 0, 0, :2, 0].tolist() == expected.tolist()


def test_given_centres_are_used(path):
    x = rows((1, K, BLOCK, 64))
    config = RotorConfig()
    centres = rt.encode(x, config, layer=LAYER, role="key").centres + 1
    chosen = codec(config, 64, layer=LAYER, role="key")
    found = rt.encode(x, config, layer=LAYER, role="key", centres=centres)
    expected = reference.encode(x, chosen, centres=centres)
    assert torch.equal(found.centres, centres)
    codes = [reference.unpack(w, chosen) for w in (numpy_of(found).words, expected.words)]
    # As in test_encode_is_the_reference.
    assert (codes[0] != codes[1]).mean() < 1e-4


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", codebook.BITS)
def test_badly_met_rows(path, bits):
    """Their scale is twice their size at most."""
    config, x = RotorConfig(bits, bits, "identity", channel_scale="none"), badly_met_rows()
    found = rt.encode(torch.from_numpy(x), config, layer=0, role=VALUE)
    expected = reference.encode(x, codec(config, 80, layer=0, role=VALUE))
    assert np.array_equal(found.scales.numpy(), expected.scales)


@pytest.mark.parametrize("name", masks(100, 5))
@pytest.mark.parametrize("length", [1, 5])
def test_attend_with_mask(path, name, length):
    if name == "nothing":
        sources, _ = make_sources(RotorConfig(), (80, 112), torch.float32)
        lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        query, mask = rows((B, H, length, 80)), masks(100, length)[name]
        found = rt.attend(
            query, lengths, *sources, RotorConfig(), layer=LAYER, scale=0.1, mask=mask
        )
        assert found.eq(0).all()
    else:
        check(RotorConfig(), (80, 112), name, length=length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "dims"), [((2, 3), (64, 64)), ((3, 8), (112, 80)), ((8, 4), (192, 128))], ids=str
)
def test_attend_with_bits(path, bits, dims, dtype):
    check(RotorConfig(*bits), dims, "causal", dtype)


@pytest.mark.parametrize("name", ROTATIONS)
def test_attend_with_rotation(path, name):
    check(RotorConfig(3, 4, name), (96, 64), "causal")


@pytest.mark.parametrize("name", ["none", "causal", "bool"])
def test_attend_with_sink_logits(path, name):
    logits = np.linspace(-3, 6, H).astype(np.float32)
    check(RotorConfig(channel_scale="prefill"), (64, 80), name, logits=logits)


@pytest.mark.parametrize("short", [(0, 0), (0, 2), (0, SINK), (0, 50), (64, 64 + SINK)], ids=str)
def test_attend_with_short_rows(path, short):
    """A row with fewer tokens than queries, than the sink, or without a tail, beside another."""
    check(RotorConfig(), (64, 80), "causal", lengths=(LENGTHS[0], short))


def test_attend_without_packed_blocks(path):
    config = RotorConfig()
    keys, values = (
        replace(x, packed=None) for x in make_sources(config, (64, 64), torch.float32)[0]
    )
    query, lengths = rows((B, H, L, 64)), ((0, 60), (0, 30))
    found = rt.attend(
        query,
        torch.tensor(lengths, dtype=torch.int32),
        keys,
        values,
        config,
        layer=LAYER,
        scale=0.1,
        causal=True,
    )
    for b, (_, n) in enumerate(lengths):
        exact = (float64(x.exact[b : b + 1, :, :n]) for x in (keys, values))
        expected = reference.attend(float64(query[b : b + 1]), *exact, scale=0.1, mask="causal")
        # Sums are in float32.
        assert np.abs(float64(found[b]) - expected[0]).max() <= 2e-6 * np.abs(expected).max()


def test_attend_without_exact_tokens(path):
    """Their buffer is empty; one that comes from a file has strides of zero."""
    config, lengths = RotorConfig(sink=0), ((4 * BLOCK, 4 * BLOCK), (100, 100))
    sources, vectors = make_sources(config, (64, 64), torch.float32, lengths)
    empty = torch.empty_strided((B, K, 0, 64), (0, 0, 0, 0))
    query = rows((B, H, L, 64))
    found = rt.attend(
        query,
        torch.tensor(lengths, dtype=torch.int32),
        *(replace(source, exact=empty) for source in sources),
        config,
        layer=LAYER,
        scale=0.1,
    )
    for b in range(B):
        expected = reference.attend(
            float64(query[b : b + 1]),
            *(v[b] for v in vectors),
            scale=0.1,
            noise=noise_of_row(query, sources[0], lengths, b, 0.1, sink=0),
        )
        # Sums are in float32.
        assert np.abs(float64(found[b]) - expected[0]).max() <= 2e-6 * np.abs(expected).max()


def test_attend_in_tiles_is_attend(monkeypatch):
    monkeypatch.setattr(cpu_library, "missing", lambda: "this test wants torch operations")
    monkeypatch.setattr(torch_ops, "TILE_TOKENS", BLOCK)
    check(RotorConfig(), (80, 64), "causal")


# ---- as operators -------------------------------------------------------------------------------

CODEC = {"bits": 4, "rotation": "cascade", "seed": 0, "layer": LAYER}
ATTEND = {
    "key_bits": 4,
    "value_bits": 4,
    "rotation": "cascade",
    "seed": 0,
    "layer": LAYER,
    "sink": SINK,
    "scale": 0.125,
    "causal": True,
}


def attend_arguments():
    (keys, values), _ = make_sources(RotorConfig(), (64, 80), torch.float32)
    return [
        rows((B, H, L, 64)),
        torch.tensor(LENGTHS, dtype=torch.int32),
        keys.exact,
        *keys.packed,
        None,
        values.exact,
        *values.packed[:2],
        None,
        None,
        None,
    ]


def test_operators_pass_opcheck():
    x = rows((B, K, 2 * BLOCK, 64))
    key, value = (rt.encode(x, RotorConfig(), layer=LAYER, role=role) for role in ROLES)
    ops = torch.ops.rotormlx
    for role, centres in (("key", None), ("key", key.centres), ("value", None)):
        arguments = (x, centres, torch.full((K, 64), 2.0))
        opcheck(ops.encode.default, arguments, {"role": role, **CODEC})
    for role, packed in (("key", key), ("value", value)):
        facts = {"role": role, "head_dim": 64, "dtype": torch.float16, **CODEC}
        opcheck(ops.decode.default, (*packed, None), facts)
    opcheck(ops.attend.default, tuple(attend_arguments()), ATTEND)


def test_operators_compile_without_graph_breaks():
    def step(x, *arguments):
        words, scales, centres = torch.ops.rotormlx.encode(x, None, None, role="key", **CODEC)
        decoded = torch.ops.rotormlx.decode(
            words, scales, centres, None, role="key", head_dim=64, dtype=torch.float32, **CODEC
        )
        return decoded + 1, torch.ops.rotormlx.attend(*arguments, **ATTEND) * 2

    x, arguments = rows((B, K, BLOCK, 64)), attend_arguments()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, *arguments), step(x, *arguments), strict=True):
        assert torch.equal(found, expected)


@needs_library
@pytest.mark.parametrize(("tokens", "threads"), [(100, 1), (6000, 3)])
def test_the_library_has_torch_s_threads(monkeypatch, tokens, threads):
    """But for a call of attention that one thread has done before another one wakes."""
    seen = {}

    def recorded(name, function):
        def call(*args, **options):
            seen[name] = options["threads"]
            return function(*args, **options)

        return call

    for name in ("encode", "decode", "attend"):
        monkeypatch.setattr(cpu_library, name, recorded(name, getattr(cpu_library, name)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    config = RotorConfig()
    exact = torch.randn(1, 1, tokens, 64)
    packed = rt.encode(exact[:, :, :BLOCK], config, layer=0, role=KEY)
    rt.decode(packed, config, head_dim=64, layer=0, role=KEY)
    views = (
        KVView(codec(config, 64, layer=0, role=role), exact, None, None) for role in (KEY, VALUE)
    )
    lengths = torch.tensor([[0, tokens]], dtype=torch.int32)
    rt.attend(torch.randn(1, 2, 1, 64), lengths, *views, config, layer=0, scale=0.1)
    assert seen == {"encode": 3, "decode": 3, "attend": threads}


def test_torch_operations_never_wait_for_the_device():
    """Tracing fails where a number is read from a tensor, and one trace serves all lengths."""
    (keys, values), _ = make_sources(RotorConfig(), (64, 80), torch.float32)
    facts = {"sink": SINK, "scale": 0.1, "causal": True, "mask": None, "sink_logits": None}

    def attend(query, lengths):
        return torch_ops.attend(torch_ops.AttendCall(query, lengths, keys, values, **facts))

    query = rows((B, H, L, 64))
    traced = make_fx(attend)(query, torch.tensor(LENGTHS, dtype=torch.int32))
    for pairs in (LENGTHS, LENGTHS[::-1], ((64, 100), (0, 30))):
        lengths = torch.tensor(pairs, dtype=torch.int32)
        found, expected = traced(query, lengths), attend(query, lengths)
        assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))


# ---- what is refused ----------------------------------------------------------------------------


def encode_refused(x, message, role="key", **parts):
    with pytest.raises(ValueError, match=message):
        rt.encode(x, RotorConfig(), layer=LAYER, role=role, **parts)


def test_encode_refuses_what_does_not_fit():
    x = rows((B, K, BLOCK, 64))
    encode_refused(x[0], r"\[encode\] The keys must have 4 dimensions \(batch, heads, tokens")
    encode_refused(x[:, :, :60], "S a multiple of 64, but the keys have shape")
    encode_refused(
        x.double(), "must be float16, bfloat16 or float32, but the dtype is torch.float64"
    )
    encode_refused(x.transpose(-1, -2), "must be contiguous, but its stride is 64")
    encode_refused(rows((B, K, BLOCK, 52)), "head_dim must be a multiple of 8")
    encode_refused(x, "role must be 'key' or 'value', but 'keys'", role="keys")
    scale = torch.ones(K, 64)
    encode_refused(x, r"channel scale must have shape \(3, 64\)", channel_scale=scale[1:])
    encode_refused(x, "dtype torch.float32, but they", channel_scale=scale.double())
    centres = torch.zeros(B, K, 1, 64, dtype=torch.float16)
    encode_refused(x, "centres must have shape", centres=centres[:1])
    encode_refused(x, "Only keys have centres", role="value", centres=centres)
    encode_refused(x.to("meta"), "must be on meta, but the key centres are on cpu", centres=centres)


def test_decode_refuses_another_configuration():
    config = RotorConfig()
    packed = rt.encode(rows((B, K, BLOCK, 64)), config, layer=LAYER, role="key")
    facts = {"head_dim": 64, "layer": LAYER, "role": "key"}
    with pytest.raises(ValueError, match=r"words must have shape .* use the configuration that"):
        rt.decode(packed, RotorConfig(key_bits=3), **facts)
    with pytest.raises(ValueError, match="Packed keys must have centres"):
        rt.decode(packed._replace(centres=None), config, **facts)
    with pytest.raises(ValueError, match="decoded vectors must be float16"):
        rt.decode(packed, config, dtype=torch.int32, **facts)


NAMES = [
    *("query", "lengths"),
    *("key_exact", "key_words", "key_scales", "key_centres", "key_channel_scale"),
    *("value_exact", "value_words", "value_scales", "value_channel_scale"),
    *("mask", "sink_logits"),
]
REFUSED = {
    "query-ndim": ("query", lambda x: x[0], "query must have 4 dimensions"),
    "query-dtype": ("query", lambda x: x.double(), "query must be float16"),
    "query-stride": ("query", lambda x: x[..., :32].repeat(1, 1, 1, 4)[..., ::2], "stride is 2"),
    "query-heads": ("query", lambda x: x[:, :4], "a multiple of 3"),
    "query-device": ("query", lambda x: x.to("meta"), "must be on meta, but the lengths are on"),
    "lengths-shape": ("lengths", lambda x: x[:1], r"lengths must have shape \(2, 2\)"),
    "lengths-dtype": ("lengths", lambda x: x.long(), "dtype torch.int32"),
    "lengths-packed": ("lengths", lambda x: x + 64, "row 0 has 320 packed of 394 tokens"),
    "lengths-exact": ("lengths", lambda x: x * torch.tensor([0, 1]).int(), "at most 77 exact"),
    "lengths-negative": ("lengths", lambda x: x * 0 - 1, "from 0 to 256 packed tokens"),
    "exact": ("value_exact", lambda x: x[:, :, 1:], "must agree in batch, KV heads and capacity"),
    "words-bits": ("key_words", lambda x: x[..., :4, :], "key words must have shape"),
    "words-missing": ("key_words", lambda x: None, "given together or not at all"),
    "scales-dtype": ("value_scales", lambda x: x.float(), "dtype torch.float16"),
    "scales-device": ("value_scales", lambda x: x.to("meta"), "value scales are on meta"),
    "centres": ("key_centres", lambda x: x[..., :32], "key centres must have shape"),
    "mask-causal": (
        "mask",
        lambda x: torch.ones(1, dtype=torch.bool),
        "Only one of causal and a mask",
    ),
    "logits": ("sink_logits", lambda x: torch.ones(H + 1), r"must have shape \(6,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attend_refuses_what_does_not_fit(name):
    argument, change, message = REFUSED[name]
    arguments = attend_arguments()
    place = NAMES.index(argument)
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=message):
        torch.ops.rotormlx.attend(*arguments, **ATTEND)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 1, 1, 1, dtype=torch.bool), "must be broadcastable to"),
        (torch.ones(1, 1, 1, 1, 1, dtype=torch.bool), "must be broadcastable to"),
        (torch.ones(1, dtype=torch.int32), "must be boolean or floating"),
        (torch.ones(1, dtype=torch.bool, device="meta"), "the mask are on meta"),
    ],
    ids=["shape", "ndim", "dtype", "device"],
)
def test_attend_refuses_a_mask(mask, message):
    arguments = attend_arguments()
    arguments[NAMES.index("mask")] = mask
    with pytest.raises(ValueError, match=message):
        torch.ops.rotormlx.attend(*arguments, **{**ATTEND, "causal": False})
