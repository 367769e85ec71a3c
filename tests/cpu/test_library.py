"""The CPU library: every variant, any number of threads, sanitizers, and another processor."""

import itertools
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import (
    BLOCK,
    KEY,
    ROLES,
    TRELLIS_BITS,
    VALUE,
    Codec,
    Packed,
    codec,
)
from rotormlx.codec.rotation import calibrated
from rotormlx.codec.trellis import STATES
from rotormlx.config import CALIBRATED, ROTATIONS, RotorConfig
from rotormlx.kernels import cpu_library
from tests.support import noise
from tests.support.codec_cases import (
    badly_met_rows,
    check_special_block,
    special_block,
    tied_paths,
    tied_row,
)

ROOT = Path(__file__).parents[2]
needs_library = pytest.mark.skipif(
    cpu_library.missing() is not None, reason=f"no CPU library: {cpu_library.missing()}"
)
VARIANTS = () if cpu_library.missing() else cpu_library.variants()

B, K, REPEATS, SINK = 2, 3, 5, 4
H = K * REPEATS


def rows(shape, seed=0):
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=shape[-1]) * 0.5)
    x = rng.normal(size=shape) * spread + rng.normal(size=shape[-1]) * 3
    return x.astype(np.float32)


def codec_of(config, head_dim, *, layer, role):
    """As codec(), but the matrices that a calibration file would bring are random ones."""
    if config.rotation != CALIBRATED:
        return codec(config, head_dim, layer=layer, role=role)
    rng = np.random.default_rng(head_dim)
    matrix = np.eye(head_dim) + rng.normal(size=(K, head_dim, head_dim)) / head_dim
    bits = config.key_bits if role == KEY else config.value_bits
    return Codec(role, bits, calibrated(matrix))


def empty_blocks(chosen, batch, heads, count, channel_scale=None):
    front = (batch, heads, count)
    return cpu_library.Blocks(
        chosen,
        np.zeros((*front, *chosen.words_shape), np.uint32),
        np.zeros((*front, BLOCK), np.float16),
        np.zeros((*front, chosen.head_dim), np.float16) if chosen.role == KEY else None,
        channel_scale,
    )


