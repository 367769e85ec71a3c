"""Attention of many queries: MLX's own over exact tokens and decoded ones."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from rotormlx.codec import rotation
from rotormlx.codec.format import BLOCK, KEY, ROLES, Codec, codec
from rotormlx.config import BITS, ROTATIONS, RotorConfig
from rotormlx.mlx import backends, hosts, integration, prefill
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import backend, choices, kept
from rotormlx.mlx.backends.example import Size
from rotormlx.mlx.backends.mlx_ops import KERNEL, LIBRARY, MLXBackend, Prompts
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView
from tests.support import attend_cases
from tests.support import models as tiny
from tests.support.attend_cases import MASKS, ROUNDING, Case

# head_dims of MLX's fast kernels on Apple's GPUs.
METAL_DIMS = (64, 72, 80, 96, 128)
# Two queries of 36 rows of a KV head, all of them in the tail.
MANY = Case(length=36, repeats=2)


class Library:
    """MLX's attention, called as tests/support/attend_cases.py calls a platform."""

    def attend(self, queries, keys, values, *, launch=None, **options):
        chosen = backend()
        chosen.timed_prompts = Prompts(LIBRARY, LIBRARY)
        call = AttendCall(queries, keys, values, **options)
        assert prefill.choice(call, chosen) == LIBRARY
        return prefill.attend(call, chosen)


LIBRARY_RUNNER = Library()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """One KV head and a few queries at once, so that every case takes several; few are many."""
    monkeypatch.setattr(prefill, "LEAST_ROWS", 64)
    monkeypatch.setattr(prefill, "TILE_BYTES", 1)
    monkeypatch.setattr(prefill, "SCORE_BYTES", 2**15)


# head_dims of fast kernels, and whether a mask is cheaper there than any channel.
WAYS = {
    "scores": ((), False),
    "channel": ((72, 96, 120, 200), False),
    "mask": ((64, 80, 112, 128, 192), True),
}


@pytest.fixture(params=WAYS)
def each_way(request, monkeypatch):
    """As if MLX had a fast kernel for no head_dim, for those with room for one more channel, or
    for those of the cases.
    """
    dims, masked = WAYS[request.param]
    monkeypatch.setattr(prefill, "_FAST_DIMS", dims)
    monkeypatch.setattr(prefill, "_is_fast", lambda dim, *_: dim in dims)
    monkeypatch.setattr(prefill, "_MASK_CHANNELS", -1000 if masked else 1000)
    return request.param


def check(case, pose=attend_cases.problem, roundings=None):
    """``roundings`` of the dtype, where vectors, weights and scores are rounded to 16 bits."""
    made = pose(case)
    if roundings is not None:
        size = np.abs(made.expected).max()
        made = replace(made, tolerance=roundings * ROUNDING[case.dtype] * size)
    made.check(LIBRARY_RUNNER)


# ---- packed tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_masks(each_way, mask):
    check(replace(MANY, mask=mask))


