"""Long sequences: 200,000 tokens through one cache, and the numbers where 32 bits end."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided

from rotormlx.codec import reference
from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.kernels import cpu_library
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import available, cuda, cuda_text, mlx_ops
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView
from rotormlx.torch import native, torch_ops
from tests.emulator import missing
from tests.support import cuda_calls, noise
from tests.support.bounds import check_encoded

pytestmark = pytest.mark.slow

needs_library = pytest.mark.skipif(
    cpu_library.missing() is not None, reason=f"{cpu_library.missing()}"
)

# ---- 200,000 tokens -----------------------------------------------------------------------------

TOKENS, EVERY, CHECKED = 200_000, 1000, 10_000
H, D, DV = 3, 32, 16
CONFIG = RotorConfig(4, 3, channel_scale="none")
BESIDE = CONFIG.sink + CONFIG.window
RING_BLOCKS = 20
RING = BESIDE + BLOCK - 1 + RING_BLOCKS * BLOCK
# What one thousand tokens come as: of ten thousands one comes token by token.
CHUNKS = [(337, 300, 299, 64), (1000,), (64,) * 15 + (40,), (990, 10), (1,) * 1000]
PLAN = [0, 1, 2, 3, 0, 2, 4, 0, 3, 1]


def thousand(number):
    """Tokens 1000 n to 1000 n + 999: keys and values, float16 ``[1, 1, 1000, D]``."""
    rng = np.random.default_rng(number)
    shift = np.random.default_rng(10**6).normal(size=D) * 2
    keys = rng.normal(size=(1, 1, EVERY, D)) + shift
    return keys.astype(np.float16), rng.normal(size=(1, 1, EVERY, DV)).astype(np.float16)


def original(start, stop):
    """The tokens from start to stop, made again."""
    parts = [thousand(n) for n in range(start // EVERY, -(-stop // EVERY))]
    part = slice(start % EVERY, start % EVERY + stop - start)
    return tuple(np.concatenate(pair, axis=2)[:, :, part] for pair in zip(*parts, strict=True))


class Foreseen:
    """What docs/FORMAT.md and the room for growth say that a cache takes."""

    def __init__(self, max_blocks=None):
        self.max_blocks, self.tokens, self.blocks, self.allocated = max_blocks, 0, 0, 0

    def append(self, count):
        self.tokens += count
        held = BLOCK * self.blocks  # evicted blocks among them
        self.blocks += max(0, self.tokens - held - BESIDE) // BLOCK
        held_blocks = min(self.blocks, self.max_blocks or self.blocks)
        if held_blocks > self.allocated:
            room = max(4, held_blocks // 32)
            self.allocated = min(held_blocks + room, self.max_blocks or 10**9)

    @property
    def nbytes(self):
        exact = (BESIDE + BLOCK) * (D + DV) * 2
        # Words, scales and centres of a block: 4 and 3 bits a number, 2 bytes a token and channel.
        keys, values = BLOCK * D * 4 // 8 + 2 * BLOCK + 2 * D, BLOCK * DV * 3 // 8 + 2 * BLOCK
        return exact + self.allocated * (keys + values)


def resident_bytes():
    """Of this process; None where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else None


def block_numbers(cache):
    """The number of the block in each slot, counted from the start of the sequence."""
    slots, youngest = cache.packed_tokens // BLOCK, cache.counts.next_block - 1
    return [youngest - (youngest - slot) % slots for slot in range(slots)]