def encoded(x, chosen, channel_scale=None, **options):
    batch, heads, tokens, _ = x.shape
    blocks = empty_blocks(chosen, batch, heads, tokens // BLOCK, channel_scale)
    cpu_library.encode(x, blocks, given_centres=False, **options)
    return blocks


@dataclass(frozen=True)
class Case:
    """One problem of attention; ``lengths`` are (packed tokens, all tokens) of the batch rows."""

    bits: tuple[int, int] = (4, 4)
    dims: tuple[int, int] = (80, 112)
    rotation: str = "cascade"
    lengths: tuple[tuple[int, int], ...] = ((307, 380), (307, 380))
    length: int = 1
    dtype: type = np.float32
    mask: str = "none"
    sink_logits: bool = False
    repeats: int = REPEATS


class Problem:
    """Arrays of a case, and the float64 vectors they stand for."""

    def __init__(self, case):
        self.case = case
        batch, heads = len(case.lengths), K * case.repeats
        capacity = max((tokens - packed for packed, tokens in case.lengths), default=0) + 3
        count = -(-max((packed for packed, _ in case.lengths), default=0) // BLOCK)
        self.exact, self.blocks, middles = [], [], []
        for role, head_dim in zip(ROLES, case.dims, strict=True):
            config = RotorConfig(case.bits[0], case.bits[1], case.rotation)
            chosen = codec_of(config, head_dim, layer=1, role=role)
            scale = None
            if config.scales_channels:
                scale = np.exp(rows((K, head_dim), 5) / 9)
            blocks = encoded(rows((batch, K, count * BLOCK, head_dim), 1), chosen, scale)
            packed = Packed(blocks.words, blocks.scales, blocks.centres)
            middles.append(reference.decode(packed, chosen, channel_scale=scale))
            self.blocks.append(blocks)
            self.exact.append(rows((batch, K, capacity, head_dim), 2).astype(case.dtype))
        self.vectors = [
            [self.sequence(middle[b], exact[b], *case.lengths[b]) for b in range(batch)]
            for middle, exact in zip(middles, self.exact, strict=True)
        ]
        self.queries = rows((batch, heads, case.length, case.dims[0]), 3).astype(case.dtype)
        self.queries = self.queries - self.queries.mean(-1, keepdims=True).astype(case.dtype)
        self.sink_logits = (
            np.linspace(-3, 6, heads).astype(np.float32) if case.sink_logits else None
        )
        if case.mask == "hidden" and case.sink_logits:
            self.sink_logits[0] = -np.inf
        self.scale = case.dims[0] ** -0.5 / 4
        longest = max((tokens for _, tokens in case.lengths), default=0)
        self.mask = self.make_mask(batch, heads, longest)

    def sequence(self, middle, exact, packed, tokens):
        sink = min(SINK, tokens - packed)
        parts = [exact[:, :sink], middle[:, :packed], exact[:, sink : tokens - packed]]
        return np.concatenate([p.astype(np.float64) for p in parts], axis=1)

    def make_mask(self, batch, heads, tokens):
        rng = np.random.default_rng(4)
        length = self.case.length
        return {
            "none": None,
            "causal": None,
            "bool": rng.random((batch, heads, length, tokens)) > 0.4,
            "heads": rng.random((heads, 1, tokens)) > 0.4,
            "hidden": np.zeros((1, tokens), np.bool_),
            "additive": rng.normal(size=(batch, 1, length, tokens)).astype(np.float32),
            "infinite": np.where(rng.random(tokens) > 0.4, 0, -np.inf).astype(np.float16),
        }[self.case.mask]

    def run(self, **options):
        """What the library makes of it, in the dtype of the case."""
        case = self.case
        output = np.zeros((*self.queries.shape[:3], case.dims[1]), case.dtype)
        packed = any(packed for packed, _ in case.lengths)
        blocks = self.blocks
        if not packed:
            blocks = [b._replace(words=None, scales=None, centres=None) for b in blocks]
        cpu_library.attend(
            self.queries,
            output,
            *map(cpu_library.Source, self.exact, blocks),
            case.lengths,
            sink=SINK,
            scale=self.scale,
            mask=self.mask,
            sink_logits=self.sink_logits,
            causal=case.mask == "causal",
            **options,
        )
        return output

    def expected(self):
        """The same in float64, a batch row at a time."""
        outputs = []
        for b, (_, tokens) in enumerate(self.case.lengths):
            mask = "causal" if self.case.mask == "causal" else self.mask
            if isinstance(mask, np.ndarray):
                shape = (*self.queries.shape[:3], mask.shape[-1])
                mask = np.broadcast_to(mask, shape)[b : b + 1, ..., :tokens]
            keys, values = (vectors[b][None] for vectors in self.vectors)
            row = self.queries[b : b + 1]
            outputs.append(
                reference.attend(
                    row,
                    keys,
                    values,
                    scale=self.scale,
                    noise=self.noise(b, row),
                    mask=mask,
                    sink_logits=self.sink_logits,
                )
            )
        return np.concatenate(outputs)

    def noise(self, b, row):
        packed_tokens, tokens = self.case.lengths[b]
        keys = self.blocks[0]
        return noise.of_sequence(
            row,
            Packed(keys.words, keys.scales, keys.centres),
            keys.codec,
            scale=self.scale,
            channel_scale=keys.channel_scale,
            sink=min(SINK, tokens - packed_tokens),
            packed_tokens=packed_tokens,
            tokens=tokens,
            row=b,
        )


# Sums are in float32; the result is rounded once to the dtype.
BOUNDS = {np.float32: 2e-6, np.float16: 2**-10}


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", [*ROTATIONS, CALIBRATED])
@pytest.mark.parametrize("head_dim", [8, 16, 72, 112, 128])
def test_variants_write_the_same_bytes(head_dim, name, role, bits):
    """On any numbers, and with any number of threads."""
    chosen = codec_of(RotorConfig(bits, bits, name), head_dim, layer=2, role=role)
    x = rows((B, K, 2 * BLOCK, head_dim))
    x[0, 1, 70:73, 3] = np.nan, np.inf, 1e30
    x[1, 0, :BLOCK] = 0
    scale = np.exp(rows((K, head_dim), 5) / 9)
    first = encoded(x, chosen, scale, variant=0, threads=1)
    expected = reference.encode(x, chosen, channel_scale=scale)
    codes, wanted = (reference.unpack(p.words, chosen) for p in (first, expected))
    # Float32 errors of 1e-6 against a density of boundaries of at most 128 / 4 a unit.
    assert (codes != wanted).mean() < 2e-4
    for variant, threads in itertools.product(range(len(VARIANTS)), (1, 3)):
        other = encoded(x, chosen, scale, variant=variant, threads=threads)
        for name_ in ("words", "scales", "centres"):
            a, b = getattr(first, name_), getattr(other, name_)
            assert a is b is None or np.array_equal(a.view(np.uint8), b.view(np.uint8)), name_


@needs_library
@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("bits", codebook.BITS)
def test_special_rows(bits, variant):
    """Rows that are zero, subnormal, not finite, or at either end of float16."""
    chosen = codec(RotorConfig(bits, bits, "identity"), 16, layer=0, role=VALUE)
    check_special_block(encoded(special_block(chosen), chosen, variant=variant), chosen)


@needs_library
@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("bits", codebook.BITS)
def test_badly_met_rows(bits, variant):
    """Their scale is twice their size at most."""
    chosen = codec(RotorConfig(bits, bits, "identity"), 80, layer=0, role=VALUE)
    found, expected = (
        encoded(badly_met_rows(), chosen, variant=variant),
        reference.encode(badly_met_rows(), chosen),
    )
    assert np.array_equal(found.scales, expected.scales)


@needs_library
@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
def test_centre_counts_finite_rows(variant):
    """A row that is not finite counts as nothing, and the mean of a huge block is clipped."""
    chosen = codec(RotorConfig(), 72, layer=0, role=KEY)
    x = rows((1, 3, BLOCK, 72))
    x[0, 0, 7, 71] = np.nan
    x[0, 0, 8, 0] = np.inf
    x[0, 1] = 3e38 * np.sign(x[0, 1, :1])
    x[0, 2] = np.nan
    found = encoded(x, chosen, variant=variant).centres[0, :, 0]
    expected = reference.block_means(x[0].astype(np.float64))
    # One unit in the last place: a mean may lie next to a tie.
    assert np.allclose(found, expected, rtol=2**-10, atol=0)


@needs_library
@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_ties_go_to_the_larger_magnitude(bits, variant):
    chosen = codec(RotorConfig(bits, bits, "identity"), 16, layer=0, role=VALUE)
    count = min(len(codebook.boundaries(bits)), 30)
    x = np.zeros((1, 1, BLOCK, 16), np.float32)
    x[0, 0, :count] = [tied_row(bits, i) for i in range(count)]
    x[0, 0, 32 : 32 + count] = -x[0, 0, :count]
    codes = reference.unpack(encoded(x, chosen, variant=variant).words, chosen)[0, 0, 0]
    larger = np.arange(1, count + 1)
    assert np.array_equal(codes[:count, 0], larger)
    assert np.array_equal(codes[32 : 32 + count, 0], larger | 1 << (bits - 1))
    assert not codes[:, 3:].any()  # either zero


@needs_library
@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", [2, 3])
def test_equal_paths(bits, role, variant):
    """Where every sum is exact and many are equal, the path is that of the reference."""
    chosen, x = codec(RotorConfig(bits, bits, "identity"), 16, layer=0, role=role), tied_paths(bits)
    found = encoded(x, chosen, variant=variant)
    expected = reference.encode(x, chosen, centres=found.centres)
    assert np.array_equal(found.words, expected.words)


@needs_library
@pytest.mark.parametrize("bits", codebook.BITS)
def test_bytes_are_those_of_the_mlx_operations(bits):
    """Bit for bit, also beside a boundary: the same operations in the same order."""
    mx = pytest.importorskip("mlx.core")
    from rotormlx.mlx.backends.mlx_ops import MLXBackend

    for role, name, head_dim in itertools.product(ROLES, ("cascade", "rotor3"), (80, 128)):
        chosen = codec(RotorConfig(bits, bits, name), head_dim, layer=0, role=role)
        x = rows((1, K, 20 * BLOCK, head_dim))
        found = encoded(x, chosen)
        expected = MLXBackend().encode(mx.array(x), chosen)
        assert np.array_equal(found.words, np.array(expected.words))
        assert np.array_equal(found.scales, np.array(expected.scales))


@needs_library
@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["cascade", "rotor3", "hadamard", "dense", "identity", CALIBRATED])
def test_decode_is_the_reference(name, role, bits, variant):
    chosen = codec_of(RotorConfig(bits, bits, name), 72, layer=0, role=role)
    rng = np.random.default_rng(0)
    blocks = empty_blocks(chosen, B, K, 2, np.exp(rows((K, 72), 5) / 9))
    blocks.words[:] = rng.integers(0, 2**32, blocks.words.shape, np.uint32)
    blocks.scales[:] = rng.normal(size=blocks.scales.shape)
    if role == KEY:
        blocks.centres[:] = rng.normal(size=blocks.centres.shape)
    packed = Packed(blocks.words, blocks.scales, blocks.centres)
    expected = reference.decode(packed, chosen, channel_scale=blocks.channel_scale)
    found = np.zeros(expected.shape, np.float32)
    cpu_library.decode(blocks, found, variant=variant)
    # Sums of 72 products in float32.
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


# ---- attention ----------------------------------------------------------------------------------

DIMS = [(16, 16), (64, 64), (128, 128), (192, 128), (256, 96), (1024, 56)]
MASKS = ("causal", "bool", "heads", "additive", "infinite")
CASES = [
    *(Case(bits, (24, 72)) for bits in itertools.product(codebook.BITS, codebook.BITS)),
    *(Case(dims=dims, length=2) for dims in DIMS),
    *(Case((3, 2), rotation=name, length=3, mask="causal") for name in (*ROTATIONS, CALIBRATED)),
    *(Case(mask=mask, length=length) for mask in MASKS for length in (1, 7)),
    *(Case(sink_logits=True, mask=m, length=2) for m in ("none", "causal", "hidden")),
    *(Case(repeats=n) for n in (1, 2, 3, 4, 6, 7, 8, 9, 17)),
    Case(mask="causal", length=150, lengths=((1024, 1300), (1024, 1300))),
    # Queries whose own tokens are packed already: they see of the exact ones the sink alone.
    Case(mask="causal", length=40, lengths=((256, 275), (256, 262))),
    Case(lengths=((0, 3), (0, 3))),
    Case(lengths=((0, 90), (0, 90)), mask="causal", length=5),
    # Rows of a batch: nothing packed, a begun block, fewer tokens than the sink.
    Case(lengths=((320, 400), (0, 37), (77, 150), (0, 2)), mask="causal", length=2),
    Case(lengths=((320, 400), (0, 337), (77, 150), (0, 2)), mask="bool"),
    Case(dtype=np.float16, mask="causal", length=4),
]


def case_id(case):
    bits, dims = ("x".join(map(str, pair)) for pair in (case.bits, case.dims))
    return f"d{dims}-b{bits}-{case.rotation}-{case.mask}-{case.length}x{case.repeats}"


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_attend_is_the_reference(case):
    problem = Problem(case)
    expected = problem.expected()
    size = np.abs(expected).max()
    outputs = [problem.run(variant=v, threads=1) for v in range(len(VARIANTS))]
    for output in outputs:
        error = np.abs(output.astype(np.float64) - expected).max()
        assert error <= BOUNDS[case.dtype] * size
    # Variants differ in fused multiply-adds and in the order of sums over channels.
    if case.dtype == np.float32:
        assert all(np.abs(output - outputs[0]).max() <= 1e-6 * size for output in outputs)
    # Parts are cut and merged in an order that knows no threads.
    for threads in (2, 5):
        assert np.array_equal(problem.run(threads=threads), outputs[0])


@needs_library
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_what_is_not_seen_does_not_come_through(mask):
    """Scales behind the last token, or of hidden tokens, may be anything."""
    problem = Problem(Case(mask=mask))
    clean = problem.run()
    for blocks in problem.blocks:
        blocks.scales[:, :, 307 // BLOCK, 307 % BLOCK :] = np.nan
        blocks.words[:, :, 307 // BLOCK] |= np.uint32(
            ~blocks.codec.kept_bits(307 % BLOCK) & 0xFFFFFFFF
        )
    if mask == "bool":
        hidden = SINK + np.arange(BLOCK) == SINK + 9
        problem.mask[..., SINK + 9] = False
        clean = problem.run()
        for blocks in problem.blocks:
            blocks.scales[:, :, 0][..., hidden] = np.nan
    assert np.array_equal(problem.run(), clean)
    for blocks in problem.blocks:
        blocks.scales[:, :, 0, 20] = np.nan
    if mask == "none":
        assert np.isnan(problem.run()).all()


@needs_library
def test_arrays_are_read_where_they_lie():
    """Transposed queries, buffers with room behind and between, masks with steps."""
    problem = Problem(Case(mask="bool", length=3, sink_logits=True))
    expected = problem.run()
    problem.queries = np.ascontiguousarray(problem.queries.swapaxes(1, 2)).swapaxes(1, 2)
    problem.mask = np.repeat(problem.mask, 2, axis=-1)[..., ::2]
    problem.exact = [
        np.repeat(np.pad(x, [(0, 0)] * 3 + [(0, 5)]), 2, axis=1)[:, ::2, :, :-5]
        for x in problem.exact
    ]
    problem.blocks = [
        blocks._replace(
            words=np.pad(blocks.words, [(0, 0), (0, 0), (0, 3), (0, 0), (0, 0)])[:, :, :-3],
            scales=np.repeat(blocks.scales, 2, axis=-1)[..., ::2],
            centres=None if blocks.centres is None else np.repeat(blocks.centres, 3, -1)[..., ::3],
        )
        for blocks in problem.blocks
    ]
    assert np.array_equal(problem.run(), expected)


@needs_library
def test_refuses_what_it_cannot_read():
    problem = Problem(Case())
    problem.queries = problem.queries.astype(np.float64)
    with pytest.raises(RuntimeError, match="must be float16, bfloat16 or float32"):
        problem.run()
    problem = Problem(Case())
    problem.blocks = [b._replace(words=b.words[..., ::2]) for b in problem.blocks]
    with pytest.raises(RuntimeError, match="side by side"):
        problem.run()
    with pytest.raises(RuntimeError, match="no such variant"):
        Problem(Case()).run(variant=9)


@needs_library
def test_threads_survive_a_fork():
    """A forked process has none of its parent's threads, and starts its own."""
    code = (
        "import os, sys; from tests.cpu import test_library as t\n"
        "p = t.Problem(t.Case()); a = p.run(threads=3); pid = os.fork()\n"
        "same = (p.run(threads=3) == a).all()\n"
        "if pid == 0: os._exit(0 if same else 3)\n"
        "sys.exit(os.waitpid(pid, 0)[1] or not same)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0


def test_thread_count_follows_the_environment(monkeypatch):
    counted = cpu_library.thread_count.__wrapped__
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert counted() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    monkeypatch.setattr(cpu_library.os, "sched_getaffinity", lambda _: {4, 5}, raising=False)
    assert counted() == 2


def test_a_library_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_library, "_load", cpu_library._load.__wrapped__)
    for path, message in (
        (tmp_path / "none.so", "was not built"),
        (Path(__file__), "cannot be loaded"),
    ):
        monkeypatch.setattr(cpu_library, "PATH", path)
        assert message in cpu_library.missing()
        with pytest.raises(RuntimeError, match=message):
            cpu_library.variants()


# ---- without Python: sanitizers, another processor ----------------------------------------------


class Writer:
    """Writes calls for cpu_driver.cpp by standing in for the library."""

    def __init__(self):
        self.text, self.arrays, self.rotations = bytearray(), [], {}

    def numbers(self, *values):
        self.text += struct.pack(f"<{len(values)}q", *values)

    def array(self, a):
        if a is None:
            return -1
        kind = {"f": 2, "u": 1, "b": 6}[a.dtype.kind]
        self.numbers(ord("A"), kind, 8 * a.itemsize, a.ndim, *a.shape)
        self.text += np.ascontiguousarray(a).tobytes()
        self.arrays.append(a)
        return len(self.arrays) - 1

    def rotation(self, r):
        if r not in self.rotations:
            self.numbers(ord("R"), r.head_dim, len(r.stages))
            for s in r.stages:
                self.numbers(s.start, s.radix, s.stride, s.outer)
                self.text += s.blocks.astype(np.float32).tobytes()
            matrices = (r.matrix, np.swapaxes(r.inverse, -1, -2))
            dense = not r.stages and r.name != "identity"
            self.numbers(r.matrix.size // r.head_dim**2 if dense else 0)
            for matrix in matrices if dense else ():
                self.text += matrix.astype(np.float32).tobytes()
            self.rotations[r] = len(self.rotations)
        return self.rotations[r]

    def coding(self, b):
        return self.rotation(b.codec.rotation), b.codec.bits, b.codec.role == KEY

    def codec_call(self, letter, x, blocks, given_centres, state=None, start=0):
        places = [*map(self.array, (x, *blocks[1:])), *self.coding(blocks), self.array(state)]
        self.numbers(ord(letter), *places, start, given_centres, 4)

    def attend(
        self, queries, output, keys, values, lengths, *, sink, scale, mask, sink_logits, causal
    ):
        places = [*map(self.array, (queries, output, mask, sink_logits))]
        for exact, blocks in (keys, values):
            places += [*map(self.array, (exact, *blocks[1:])), *self.coding(blocks)]
        counts = [n for pair in lengths for n in pair]
        (bits,) = struct.unpack("<q", struct.pack("<d", scale))
        self.numbers(ord("T"), *places, sink, causal, bits, 4, len(counts), *counts)


@pytest.fixture(scope="module")
def calls():
    """Calls of every kind as text for the driver, and what Python gets of them."""
    if cpu_library.missing() is not None:
        pytest.skip(f"no CPU library: {cpu_library.missing()}")
    writer, results = Writer(), {}
    for (role, bits), name in zip(
        itertools.product(ROLES, codebook.BITS), [*ROTATIONS, "cascade"], strict=True
    ):
        chosen = codec(RotorConfig(bits, bits, name), 24, layer=0, role=role)
        scale = np.exp(rows((K, 24), 5) / 9)
        x = rows((B, K, 2 * BLOCK, 24))
        found, empty = encoded(x, chosen, scale), empty_blocks(chosen, B, K, 2, scale)
        writer.codec_call("E", x, empty, False)
        for part in ("words", "scales"):
            place = next(i for i, a in enumerate(writer.arrays) if a is getattr(empty, part))
            results[place] = getattr(found, part)
        decoded = np.zeros(x.shape, np.float16)
        writer.codec_call("D", decoded, found, True)
        cpu_library.decode(found, after := decoded.copy())
        results[next(i for i, a in enumerate(writer.arrays) if a is decoded)] = after
        for letter in "ED":
            nothing = empty_blocks(chosen, B, K, 0, scale)
            writer.codec_call(letter, np.zeros((B, K, 0, 24), np.float32), nothing, letter == "D")
    for bits in TRELLIS_BITS:
        chosen = codec(RotorConfig(bits, bits), 24, layer=0, role=VALUE)
        x, state = rows((B, K, BLOCK, 24)), rows((B, K, 1, 24), 7).view(np.uint32) % STATES
        blocks = [empty_blocks(chosen, B, K, 1, None) for _ in range(2)]
        cpu_library.encode(x, blocks[0], given_centres=False, start=37, state=state)
        writer.codec_call("E", x, blocks[1], False, state, 37)
        place = next(i for i, a in enumerate(writer.arrays) if a is blocks[1].words)
        results[place] = blocks[0].words
    attended = [
        *(Case((bits, bits), (24, 40), length=2, repeats=3) for bits in codebook.BITS),
        Case((3, 4), (40, 24), "dense", mask="bool", sink_logits=True),
        Case((4, 4), (24, 24), CALIBRATED),
        Case((2, 3), (24, 24), lengths=((320, 400), (0, 37), (77, 150), (0, 2)), mask="causal"),
        Case((2, 2), (24, 24), lengths=((0, 90),), length=70, mask="additive", dtype=np.float16),
        # Nothing to do, nothing there, nothing seen.
        Case((4, 4), (24, 24), lengths=(), mask="causal"),
        Case((4, 4), (24, 24), length=0),
        Case((4, 4), (24, 24), lengths=((0, 0), (0, 0)), length=2, sink_logits=True),
        Case((4, 4), (24, 24), lengths=((70, 80), (0, 0)), length=3, mask="bool"),
        Case((4, 4), (24, 24), lengths=((70, 80),), length=2, mask="hidden", sink_logits=True),
    ]
    for case in attended:
        problem = Problem(case)
        expected = problem.run()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_library, "attend", writer.attend)
            patch.setattr(cpu_library, "Source", lambda *source: source)
            output = problem.run()
        results[next(i for i, a in enumerate(writer.arrays) if a is output)] = expected
    return bytes(writer.text), writer.arrays, results


def drive(calls, folder, *, compiler="c++", flags=(), machine="none", runner=()):
    """Compile library and driver, run the calls, and compare every result."""
    sys.path.insert(0, str(ROOT / "cpu_kernels"))
    try:
        import build
    finally:
        sys.path.pop(0)
    text, arrays, results = calls
    library = build.build(folder / "library.so", compiler=compiler, flags=flags, machine=machine)
    command = [compiler, "-std=c++17", *flags, str(ROOT / "tests/cpu/cpu_driver.cpp"), str(library)]
    driver, problem, result = (str(folder / name) for name in ("driver", "problem", "result"))
    subprocess.run([*command, "-pthread", f"-Wl,-rpath,{folder}", "-o", driver], check=True)
    Path(problem).write_bytes(text)
    done = subprocess.run(
        [*runner, driver, problem, result], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, start = Path(result).read_bytes(), 0
    for place, array in enumerate(arrays):
        part = np.frombuffer(found, array.dtype, array.size, start).reshape(array.shape)
        start += array.nbytes
        if place not in results:
            continue
        expected = results[place]
        if array.dtype == np.uint32 or expected.shape[-1] == BLOCK:  # words, scales
            assert np.array_equal(part, expected)
        else:
            # Other orders of float32 sums; float16 rounds the result once.
            bound = 2**-10 if array.dtype == np.float16 else 2e-6
            error = np.abs(part.astype(np.float64) - expected).max(initial=0)
            assert error <= bound * np.abs(expected.astype(np.float64)).max(initial=0)


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler (c++)")
# Vectors of 16 lanes, some of which are always left over, and few kinds of tiles: it compiles fast.
SMALL = ("-O1", "-DLANES=16", "-DMAX_ROWS=2")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(calls, tmp_path, sanitizers):
    flags = ("-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", *SMALL)
    drive(calls, tmp_path, flags=flags)


@pytest.mark.slow
@needs_compiler
def test_single_lanes_give_the_same(calls, tmp_path):
    """The same text without any vectors, and with every warning."""
    warnings = ("-Wall", "-Wextra", "-Werror")
    drive(calls, tmp_path, flags=("-O1", "-DLANES=1", *warnings))


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64-static")),
    reason="no aarch64-linux-gnu-g++ or no qemu-aarch64-static",
)
def test_neon_gives_the_same(calls, tmp_path):
    drive(
        calls,
        tmp_path,
        compiler="aarch64-linux-gnu-g++",
        flags=("-O1", "-DMAX_ROWS=2"),
        machine="aarch64",
        runner=("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"),
    )