@pytest.mark.parametrize("bits", BITS)
def test_bits(each_backend, bits):
    check(replace(MANY, bits=(bits, 12 // bits if bits in (3, 4) else 10 - bits), mask="causal"))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("mask", ["causal", "bool", "additive"])
def test_16_bits(each_way, mask, dtype):
    """With sink logits, and masks to add, of float32."""
    check(replace(MANY, dtype=dtype, mask=mask, sink_logits=True), roundings=8)


def test_noise_beyond_float16_is_no_nan(each_way):
    """Exact tokens, off whose scores nothing is taken, go on."""
    made = attend_cases.problem(replace(MANY, bits=(2, 2), dtype="f16", mask="causal"))
    queries = made.queries * 300
    output = LIBRARY_RUNNER.attend(queries, *made.views, scale=1.0, mask="causal")
    assert mx.all(mx.isfinite(output)).item()


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations(name):
    check(replace(MANY, rotation=name, dims=(96, 64), bits=(3, 4), mask="causal"))


@pytest.mark.parametrize("dims", [(64, 64), (112, 80), (128, 128), (192, 128)], ids=str)
def test_head_dims(each_way, dims):
    check(replace(MANY, dims=dims, mask="causal"))


@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_sink_logits(each_way, mask):
    check(replace(MANY, mask=mask, sink_logits=True))


@pytest.mark.parametrize(("mask", "length"), [("none", 26), ("causal", 20), ("causal", 26)])
def test_ragged_rows(each_way, mask, length):
    """One row counts fewer packed tokens; one none, and 23 tokens in all."""
    case = replace(MANY, batch=3, length=length, repeats=4, mask=mask)
    check(case, attend_cases.with_own_lengths)


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_rows_with_channel_scales_of_their_own(each_backend, each_way, mask, monkeypatch):
    monkeypatch.setattr(prefill, "TILE_BYTES", 2**30)  # all KV heads at once
    check(replace(MANY, mask=mask), attend_cases.with_own_scales)


@pytest.mark.parametrize("change", [{"sink": 0}, {"missing": 0}, {"blocks": 1, "missing": 63}])
def test_edges_of_the_packed_tokens(each_way, change):
    check(replace(MANY, mask="causal", **change))


def test_calibrated_rotations(each_way):
    """A matrix of its own for every KV head, none of which keeps lengths."""
    case = replace(MANY, mask="causal", channel_scale="none")
    made = attend_cases.problem(case)
    matrices = np.random.default_rng(3).normal(size=(3, 64, 64)) + 8 * np.eye(64)
    chosen = rotation.calibrated(matrices.astype(np.float32))
    keys = replace(made.views[0], codec=Codec(KEY, 4, chosen))
    given = (made.queries, keys, made.views[1])
    expected = np.array(MLXBackend().attend(AttendCall(*given, **made.options)))
    found = np.array(LIBRARY_RUNNER.attend(*given, **made.options))
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("mask", ["causal", "window", "bool"])
@pytest.mark.parametrize("role", ROLES)
def test_a_broken_token_reaches_no_query_that_does_not_see_it(each_way, role, mask):
    """Who does not see it answers bit for bit as if it were another, who sees it with a NaN."""
    made = attend_cases.problem(replace(MANY, mask=mask))
    index, token = ROLES.index(role), 30
    found = []
    for scale in (20.0, np.nan):
        views = list(made.views)
        scales = views[index].packed.scales + 0
        scales[:, :, 0, token - made.case.sink] = scale
        views[index] = replace(views[index], packed=views[index].packed._replace(scales=scales))
        found.append(np.array(LIBRARY_RUNNER.attend(made.queries, *views, **made.options)))
    mask = made.options["mask"]
    seen = True if isinstance(mask, str) else np.array(mask)[..., token]
    seen = np.broadcast_to(seen, found[0].shape[:3])
    assert np.isnan(found[1][seen]).all()
    assert np.array_equal(found[0][~seen], found[1][~seen])


@pytest.mark.parametrize("mask", ["causal", "window", "bool"])
def test_a_broken_exact_key_reaches_no_query_that_does_not_see_it(each_way, mask):
    made = attend_cases.problem(replace(MANY, mask=mask))
    token = made.case.tokens - 20
    found = []
    for number in (0.0, np.nan):
        exact = made.views[0].exact + 0
        exact[:, :, token - made.case.packed_tokens, 3] = number
        views = replace(made.views[0], exact=exact), made.views[1]
        found.append(np.array(LIBRARY_RUNNER.attend(made.queries, *views, **made.options)))
    mask = made.options["mask"]
    seen = np.arange(36)[:, None] >= 16 if isinstance(mask, str) else np.array(mask)[..., token]
    seen = np.broadcast_to(seen.reshape(-1) if seen.ndim < 3 else seen, found[0].shape[:3])
    assert np.isnan(found[1][seen]).all()
    assert np.array_equal(found[0][~seen], found[1][~seen])


@pytest.mark.parametrize("mask", [False, -np.inf])
def test_a_query_that_sees_nothing_gives_zero(each_way, mask):
    made = attend_cases.problem(MANY)
    options = {"scale": 0.1, "mask": mx.array(mask)}
    assert np.array_equal(
        LIBRARY_RUNNER.attend(made.queries, *made.views, **options), 0 * made.expected
    )


# ---- nothing packed -----------------------------------------------------------------------------

TOKENS = 90


def exact_views(dtype, rows=None):
    """Keys and values with room behind their tokens, and those tokens."""
    views, given = [], []
    for role, dim in zip(ROLES, (64, 80), strict=True):
        x = mx.random.normal((3, 2, TOKENS, dim)).astype(dtype)
        chosen = codec(RotorConfig(), dim, layer=0, role=role)
        room = mx.full((3, 2, 9, dim), mx.nan, dtype)
        buffer = mx.concatenate([x, room], axis=2)
        views.append(KVView(chosen, buffer, None, None, 4, 0, TOKENS, rows))
        given.append(x)
    return views, given


@pytest.mark.parametrize("dtype", attend_cases.DTYPES)
@pytest.mark.parametrize("length", [TOKENS, TOKENS - 2, 1])
@pytest.mark.parametrize("mask", [*MASKS, "logits"])
def test_the_first_chunk_is_that_of_an_exact_cache(mask, length, dtype):
    """Bit for bit, whatever the number of queries, but for those that see nothing."""
    dtype = attend_cases.DTYPES[dtype]
    views, (keys, values) = exact_views(dtype)
    queries = mx.random.normal((3, 4, length, 64)).astype(dtype)
    logits = None
    if mask == "logits":
        mask, logits = "causal", mx.linspace(-1, 2, 4).astype(dtype)
    case = Case(batch=3, kv_heads=2, length=length, blocks=0, tail=TOKENS - 4, mask=mask)
    given, sees = attend_cases.make_mask(case), mx.array(True)
    if isinstance(given, np.ndarray):
        sees = mx.array((given if given.dtype == bool else given > -np.inf).any(-1, keepdims=True))
        given = mx.array(given if given.dtype == bool else given.astype(np.float32))
        given = given if given.dtype == mx.bool_ else given.astype(dtype)
    options = {"scale": 0.125, "mask": given}
    found = LIBRARY_RUNNER.attend(queries, *views, sink_logits=logits, **options)
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, sinks=logits, **options)
    assert found.dtype == dtype
    assert mx.array_equal(found, mx.where(sees, expected, mx.array(0, dtype))).item()


@pytest.mark.parametrize("mask", [None, "causal", "window"])
def test_a_first_chunk_of_ragged_rows_is_that_of_each_alone(mask, monkeypatch):
    attention = mx.fast.scaled_dot_product_attention

    def over_some(queries, keys, values, **options):
        assert keys.shape[2], "a kernel divides by zero if there are no tokens"
        return attention(queries, keys, values, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", over_some)
    lengths = (TOKENS, 50, 0)
    views, given = exact_views(mx.float32, tuple((0, n) for n in lengths))
    queries = mx.random.normal((3, 4, 60, 64))
    column, last = mx.arange(TOKENS), mx.arange(60)[:, None] + TOKENS - 60
    window = (column <= last) & (column > last - 9)
    found = LIBRARY_RUNNER.attend(
        queries, *views, scale=0.1, mask=window if mask == "window" else mask
    )
    for row, tokens in enumerate(lengths):
        first = max(0, 60 - tokens) if mask == "causal" else 0
        keys, values = (x[row : row + 1, :, :tokens] for x in given)
        own = window[:, :tokens] if mask == "window" else mask
        q = queries[row : row + 1, :, first:]
        expected = mx.zeros((1, 4, 60, 80))
        if tokens:
            expected[:, :, first:] = mx.fast.scaled_dot_product_attention(
                q, keys, values, scale=0.1, mask=own
            )
        if mask == "window":
            expected = mx.where(mx.any(own, axis=-1, keepdims=True), expected, mx.array(0.0))
        assert mx.array_equal(found[row : row + 1], expected).item(), row


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "gemma3_text"])
def test_a_prompt_in_one_chunk_has_the_logits_of_the_exact_cache(model_type, monkeypatch):
    """gpt_oss has sink logits; both others but llama have sliding windows."""
    monkeypatch.setenv("ROTORMLX_BACKEND", "mlx")
    model, prompt = tiny.build(model_type), tiny.tokens(300)
    exact = make_prompt_cache(model)
    expected = tiny.logits(model, prompt, exact, chunk=300)
    with hosts.MLX_LM.in_place():
        caches = integration.make_prompt_cache(model, RotorConfig(window=16))
        found = tiny.logits(model, prompt, caches, chunk=300)
    assert any(isinstance(cache, RotorKVCache) for cache in caches)
    assert mx.array_equal(found, expected).item()


# ---- through the cache --------------------------------------------------------------------------


def read_in_chunks(cache, keys, values, queries, chunk, mask=None):
    """Outputs of a prompt that is read in chunks."""
    outputs = []
    for start in range(0, keys.shape[2], chunk):
        part = slice(start, start + chunk)
        own = cache.make_mask(keys[:, :, part].shape[2], *(() if mask is None else (mask,)))
        views = cache.update_and_fetch(keys[:, :, part], values[:, :, part])
        outputs.append(attend_view(queries[:, :, part], *views, scale=0.125, mask=own))
        mx.eval(outputs[-1])
    return np.array(mx.concatenate(outputs, axis=2))


@pytest.mark.parametrize("window", [None, 100])
def test_later_chunks_of_ragged_batches(each_backend, window):
    """Left padding and own channel scales, as the backend's attention reads them."""
    found = []
    shape = (2, 2, 400, 64)
    keys, values = mx.random.normal(shape), mx.random.normal(shape)
    queries = mx.random.normal((2, 4, 400, 64))
    with hosts.MLX_LM.in_place():
        for prompts in (Prompts(LIBRARY, LIBRARY), Prompts(KERNEL, KERNEL)):
            backend().timed_prompts = prompts
            cache = BatchRotorKVCache([0, 150], RotorConfig(window=16))
            found.append(read_in_chunks(cache, keys, values, queries, 100, window))
    # Queries of padding see nothing, or no other than padding.
    found[0][1, :, :150] = found[1][1, :, :150] = 0
    assert np.abs(found[0] - found[1]).max() <= 4e-6 * np.abs(found[1]).max()


# ---- the choice ---------------------------------------------------------------------------------


def call_of(case):
    made = attend_cases.problem(case)
    return AttendCall(made.queries, *made.views, **made.options)


def test_the_faster_is_chosen(monkeypatch):
    """MLX's attention on a GPU; on a CPU, of its operations, where it is no slower."""

    def prompts(name, dtype):
        return backends._BACKENDS[name][0]().prompts(dtype)

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert prompts("mlx", mx.float32) == Prompts(LIBRARY, KERNEL)
    assert prompts("mlx", mx.bfloat16) == prompts("cpu", mx.float32) == Prompts(KERNEL, KERNEL)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for name in ("metal", "mlx_cuda", "mlx"):
        for dtype in attend_cases.DTYPES.values():
            assert prompts(name, dtype) == Prompts(LIBRARY, LIBRARY)


@pytest.mark.parametrize("first", [LIBRARY, KERNEL])
@pytest.mark.parametrize("later", [LIBRARY, KERNEL])
def test_the_choice_may_be_set(first, later):
    chosen = MLXBackend()
    chosen.timed_prompts = Prompts(first, later)
    assert prefill.choice(call_of(replace(MANY, blocks=0)), chosen) == first
    assert prefill.choice(call_of(MANY), chosen) == later


@pytest.mark.parametrize("faster", [LIBRARY, KERNEL])
def test_on_a_gpu_both_are_timed_once(faster, monkeypatch, tmp_path):
    """The same chunk goes through both; the one that took less is kept."""
    monkeypatch.setenv("ROTORMLX_CACHE", str(tmp_path))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(prefill, "SIZE", Size(4, 2, 128, length=36, packed_tokens=128))
    monkeypatch.setattr(prefill, "_is_fast", lambda *_: False)
    monkeypatch.setattr(choices, "RUNS", 1)
    clock, outputs = [0.0], {}
    monkeypatch.setattr(choices.time, "perf_counter", lambda: clock[0])

    def timed(name, attend):
        def attended(call, *backend):
            clock[0] += 1 if name == faster else 2
            outputs[name] = attend(call, *backend)
            return outputs[name]

        return attended

    monkeypatch.setattr(prefill, "_attend_alike", timed(LIBRARY, prefill._attend_alike))
    chosen = MLXBackend()
    monkeypatch.setattr(chosen, "attend", timed(KERNEL, chosen.attend))
    call = call_of(replace(MANY, bits=(3, 4), dims=(64, 64), dtype="f16"))
    assert prefill.choice(call, chosen) == faster
    found = [np.array(output.astype(mx.float32)) for output in outputs.values()]
    assert len(found) == 2
    assert found[0].shape == (1, 4, 36, 64)
    assert np.abs(found[0] - found[1]).max() <= 2**-8 * np.abs(found[0]).max()
    (kept_as,) = kept.findings("mlx").everything().items()
    assert kept_as == ("attention of prompts, 3 bits, head_dim 64, float16", faster)
    outputs.clear()
    assert prefill.choice(call, chosen) == faster
    assert outputs == {}


def test_the_choice_may_be_named(monkeypatch):
    chosen, call = MLXBackend(), call_of(MANY)
    for name in (LIBRARY, KERNEL):
        monkeypatch.setenv("ROTORMLX_PROMPTS", name)
        assert prefill.choice(call, chosen) == name
    monkeypatch.setenv("ROTORMLX_PROMPTS", "abacus")
    with pytest.raises(RuntimeError, match="must be library or kernel, but it is 'abacus'"):
        prefill.choice(call, chosen)


def test_what_the_library_cannot_do_well_is_left_to_the_backend(monkeypatch):
    chosen = MLXBackend()
    chosen.timed_prompts = Prompts(LIBRARY, LIBRARY)
    assert prefill.choice(call_of(replace(MANY, length=31)), chosen) == KERNEL
    assert prefill.choice(call_of(replace(MANY, length=32)), chosen) == LIBRARY
    # A causal mask may hide packed tokens of a view that no step gives.
    causal = replace(MANY, mask="causal")
    assert prefill.choice(call_of(replace(causal, tail=36)), chosen) == LIBRARY
    assert prefill.choice(call_of(replace(causal, tail=35)), chosen) == KERNEL
    # Tokens of a KV head that do not fit; the key has a channel more.
    head_bytes = 4 * max(65, 80) * MANY.tokens
    monkeypatch.setattr(prefill, "MOST_BYTES", head_bytes)
    assert prefill.choice(call_of(MANY), chosen) == LIBRARY
    monkeypatch.setattr(prefill, "MOST_BYTES", head_bytes - 1)
    assert prefill.choice(call_of(MANY), chosen) == KERNEL


@pytest.mark.parametrize(
    ("generation", "dims", "expected"),
    [
        (13, (64, 64), (72, 72, True)),
        (13, (80, 80), (96, 96, True)),
        (13, (96, 96), (128, 128, True)),
        (13, (112, 112), (128, 128, True)),
        (13, (128, 128), (128, 128, False)),
        (13, (64, 96), (96, 96, True)),
        (17, (64, 64), (96, 96, True)),
        (17, (80, 80), (96, 96, True)),
        (17, (128, 128), (128, 128, False)),
        (13, (192, 192), (193, 192, True)),
    ],
    ids=str,
)
def test_the_noise_leaves_mlx_on_its_fast_path(generation, dims, expected, monkeypatch):
    """head_dims of keys and values, and whether the noise is a channel, on Apple's GPUs."""
    metal = (64, 72, 80, 96, 128)
    monkeypatch.setattr(prefill, "_is_fast", lambda dim, *_: dim in metal)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": f"applegpu_g{generation}s"})
    found = prefill._layout(call_of(Case(dims=dims, dtype="bf16")))
    assert found[:3] == expected
    assert found.is_fast == (dims[0] <= 128)


# ---- memory -------------------------------------------------------------------------------------


def peak_bytes(step):
    """Bytes that a step takes at its peak, beside what there was."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step())
    return mx.get_peak_memory() - before


class Counted(MLXBackend):
    """Decodes to zeros, so that the memory counted is that of prompts alone."""

    timed_prompts = Prompts(LIBRARY, LIBRARY)

    def decode(self, packed, codec, *, channel_scale=None, dtype=mx.float32):
        batch, heads, blocks, _ = packed.scales.shape
        rows = mx.zeros((batch, heads, blocks * BLOCK, codec.head_dim), dtype)
        return mx.depends([rows + 0], [packed.words])[0]


def fast_attention(queries, keys, values, *, scale, mask, sinks):
    """Takes the memory that a fast kernel of MLX takes: that of its output."""
    output = mx.zeros((*queries.shape[:3], values.shape[3]), queries.dtype)
    inputs = [queries, keys, values, *([mask] if isinstance(mask, mx.array) else [])]
    return mx.depends([output], inputs)[0]


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_memory_is_bounded(each_way, mask, monkeypatch):
    """Decoded tokens and scores take what they may, not what all KV heads and queries would."""
    kv_heads, repeats, length, packed, dim = 8, 4, 256, 4096, 64
    tokens = packed + length + 4
    tile = 4 * tokens * dim
    # Keys or values of one KV head of 8; scores of 16 of the 256 queries of its four heads.
    monkeypatch.setattr(prefill, "TILE_BYTES", 1)
    monkeypatch.setattr(prefill, "SCORE_BYTES", tile)
    if each_way != "scores":
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", fast_attention)
    views = []
    for role in ROLES:
        chosen = codec(RotorConfig(), dim, layer=0, role=role)
        made = MLXBackend().encode(mx.ones((1, kv_heads, packed, dim)), chosen)
        exact = mx.ones((1, kv_heads, length + 4, dim))
        views.append(KVView(chosen, exact, made, None, 4, packed, tokens))
    queries = mx.ones((1, kv_heads * repeats, length, dim))
    given = "causal"
    if mask == "window":
        column, last = mx.arange(tokens), mx.arange(length)[:, None] + tokens - length
        given = (column <= last) & (column > last - 500)
    mx.eval(queries, given, *((view.exact, view.packed) for view in views))
    del made, exact
    call = AttendCall(queries, *views, 0.125, given)
    # 10 to 14 tiles: those in use, some on their way, and the queries and the output, 2 each. With
    # all KV heads at once it is 37 and more; with all queries, 40, where there are scores.
    assert peak_bytes(lambda: prefill.attend(call, Counted())) < 20 * tile


def test_batch_rows_are_done_by_themselves_if_a_kv_head_of_all_does_not_fit(monkeypatch):
    shapes = []

    class Recorded(Counted):
        def decode(self, packed, codec, **options):
            shapes.append(packed.scales.shape[:2])
            return super().decode(packed, codec, **options)

    def shapes_within(most):
        monkeypatch.setattr(prefill, "MOST_BYTES", most)
        shapes.clear()
        mx.eval(prefill.attend(call_of(MANY), Recorded()))
        return set(shapes)

    head_bytes = 4 * max(65, 80) * MANY.tokens
    assert shapes_within(2 * head_bytes) == {(2, 1)}
    assert shapes_within(2 * head_bytes - 1) == {(1, 1)}