def check_sampled_blocks(cache, rng):
    """Some blocks hold the codes of their own tokens, and attention reads them and no others."""
    numbers = block_numbers(cache)
    slots = sorted({0, len(numbers) - 1, *rng.integers(0, len(numbers), 3).tolist()})
    visible = np.zeros((1, cache.size()), bool)
    tail = cache.counts.exact - CONFIG.sink
    visible[:, : CONFIG.sink] = visible[:, cache.size() - tail :] = True
    sink, end = original(0, CONFIG.sink), original(cache.offset - tail, cache.offset)
    decoded, key_blocks = {role: [] for role in ROLES}, []
    for slot in slots:
        first = CONFIG.sink + numbers[slot] * BLOCK
        visible[:, CONFIG.sink + slot * BLOCK :][:, :BLOCK] = True
        for role, tokens in zip(ROLES, original(first, first + BLOCK), strict=True):
            store = cache._keys if role == KEY else cache._values
            held = Packed(
                *(None if a is None else np.array(a[:, :, slot : slot + 1]) for a in store.packed)
            )
            check_encoded(tokens.astype(np.float64), held, store.codec, centres=held.centres)
            decoded[role].append(reference.decode(held, store.codec))
            if role == KEY:
                key_blocks.append(held)
    keys = np.concatenate([sink[0], *decoded[KEY], end[0]], axis=2)
    values = np.concatenate([sink[1], *decoded[VALUE], end[1]], axis=2)
    queries = rng.normal(size=(1, H, 1, D)).astype(np.float32)
    views = cache.keys_and_values()
    found = attend_view(mx.array(queries), *views, scale=0.3, mask=mx.array(visible))
    seen = Packed(*(np.concatenate(parts, axis=2) for parts in zip(*key_blocks, strict=True)))
    taken = noise.of_sequence(
        queries,
        seen,
        cache._keys.codec,
        scale=0.3,
        channel_scale=None,
        sink=CONFIG.sink,
        packed_tokens=len(slots) * BLOCK,
        tokens=keys.shape[2],
    )
    expected = reference.attend(queries, keys, values, scale=0.3, noise=taken)
    # docs/FORMAT.md, section 9: float32 sums.
    assert np.abs(np.array(found) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_200000_tokens(figure):
    """Bytes are those foreseen at every thousand, memory follows them, and nothing is mixed up."""
    caches = {"all": RotorKVCache(CONFIG), "ring": RotorKVCache(CONFIG, max_size=RING)}
    foreseen = {"all": Foreseen(), "ring": Foreseen(RING_BLOCKS)}
    rng = np.random.default_rng(3)
    beside, resident = [], []
    for number in range(TOKENS // EVERY):
        keys, values = map(mx.array, thousand(number))
        start = 0
        for count in CHUNKS[PLAN[number % len(PLAN)]]:
            part = slice(start, start + count)
            for name, cache in caches.items():
                cache.update_and_fetch(keys[:, :, part], values[:, :, part])
                foreseen[name].append(count)
                mx.eval(cache.state)  # as hosts do: the step is over
            start += count
        del keys, values
        for name, cache in caches.items():
            assert cache.offset == (number + 1) * EVERY
            assert cache.nbytes == foreseen[name].nbytes, (name, cache.offset)
        if (number + 1) % (CHECKED // EVERY) == 0:
            for cache in caches.values():
                check_sampled_blocks(cache, rng)
        gc.collect()
        mx.clear_cache()
        beside.append(mx.get_active_memory() - sum(cache.nbytes for cache in caches.values()))
        resident.append(resident_bytes())
    held = {name: cache.nbytes for name, cache in caches.items()}
    assert caches["ring"].size() <= RING
    assert caches["ring"].is_trimmable() is False
    # The backend keeps 64 small arrays of zeros, and a buffer may lie in one that was freed and is
    # larger. What stayed behind of each thousand, 27 KB, would add up to 5 MB.
    assert max(beside) - beside[0] < 2**19
    true_bytes = TOKENS * (D * 4 + DV * 3) / 8 + TOKENS * 4 + TOKENS * D * 2 / BLOCK
    assert held["all"] < true_bytes * (1 + 1 / 32) + (BESIDE + BLOCK) * (D + DV) * 2 + 4 * 3000
    line = f"200,000 tokens, head_dim 32 and 16, K4V3: {held['all']:,} bytes, "
    line += f"a ring of 20 blocks {held['ring']:,}"
    if resident[0] is not None:
        # After the first 20,000 tokens: what the cache grew by, and what the allocators keep.
        grown = resident[-1] - resident[20]
        assert grown < held["all"] + 32 * 2**20
        line += f"; the process grew by {grown / 2**20:.1f} MiB after the first 20,000"
    figure(line)


# ---- where 32 bits end --------------------------------------------------------------------------

needs_memory = pytest.mark.skipif(
    not Path("/proc/meminfo").exists(), reason="only Linux is known to give zero pages for nothing"
)


def zeros(shape, dtype):
    """Zeros that take no memory until they are written."""
    try:
        return np.zeros(shape, dtype)
    except MemoryError:
        pytest.skip(f"this machine gives no address space for {shape} of {np.dtype(dtype)}")


def packed_zeros(chosen, blocks, batch=1):
    """Blocks whose rows are all zero: so are their scales."""
    front = (batch, 1, blocks)
    centres = zeros((*front, chosen.head_dim), np.float16) if chosen.role == KEY else None
    words = zeros((*front, *chosen.words_shape), np.uint32)
    return Packed(words, zeros((*front, BLOCK), np.float16), centres)


def attend_native(queries, exact, packed, codecs, lengths, **options):
    output = np.empty((*queries.shape[:3], codecs[1].head_dim), np.float32)
    blocks = tuple(cpu_library.Blocks(c, *p, None) for c, p in zip(codecs, packed, strict=True))
    sources = map(cpu_library.Source, exact, blocks)
    cpu_library.attend(queries, output, *sources, lengths, sink=0, scale=1.0, **options)
    return output


def attend_torch(queries, exact, packed, codecs, lengths, **options):
    sources = []
    for c, p, e in zip(codecs, packed, exact, strict=True):
        parts = [None if a is None else torch.from_numpy(a) for a in p]
        parts[0] = parts[0].view(torch.int32)
        sources.append(torch_ops.KVView(c, torch.from_numpy(e), Packed(*parts), None))
    options = {"causal": False, "mask": None, "sink_logits": None} | options
    counts = torch.tensor(lengths, dtype=torch.int32)
    q = torch.from_numpy(queries)
    call = torch_ops.AttendCall(q, counts, *sources, sink=0, scale=1.0, **options)
    return native.attend(call).numpy()


@needs_library
@needs_memory
@pytest.mark.parametrize("attend", [attend_native, attend_torch])
def test_words_beyond_2_to_31(attend):
    """Blocks in front of and behind word number 2^31, of eight million tokens.

    All other blocks are zero, so their tokens have score and value 0: only their number counts.
    """
    config = RotorConfig(8, 8)
    codecs = [codec(config, 1024, layer=0, role=role) for role in ROLES]
    block_words = 4 * BLOCK * 64  # of either role
    blocks = 2**31 // block_words + 3
    packed = [packed_zeros(c, blocks) for c in codecs]
    rng = np.random.default_rng(0)
    keys, values = (rng.normal(size=(1, 1, 4 * BLOCK, 1024)).astype(np.float32) for _ in ROLES)
    places = [0, 2**31 // block_words - 1, 2**31 // block_words, blocks - 1]
    decoded = []
    for c, p, x in zip(codecs, packed, (keys, values), strict=True):
        made = reference.encode(x, c)
        for i, place in enumerate(places):
            for whole, part in zip(p, made, strict=True):
                if whole is not None:
                    whole[:, :, place] = part[:, :, i]
        decoded.append(reference.decode(made, c)[0, 0])
    # Each query finds one token, each in another of the four blocks.
    queries = keys[:, :, [5, BLOCK + 6, 2 * BLOCK + 7, 3 * BLOCK + 8]] / 40
    exact = [np.zeros((1, 1, 0, 1024), np.float32)] * 2
    found = attend(queries, exact, packed, codecs, [(blocks * BLOCK,) * 2])

    scores = queries[0, 0].astype(np.float64) @ decoded[0].T
    others = (blocks - 4) * BLOCK
    weights = np.exp(scores)
    expected = weights @ decoded[1] / (weights.sum(-1, keepdims=True) + others)
    # float32 sums of 1024 terms make a score of 26 wrong by 1e-6 of it at most.
    assert np.abs(found[0, 0] - expected).max() <= 1e-4 * np.abs(expected).max()
    # Most of each output is the token that was asked for.
    assert (weights.max(-1) > 0.9 * (weights.sum(-1) + others)).all()


@needs_memory
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=["f16", "f32"])
def test_cuda_kernels_read_words_beyond_2_to_31(dtype):
    """The second batch row begins at word number 2^31, of keys and of values."""
    apart = 2**31
    codecs = [codec(RotorConfig(4, 3), 32, layer=0, role=role) for role in ROLES]
    rng = np.random.default_rng(4)
    call, a = cuda_calls.Call(), cuda_calls.AttendArguments()
    a.dtype, a.scale, a.batch, a.heads, a.kv_heads, a.length = (
        cuda_calls.DTYPES[dtype],
        0.2,
        2,
        3,
        1,
        1,
    )
    a.packed_tokens = BLOCK
    a.lengths = call.plain("lengths", np.full((2, 2), BLOCK, np.int32))
    queries = rng.normal(size=(2, 3, 1, 32)).astype(np.float32)
    q = mx.array(queries).astype(dtype)
    a.q = call.plain("q", q)
    a.q_strides = (ctypes.c_int64 * 3)(3 * 32, 32, 32)
    vectors = []
    for role, c in zip(("keys", "values"), codecs, strict=True):
        made = reference.encode(rng.normal(size=(2, 1, BLOCK, 32)), c)
        vectors.append(reference.decode(made, c))
        if role == "keys":
            key_blocks = made
        size = made.words[0].size
        words = zeros(apart + size, np.uint32)
        words[:size], words[apart:] = made.words[0].ravel(), made.words[1].ravel()
        packed = getattr(a, role)
        packed.words, packed.words_strides = (
            call.plain(role, words),
            (ctypes.c_int64 * 3)(apart, 0, 0),
        )
        packed.scales = call.plain(f"{role} scales", made.scales)
        packed.scales_strides = (ctypes.c_int64 * 3)(BLOCK, 0, 0)
        if made.centres is not None:
            packed.centres = call.plain("centres", made.centres)
            packed.centres_strides = (ctypes.c_int64 * 3)(32, 0, 0)
        nothing = call.plain(f"exact {role}", np.zeros((2, 1, 1, 32), np.float32))
        setattr(a, f"exact_{role}", nothing)
    a.key_matrix = call.plain("key_matrix", mlx_ops.inverse_matrix(codecs[0].rotation).T)
    a.value_matrix = call.plain("value_matrix", mlx_ops.inverse_matrix(codecs[1].rotation))
    out = cuda_calls.output((2, 3, 1, 32), dtype)
    a.out = call.plain("out", out, written=True)
    module = cuda_calls.module("attend", *codecs)
    plan = cuda_calls.plan_of(a, codecs, module)
    count = module.number("rotormlx_attend_workspace", a, plan) // 4
    a.workspace = call.plain("workspace", np.full(count, np.nan, np.float32), written=True)
    module.call("rotormlx_attend", a, call.buffers, plan=plan)
    found = np.array(cuda_calls.from_numpy(out, dtype).astype(mx.float32))
    rounded = np.array(q.astype(mx.float32))
    taken = reference.score_noise(rounded, key_blocks, codecs[0], scale=0.2)
    expected = reference.attend(rounded, *vectors, scale=0.2, noise=taken)
    # Two roundings to float16 or float32 of queries, weights and output.
    assert np.abs(found - expected).max() <= {mx.float16: 4e-3, mx.float32: 1e-5}[dtype]


def free_bytes():
    """Memory that is free, or would be made free; 0 where the system does not tell."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), 0)


@pytest.mark.skipif(free_bytes() < 5 * 2**30, reason="less than 5 GiB of memory are known free")
def test_mlx_buffers_beyond_2_to_31_bytes(monkeypatch):
    """The last row of a batch lies behind byte 2^31: written by a slice, read by each backend."""
    config = RotorConfig(8, 2, sink=0)
    codecs = [codec(config, 1024, layer=0, role=role) for role in ROLES]
    batch, last = 9, 8
    capacity = 2**31 // (last * 256 * BLOCK * 4) + 1  # blocks of a row
    rng = np.random.default_rng(2)
    views, decoded = [], []
    for c in codecs:
        made = reference.encode(rng.normal(size=(1, 1, 3 * BLOCK, 1024)), c)
        buffers = []
        for part in made:
            whole = None
            if part is not None:
                whole = mx.zeros((batch, 1, capacity, *part.shape[3:]), mx.array(part).dtype)
                mx.eval(whole)
                whole[last:, :, :3] = mx.array(part)
                mx.eval(whole)
            buffers.append(whole)
        exact = mx.zeros((batch, 1, 8, 1024), mx.float32)
        rows = ((BLOCK, BLOCK),) * last + ((3 * BLOCK, 3 * BLOCK),)
        views.append(KVView(c, exact, Packed(*buffers), None, 0, *rows[last], rows))
        decoded.append(reference.decode(made, c))
    assert views[0].packed.words[:last].nbytes > 2**31
    queries = rng.normal(size=(batch, 1, 1, 1024)).astype(np.float32)
    taken = noise.of_row(queries[last:], views[0], last, 0.05)
    expected = reference.attend(queries[last:], *decoded, scale=0.05, noise=taken)
    for name in available():
        monkeypatch.setenv("ROTORMLX_BACKEND", name)
        found = np.array(attend_view(mx.array(queries), *views, scale=0.05))
        # docs/FORMAT.md, section 9: float32 sums. The other rows have nothing but zeros.
        assert np.abs(found[last:] - expected).max() <= 1e-5 * np.abs(expected).max()
        assert not found[:last].any()


def repeated(chosen, x, blocks):
    """One block again and again, in the memory of one."""
    made = reference.encode(x, chosen)
    return Packed(
        *(
            a
            if a is None
            else as_strided(a, (1, 1, blocks, *a.shape[3:]), (0, 0, 0, *a.strides[3:]))
            for a in made
        )
    )


def attend_mlx(queries, exact, packed, codecs, lengths, causal=False):
    views = []
    for c, p, e in zip(codecs, packed, exact, strict=True):
        parts = []
        for a in p:
            one = None if a is None else mx.array(a[:, :, :1])
            parts.append(one if one is None else mx.broadcast_to(one, a.shape))
        views.append(KVView(c, mx.array(e), Packed(*parts), None, 0, *lengths[0]))
    backend = mlx_ops.MLXBackend()
    mask = "causal" if causal else None
    return np.array(backend.attend(AttendCall(mx.array(queries), *views, scale=1.0, mask=mask)))


@pytest.mark.parametrize(
    "attend",
    [
        pytest.param(attend_native, marks=needs_library),
        attend_mlx,
        pytest.param(attend_torch, marks=needs_library),
    ],
)
def test_more_than_2_to_24_tokens(monkeypatch, attend):
    """Counts and positions are no float32: every token counts, and each of the last is itself.

    A block of 64 tokens comes 2^18 + 9 times, so each of its tokens counts as often; five exact
    tokens stand behind, which queries see one after the other.
    """
    monkeypatch.setattr(mlx_ops, "TILE_TOKENS", 2**17)  # fewer, longer tiles
    config = RotorConfig(2, 2, sink=0)
    codecs = [codec(config, 16, layer=0, role=role) for role in ROLES]
    rng = np.random.default_rng(1)
    keys, values = (rng.normal(size=(1, 1, BLOCK, 16)) for _ in ROLES)
    blocks, last = 2**18 + 9, 5
    packed = [repeated(c, x, blocks) for c, x in zip(codecs, (keys, values), strict=True)]
    tail = [np.zeros((1, 1, last, 16), np.float32) for _ in ROLES]
    # Together as heavy as all the others: e^17 is 1.4 times 2^24.
    tail[0][..., 0] = 17
    tail[1][0, 0] = 100 * np.eye(last, 16)
    queries = np.zeros((1, 1, last, 16), np.float32)
    queries[..., 0] = 1
    lengths = [(blocks * BLOCK, blocks * BLOCK + last)]
    found = attend(queries, tail, packed, codecs, lengths, causal=True)

    rows = [
        reference.decode(Packed(*(a if a is None else a[:, :, :1] for a in p)), c)[0, 0]
        for c, p in zip(codecs, packed, strict=True)
    ]
    block = Packed(*(a if a is None else a[:, :, :1] for a in packed[0]))
    taken = reference.score_noise(queries[:, :, :1], block, codecs[0], scale=1.0)[0, 0, 0]
    weights = blocks * np.exp(rows[0][:, 0] - taken)
    heavy = np.exp(17.0)
    for i in range(last):
        total = weights.sum() + heavy * (i + 1)
        expected = (weights @ rows[1] + heavy * tail[1][0, 0, : i + 1].sum(0)) / total
        # Sums of float32 over 2^24 terms, tile by tile: 1e-4 of the largest.
        assert np.abs(found[0, 0, i] - expected).max() <= 1e-4 * np.abs(expected).max(), i


def test_strides_of_a_mask_are_64_bits(monkeypatch):
    """A mask for 2^16 queries and tokens of two rows has a stride of 2^32, which a kernel gets."""
    given = []

    class Kernel:
        def __call__(self, *, inputs, output_shapes, output_dtypes, **_):
            given.append(inputs)
            return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

    monkeypatch.setattr(cuda_text, "parts_kernel", lambda *_: Kernel())
    monkeypatch.setattr(cuda_text, "merge_kernel", lambda *_: Kernel())
    tokens = 2**16
    exact = mx.broadcast_to(mx.zeros((1, 1, 1, 1)), (2, 1, tokens, 16))
    views = [
        KVView(codec(CONFIG, 16, layer=0, role=role), exact, None, None, 0, 0, tokens)
        for role in ROLES
    ]
    mask = mx.broadcast_to(mx.zeros((1, 1, 1, 1), mx.bool_), (2, 1, tokens, tokens))
    cuda.MLXCUDABackend().attend(AttendCall(exact, *views, scale=1.0, mask=mask))
    numbers = given[0][-2]
    assert numbers.dtype == mx.int64
    assert numbers.tolist()[14:18] == [2**32, 0, 2**16, 1]
