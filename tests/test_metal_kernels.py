"""The kernels encode, decode and rotor3: on the device where there is Metal, else emulated."""

import contextlib
import itertools
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import emulator
import mlx.core as mx
import numpy as np
import pytest
from test_vectors import CASES, channel_scale, codec_of, load, packed_of

from rotormlx import backends, codebook, reference
from rotormlx.backends import kernel_source, metal
from rotormlx.config import ROTATIONS, RotorConfig
from rotormlx.format import BLOCK, KEY, ROLES, VALUE, Packed, codec
from rotormlx.rotation import rotation

B, K, N = 2, 3, 2
DTYPES = {"f16": mx.float16, "bf16": mx.bfloat16, "f32": mx.float32}
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
MLX_METAL_KERNEL = mx.fast.metal_kernel
ON_DEVICE = mx.metal.is_available()
emulated = pytest.mark.skipif(ON_DEVICE, reason="about the emulator, which runs where no Metal is")
METAL = metal.MetalBackend()


@contextlib.contextmanager
def kernels_made_by(make):
    """Kernel objects of the backend come from ``make``, a stand-in for ``mx.fast.metal_kernel``."""
    caches = (metal._codec_kernel, metal._rotor3_kernel, metal._metal_kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", make)
        for cached in caches:
            cached.cache_clear()
        yield
        for cached in caches:
            cached.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def _device():
    with kernels_made_by(MLX_METAL_KERNEL if ON_DEVICE else emulator.metal_kernel):
        yield


# ---- reference ----------------------------------------------------------------------------------


def rows(shape, seed=0):
    """Normal numbers with unequal channels and an offset, what keys look like."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=shape[-1]) * 0.5)
    x = rng.normal(size=shape) * spread + rng.normal(size=shape[-1]) * 30
    return x.astype(np.float32)


def float64(a):
    return np.array(a.astype(mx.float32)).astype(np.float64)


def as_numpy(packed):
    return Packed(*(None if a is None else np.array(a) for a in packed))


def to_mlx(a):
    return None if a is None else mx.array(a)


def made_codec(name, head_dim, bits, role):
    return codec(RotorConfig(bits, bits, name, seed=7), head_dim, layer=3, role=role)


def scale_of_channels(chosen, heads):
    rng = np.random.default_rng(5)
    return np.exp(rng.normal(size=(heads, chosen.head_dim))).astype(np.float32)


def with_gaps(a):
    """The same array as a part of a larger one whose other numbers must not be read."""
    wide = np.full([n + 1 for n in a.shape], np.nan if a.dtype.kind == "f" else 2**32 - 1, a.dtype)
    wide[tuple(slice(n) for n in a.shape)] = a
    return mx.array(wide)[tuple(slice(n) for n in a.shape)]


def compare(found, expected, chosen):
    """Packed rows are the reference's, but for codes within float32 errors of a boundary."""
    codes, wanted = (reference.unpack(p.words, chosen) for p in (found, expected))
    # 2 errors of 1e-6 against a density of boundaries of at most 128 / 4 a unit: 1e-4 of all.
    assert (codes != wanted).sum() <= max(1, 1e-4 * codes.size)
    # All words, bits behind the last position among them, hold nothing but these codes.
    assert np.array_equal(reference.pack(codes, chosen), found.words)
    same = (codes == wanted).all(-1)
    # One unit in the last place of float16, where the codes are the same.
    assert np.allclose(
        found.scales[same], expected.scales[same], rtol=2**-10, atol=0, equal_nan=True
    )
    assert chosen.role == VALUE or np.array_equal(found.centres, expected.centres)


def check_encode(x, chosen, *, scale=None, centres=None):
    """Encode x, an MLX array, and compare; returns the reference's packed rows."""
    scale_, centres_ = (None if a is None else with_gaps(a) for a in (scale, centres))
    found = as_numpy(METAL.encode(x, chosen, channel_scale=scale_, centres=centres_))
    if chosen.role == KEY and centres is None:
        centres = found.centres
        means = reference.block_means(float64(x).reshape(*x.shape[:2], -1, BLOCK, x.shape[-1]))
        # One unit in the last place: a mean may lie next to a tie.
        assert np.allclose(centres, means, rtol=2**-10, atol=0)
    expected = reference.encode(float64(x), chosen, channel_scale=scale, centres=centres)
    compare(found, expected, chosen)
    return expected


def check_decode(packed, chosen, *, scale=None, dtype="f32"):
    """Decode packed numpy arrays, read from among others, and compare."""
    given = Packed(*(None if a is None else with_gaps(a) for a in packed))
    scale_ = None if scale is None else with_gaps(scale)
    found = METAL.decode(given, chosen, channel_scale=scale_, dtype=DTYPES[dtype])
    expected = reference.decode(packed, chosen, channel_scale=scale)
    assert found.dtype == DTYPES[dtype]
    # 1e-5 for sums in float32, the bound of docs/FORMAT.md; then one rounding to the dtype.
    error = {"f32": 1e-5, "f16": 2**-10, "bf16": 2**-7}[dtype]
    assert np.array_equal(np.isnan(float64(found)), np.isnan(expected))
    assert np.nanmax(np.abs(float64(found) - expected)) <= error * np.nanmax(np.abs(expected))


# ---- shared vectors -----------------------------------------------------------------------------


@pytest.fixture(params=CASES, ids=lambda case: case.file_name.split(".")[0], scope="module")
def vectors(request):
    return load(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
def test_encode_reproduces_every_bit(vectors, role, bits, dtype):
    arrays, facts = vectors
    x = mx.array(arrays[f"{role}.input"]).astype(DTYPES[dtype])
    scale = channel_scale(arrays, role)
    packed = METAL.encode(x, codec_of(facts, bits, role), channel_scale=scale)
    assert np.array_equal(np.array(packed.words), arrays[f"{role}.words.{bits}"])
    assert np.array_equal(np.array(packed.scales), arrays[f"{role}.scales.{bits}"])
    if role == KEY:
        assert np.array_equal(np.array(packed.centres), arrays["key.centres"])


@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
def test_decode_reproduces_the_vectors(vectors, role, bits):
    arrays, facts = vectors
    expected = arrays[f"{role}.decoded.{bits}"]
    packed, scale = packed_of(arrays, role, bits), channel_scale(arrays, role)
    decoded = np.array(METAL.decode(packed, codec_of(facts, bits, role), channel_scale=scale))
    decoded = decoded[:, :, : expected.shape[2]]
    # The bound of docs/FORMAT.md, section 9.
    assert np.abs(decoded - expected).max() <= 1e-5 * np.abs(expected).max()


# ---- every rotation, head_dim, width and dtype --------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("head_dim", [192, 256])
def test_encode_where_no_vectors_are(head_dim, role, bits, dtype):
    """The shared vectors have the smaller head_dims in every combination."""
    chosen = made_codec("cascade", head_dim, bits, role)
    check_encode(mx.array(rows((1, 1, BLOCK, head_dim))).astype(DTYPES[dtype]), chosen)


# Each rotation meets each head_dim; bits, roles and dtypes take turns, so that every pair occurs.
_TURNS = itertools.cycle(itertools.product(codebook.BITS, ROLES, DTYPES))
COMBINATIONS = [
    pytest.param(name, d, *(turn := next(_TURNS)), id=f"{name}-d{d}-b{turn[0]}-{turn[1]}-{turn[2]}")
    for name in ROTATIONS
    for d in HEAD_DIMS
]


@pytest.mark.parametrize(("name", "head_dim", "bits", "role", "dtype"), COMBINATIONS)
def test_encode_and_decode_are_the_reference(name, head_dim, bits, role, dtype):
    """Rows come as models give them, transposed; packed arrays go back among others."""
    chosen = made_codec(name, head_dim, bits, role)
    x = mx.array(rows((B, N * BLOCK, K, head_dim))).astype(DTYPES[dtype]).transpose(0, 2, 1, 3)
    scale = scale_of_channels(chosen, K) if head_dim != 128 else None
    expected = check_encode(x, chosen, scale=scale)
    check_decode(expected, chosen, scale=scale, dtype=dtype)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("head_dim", [16, 40, 336, 360])
def test_head_dims_at_the_limits(head_dim, role):
    """16 is the least; at 336 threadgroup memory is full; 360 takes the inherited path."""
    chosen = made_codec("cascade", head_dim, 3, role)
    assert (metal.encode_bytes(head_dim) > metal.THREADGROUP_BYTES) == (head_dim == 360)
    expected = check_encode(mx.array(rows((1, 1, BLOCK, head_dim))), chosen)
    check_decode(expected, chosen)


@pytest.mark.parametrize("head_dim", [64, 80, 256, 336])
@emulated
def test_threadgroup_memory_is_what_the_launch_expects(head_dim):
    made = []

    def recorded(*arguments, **more):
        made.append(emulator.metal_kernel(*arguments, **more))
        return made[-1]

    with kernels_made_by(recorded):
        METAL.encode(mx.zeros((1, 1, BLOCK, head_dim)), made_codec("cascade", head_dim, 3, KEY))
    assert made[0].report.threadgroup_bytes == metal.encode_bytes(head_dim)


def test_decode_of_the_largest_head_dim_fits():
    chosen = made_codec("cascade", 1024, 2, KEY)
    packed = reference.encode(rows((1, 1, BLOCK, 1024)), chosen)
    check_decode(packed, chosen)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("name", "head_dim"), [("cascade", 64), ("cascade", 112), ("dense", 96)])
@pytest.mark.parametrize("order", [0, 1, 12345])
@emulated
def test_execution_order_does_not_matter(order, name, head_dim, role):
    """Threads ascending, descending and at random: always the same bytes."""
    chosen = made_codec(name, head_dim, 3, role)
    x = mx.array(rows((1, 2, BLOCK, head_dim)))
    flat = x.reshape(-1, head_dim)
    plain = METAL.encode(x, chosen)
    decoded = np.array(METAL.decode(plain, chosen))
    rotor3 = np.array(metal.rotor3_quantize_dequantize(flat, 3))
    with emulator.execution_order(order):
        for a, b in zip(METAL.encode(x, chosen), plain, strict=True):
            assert b is None or np.array_equal(np.array(a), np.array(b))
        assert np.array_equal(np.array(METAL.decode(plain, chosen)), decoded)
        assert np.array_equal(np.array(metal.rotor3_quantize_dequantize(flat, 3)), rotor3)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("name", "head_dim"), [("cascade", 64), ("dense", 80), ("rotor3", 96)])
def test_blocks_do_not_depend_on_their_company(name, head_dim, role):
    chosen = made_codec(name, head_dim, 4, role)
    x = mx.array(rows((B, K, 3 * BLOCK, head_dim)))
    together = as_numpy(METAL.encode(x, chosen))
    for b, k, n in ((0, 0, 0), (1, 2, 1), (0, 1, 2)):
        alone = METAL.encode(x[b : b + 1, k : k + 1, n * BLOCK : (n + 1) * BLOCK], chosen)
        for part, whole in zip(as_numpy(alone), together, strict=True):
            assert part is None or np.array_equal(part[0, 0, 0], whole[b, k, n])


@pytest.mark.parametrize("bits", codebook.BITS)
def test_a_block_is_filled_up_with_the_centre_it_has(bits):
    """The rows that are there come as zeros; centres are a part of a longer array."""
    chosen = made_codec("cascade", 80, bits, KEY)
    x = rows((B, K, BLOCK, 80))
    x[:, :, :37] = 0
    centres = rows((B, K, 1, 80), seed=3).astype(np.float16)
    scale = scale_of_channels(chosen, K)
    check_encode(mx.array(x), chosen, scale=scale, centres=centres)


# ---- special rows -------------------------------------------------------------------------------


def special_rows(bits):
    """Rows of 16 channels, with the scale that each must get: a number, or None to compute it."""
    level = codebook.levels(bits)
    one = level[reference.nearest(np.ones(1), bits)][0]
    tiny = np.float32(1e-40)
    return {
        "zero": (np.zeros(16), 0.0),
        "subnormal": (np.full(16, tiny), 0.0),
        "below float16": (np.full(16, one * 2.0**-26), 0.0),
        "least of float16": (np.full(16, one * 2.0**-24), 2.0**-24),
        "largest of float16": (np.full(16, one * 65510), 65504.0),
        "above float16": (np.full(16, one * 65530), np.nan),
        "huge": (np.full(16, 1e30), np.nan),
        "huge that cancels": (np.array([1e30, -1e30] * 8), np.nan),
        "nan": (np.array([np.nan] + [1.0] * 15), np.nan),
        "inf": (np.array([1.0] * 15 + [np.inf]), np.nan),
        "both infinities": (np.array([np.inf] + [-np.inf] * 15), np.nan),
        "one": (np.ones(16), 1 / one),
    }


def check_special_rows(bits, role, name="identity"):
    special = special_rows(bits)
    chosen = made_codec(name, 16, bits, role)
    x = rows((1, 1, BLOCK, 16))
    for i, (row, _) in enumerate(special.values()):
        x[0, 0, 5 * i] = row
    centres = np.zeros((1, 1, 1, 16), np.float16) if role == KEY else None
    found = as_numpy(METAL.encode(mx.array(x), chosen, centres=to_mlx(centres)))
    codes = reference.unpack(found.words, chosen)[0, 0, 0]
    for i, (kind, (_, scale)) in enumerate(special.items()):
        stored = found.scales[0, 0, 0, 5 * i]
        assert np.array_equal(stored, np.float16(scale), equal_nan=True), kind
        # Rows whose codes count are constant and positive.
        code = reference.nearest(np.ones(1), bits) if np.isfinite(scale) and scale > 0 else 0
        assert (codes[5 * i] == code).all(), kind
    others = [t for t in range(BLOCK) if t % 5 or t // 5 >= len(special)]
    with np.errstate(invalid="ignore"):
        expected = reference.encode(x, chosen, centres=centres)
    assert np.array_equal(found.scales[0, 0, 0, others], expected.scales[0, 0, 0, others])
    check_decode(found, chosen)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", codebook.BITS)
def test_special_rows(bits, role):
    check_special_rows(bits, role)


def check_centre_of_finite_rows():
    """A row that is not finite counts as nothing, and the mean of a huge block is clipped."""
    chosen = made_codec("cascade", 80, 4, KEY)
    x = rows((1, 3, BLOCK, 80))
    x[0, 0, 7, 79] = np.nan
    x[0, 0, 8, 0] = np.inf
    x[0, 1] = 3e38 * np.sign(x[0, 1, :1])
    x[0, 2] = np.nan
    with np.errstate(all="ignore"):
        check_encode(mx.array(x), chosen)


def test_centre_counts_finite_rows():
    check_centre_of_finite_rows()


def tied_row(bits, index):
    """A row of 16 whose norm is exactly 4 in float32 and whose first number is a boundary."""
    one = np.float32(1)
    tie = codebook.boundaries(bits)[index]
    for second in np.arange(0, 0.1, 1e-4, dtype=np.float32):
        third = np.sqrt(16 - tie * tie - second * second)
        # The order of the sum over lanes: 0 and 2 first, then 1.
        if (tie * tie + third * third) + second * second == 16 * one:
            return np.array([tie, second, third] + [0] * 13, np.float32)
    raise AssertionError("no such row")


def check_ties(bits):
    """A tie goes to the larger magnitude, of either sign; either zero has code 0."""
    chosen = made_codec("identity", 16, bits, VALUE)
    x = np.zeros((1, 1, BLOCK, 16), np.float32)
    count = min(len(codebook.boundaries(bits)), 20)
    for i in range(count):
        x[0, 0, 2 * i] = tied_row(bits, i)
        x[0, 0, 2 * i + 1] = -x[0, 0, 2 * i]
    codes = reference.unpack(METAL.encode(mx.array(x), chosen).words, chosen)[0, 0, 0]
    sign = 1 << (bits - 1)
    for i in range(count):
        assert codes[2 * i, 0] == i + 1
        assert codes[2 * i + 1, 0] == sign + i + 1
        assert not codes[2 * i : 2 * i + 2, 3:].any()


@pytest.mark.parametrize("bits", codebook.BITS)
def test_ties_and_zeros(bits):
    check_ties(bits)


# ---- the published method -----------------------------------------------------------------------


def check_rotor3(head_dim, bits, dtype):
    chosen = codec(RotorConfig(bits, bits, "rotor3", seed=2), head_dim, layer=5, role=VALUE)
    count = 11  # no multiple of the rows of a threadgroup
    x = rows((count, head_dim))
    x[3] = 0
    x[4, 1] = np.nan
    x[5] *= 1e20
    x = with_gaps(x).astype(DTYPES[dtype])
    found = metal.rotor3_quantize_dequantize(x, bits, seed=2, layer=5)
    block = np.zeros((1, 1, BLOCK, head_dim))
    block[0, 0, :count] = float64(x)
    with np.errstate(invalid="ignore"):
        expected = reference.decode(reference.encode(block, chosen), chosen)[0, 0, :count]
    assert found.dtype == DTYPES[dtype]
    error = {"f32": 2e-6, "f16": 2**-10, "bf16": 2**-7}[dtype]
    assert np.array_equal(np.isnan(float64(found)), np.isnan(expected))
    assert np.nanmax(np.abs(float64(found) - expected)) <= error * np.nanmax(np.abs(expected))


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "f32"), (80, "f16"), (96, "bf16"), (128, "f32"), (128, "f16"), (128, "bf16")],
)
@pytest.mark.parametrize("bits", codebook.BITS)
def test_rotor3_is_the_reference(bits, head_dim, dtype):
    """Head_dims that leave a channel, a pair and nothing behind the threes."""
    check_rotor3(head_dim, bits, dtype)


@pytest.mark.parametrize(
    ("x", "bits", "message"),
    [
        (mx.zeros((2, 3, 64)), 4, r"shape \[n, D\]"),
        (mx.zeros((2, 64), mx.int32), 4, "float16, bfloat16 or float32"),
        (mx.zeros((2, 64)), 5, r"one of \(2, 3, 4, 8\), but 5"),
        (mx.zeros((2, 60)), 4, "multiple of 8"),
    ],
    ids=["ndim", "dtype", "bits", "head_dim"],
)
def test_rotor3_refuses(x, bits, message):
    with pytest.raises(ValueError, match=message):
        metal.rotor3_quantize_dequantize(x, bits)


# ---- the text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("head_dim", [128, 840])
def test_coefficients_are_the_rotation(name, head_dim):
    """What the kernels read gives back the stages' matrices; 840 has all radices."""
    turned = rotation(name, head_dim, layer=2)
    if not turned.stages:
        given = np.array(kernel_source.coefficients(turned))
        assert name == "identity" or np.allclose(given.reshape(head_dim, -1), turned.matrix.T)
        return
    for step in kernel_source._steps(turned):
        assert np.isfinite(step.coefficients).all()
        if step.block in ("Left", "Sandwich", "Plane"):
            assert np.allclose(np.linalg.norm(step.coefficients, axis=-1), 1)
        else:
            assert np.isin(step.coefficients, (-1, 1)).all()


def texts():
    """The text of each kernel in some configurations: names, and calls that make it."""
    x = mx.zeros((1, 2, BLOCK, 840))
    for name, head_dim in (("cascade", 280), ("rotor3", 128), ("hadamard", 336), ("dense", 64)):
        for role, bits in ((KEY, 3), (VALUE, 4)):
            chosen = made_codec(name, head_dim, bits, role)
            part = x[..., :head_dim]
            scale = mx.ones((2, head_dim)) if bits == 3 else None
            yield lambda c=chosen, p=part, s=scale: METAL.encode(p, c, channel_scale=s)
            packed = Packed(*map(to_mlx, reference.encode(np.array(part), chosen)))
            yield lambda c=chosen, p=packed, s=scale: METAL.decode(p, c, channel_scale=s)
            if role == KEY:
                yield lambda c=chosen, p=part, m=packed.centres: METAL.encode(p, c, centres=m)
    yield lambda: metal.rotor3_quantize_dequantize(mx.zeros((3, 128)), 3)


@emulated
def test_lint_accepts_every_kernel():
    seen = []

    def linting(*arguments, **more):
        kernel = emulator.metal_kernel(*arguments, **more)

        def call(**call):
            text = kernel.metal_text(**call)
            seen.append(emulator.lint(text))
            return kernel(**call)

        return call

    with kernels_made_by(linting):
        for make in texts():
            make()
    assert len(seen) == 21
    assert [complaint for complaints in seen for complaint in complaints] == []


@pytest.mark.parametrize("role", ROLES)
def test_launches_are_traced_without_metal(role):
    """Under export MLX records the calls, so grids, shapes and templates are seen anywhere."""
    chosen = made_codec("cascade", 128, 4, role)
    recorded = []

    def record(event):
        if event["type"] == "primitive" and event["name"] == "CustomKernel":
            recorded.append(event["arguments"][0])

    def there_and_back(x):
        packed = METAL.encode(x, chosen)
        decoded = METAL.decode(packed, chosen, dtype=mx.float16)
        return metal.rotor3_quantize_dequantize(decoded.reshape(-1, 128), 4)

    with kernels_made_by(MLX_METAL_KERNEL):
        mx.export_function(record, there_and_back, mx.zeros((B, K, N * BLOCK, 128)))
    names = ("encode_cascade_128_4", "decode_cascade_128_4", "rotor3_4")
    assert len(recorded) == len(names)
    for name, kernel in zip(names, recorded, strict=True):
        assert f"rotormlx_{name}" in kernel


def test_missing_text_is_named():
    with pytest.raises(RuntimeError, match=r"metal_kernels/abacus.metal must lie in .*install"):
        kernel_source.metal_text("abacus")


# ---- the choice ---------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine seems to have."""

    def pretend(*, metal_gpu, device):
        monkeypatch.setattr(mx.metal, "is_available", lambda: metal_gpu)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))

    monkeypatch.delenv("ROTORMLX_BACKEND", raising=False)
    return pretend


@pytest.mark.parametrize(
    ("metal_gpu", "device", "name"),
    [
        (True, mx.gpu, "metal"),
        (True, mx.cpu, "mlx"),
        (False, mx.gpu, "mlx"),
        (False, mx.cpu, "mlx"),
    ],
)
def test_metal_is_chosen_where_it_runs(machine, metal_gpu, device, name):
    machine(metal_gpu=metal_gpu, device=device)
    assert backends.backend().name == name


@pytest.mark.parametrize(
    ("metal_gpu", "device", "message"),
    [(False, mx.cpu, "MLX finds no Metal GPU"), (True, mx.cpu, "default device is the CPU")],
)
def test_metal_by_name_is_refused_without_metal(machine, monkeypatch, metal_gpu, device, message):
    machine(metal_gpu=metal_gpu, device=device)
    monkeypatch.setenv("ROTORMLX_BACKEND", "metal")
    with pytest.raises(RuntimeError, match=message):
        backends.backend()


def test_mlx_by_name_is_taken_where_metal_runs(machine, monkeypatch):
    machine(metal_gpu=True, device=mx.gpu)
    monkeypatch.setenv("ROTORMLX_BACKEND", "mlx")
    assert backends.backend().name == "mlx"


# ---- the suite can fail -------------------------------------------------------------------------


def encodes(name="cascade", head_dim=80, bits=3, role=KEY, scaled=True):
    chosen = made_codec(name, head_dim, bits, role)
    x = mx.array(rows((1, 2, BLOCK, head_dim)))
    check_encode(x, chosen, scale=scale_of_channels(chosen, 2) if scaled else None)


def fills_up(head_dim=80):
    chosen = made_codec("cascade", head_dim, 4, KEY)
    centres = rows((2, 1, 1, head_dim), seed=3).astype(np.float16)
    check_encode(mx.array(rows((2, 1, BLOCK, head_dim))), chosen, centres=centres)


def decodes(name="cascade", head_dim=80, bits=3, role=KEY):
    chosen = made_codec(name, head_dim, bits, role)
    scale = scale_of_channels(chosen, 2)
    packed = reference.encode(rows((1, 2, BLOCK, head_dim)), chosen, channel_scale=scale)
    check_decode(packed, chosen, scale=scale)


def barrier_mutations():
    """Each barrier deleted; each of a threadgroup for no memory."""
    for place, checks in {
        "sums written": encodes,
        "sums read": encodes,
        "codes written": encodes,
    }.items():
        barrier = f"threadgroup_barrier(mem_flags::mem_threadgroup);  // {place}"
        yield barrier, "", checks
        yield barrier, "threadgroup_barrier(mem_flags::mem_none);", checks
    yield "lane_barrier();  // row written", "", encodes
    yield "lane_barrier();  // row written", "", decodes
    behind_stage = "first[r * STRIDE] = x[r];\n  }\n  lane_barrier();"
    without = "first[r * STRIDE] = x[r];\n  }\n"
    yield behind_stage, without, encodes
    yield behind_stage, without, decodes
    before_write = "  lane_barrier();\n  for (uint c = lane, p = 0; c < D; c += LANES, ++p) row[c]"
    yield before_write, before_write.split("\n")[1], partial(encodes, "dense")
    flags = "simdgroup_barrier(mem_flags::mem_threadgroup)"
    yield flags, "simdgroup_barrier(mem_flags::mem_none)", encodes


def bound_mutations():
    """Each bound shifted by one."""
    rows_of_block = "for (uint token = worker; token < BLOCK; token += WORKERS) {\n    "
    for what, checks in (
        ("float numbers", encodes),
        ("for (uint p", encodes),
        ("const float scale", decodes),
    ):
        old = rows_of_block + what
        for shift in ("- 1", "+ 1"):
            yield old, old.replace("BLOCK", f"BLOCK {shift}"), checks
    for old, checks in {
        "if (c < D) row[c] = centre[p];": encodes,
        "if (c < D) {\n      float mean": encodes,
        "if (c < D) {\n        const float number": encodes,
        "if (c < D) {\n        code[p]": encodes,
        "if (c < D) codes[": encodes,
        "c < D; c += LANES) square_sum": encodes,
        "c < D; c += LANES) {\n      device": decodes,
        "c < D; c += LANES) {\n      float number": decodes,
        "c < D; c += LANES, ++p) {": partial(encodes, "dense"),
        "c < D; c += LANES, ++p) row[c]": partial(encodes, "dense"),
        "uint i = 0; i < D; ++i) sums": partial(encodes, "dense"),
        "3 * g + i < D ? float(x_row": partial(check_rotor3, 80, 3, "f32"),
        "if (3 * (lane + 32 * p) + i < D)": partial(check_rotor3, 80, 3, "f32"),
        "if (3 * g + i < D) out": partial(check_rotor3, 80, 3, "f32"),
    }.items():
        yield old, old.replace("< D", "< D - 1"), checks
        # One code more lands in the padding between rows, where nobody looks.
        if "codes[" not in old:
            yield old, old.replace("< D", "< D + 1"), checks
    for old, new, checks in (
        ("c < D ? float(block_rows", "c < D - 1 ? float(block_rows", encodes),
        ("c < D ? float(block_rows", "c < D + 1 ? float(block_rows", encodes),
        ("g < OUTER * STRIDE", "g < OUTER * STRIDE - 1", encodes),
        ("g < OUTER * STRIDE", "g < OUTER * STRIDE + 1", encodes),
        ("w < WORKERS", "w < WORKERS - 1", encodes),
        ("w < WORKERS", "w < WORKERS + 1", encodes),
        ("i < ROWS * WORD_LANES", "i < ROWS * WORD_LANES - 1", encodes),
        ("i < ROWS * WORD_LANES", "i < ROWS * WORD_LANES + 1", encodes),
        ("f < 32 / FIELD && f < count", "f < 32 / FIELD - 1 && f < count", encodes),
        ("f < 32 / FIELD && f < count", "f < 32 / FIELD", encodes),
        ("f < 32 / FIELD && f < count", "f < 32 / FIELD && f < count - 1", encodes),
        ("row < first_rows", "row < first_rows - 1", encodes),
        ("row < first_rows", "row < first_rows + 1", encodes),
        ("mask = LANES / 2; mask > 0", "mask = LANES / 2; mask > 1", encodes),
        ("mask = LANES / 2; mask > 0", "mask = LANES / 4; mask > 0", encodes),
        ("mask = LANES / 2; mask > 0", "mask = LANES / 4; mask > 0", check_centre_of_finite_rows),
        ("row >= rows", "row > rows", partial(check_rotor3, 80, 3, "f32")),
        ("row >= rows", "row >= rows - 1", partial(check_rotor3, 80, 3, "f32")),
        ("g < ROTORS", "g < ROTORS - 1", partial(check_rotor3, 80, 3, "f32")),
        ("g < ROTORS", "g < ROTORS + 1", partial(check_rotor3, 80, 3, "f32")),
    ):
        yield old, new, checks


# Each block type with a line of its function, and where it occurs.
BLOCKS = {
    "Left": ("const float x0 = x[0], x1 = x[1], x2", ("cascade", 64)),
    "Sandwich": ("const float x = v[0]", ("rotor3", 64)),
    "Plane": ("const float x0 = x[0], x1 = x[1];", ("planar2", 64)),
    "Odd3": ("const float sum = 0.666666667f", ("cascade", 96)),
    "Odd5": ("for (uint i = 0; i < RADIX; ++i) sum = fma", ("cascade", 80)),
    "Odd7": ("const float y = 0.445902914f;", ("cascade", 112)),
    "Walsh4": ("const float s = x[0] + x[1], d", ("hadamard", 64)),
    "Walsh2": ("const float q = 0.707106781f;", ("hadamard", 128)),
    "Signs": ("x[0] *= sign[0];", ("hadamard", 64)),
}


def stage_mutations():
    """Each kind of block, each stage and the matrix replaced by the identity, both ways."""
    for line, where in BLOCKS.values():
        yield line, f"return; {line}", partial(encodes, *where, scaled=False)
        yield line, f"if (BACK) return; {line}", partial(decodes, *where)
    for name, head_dim in (("cascade", 64), ("rotor3", 64), ("planar2", 64), ("cascade", 112)):
        yield "BACK ?", "false ?", partial(decodes, name, head_dim)
    for name, head_dim in (("cascade", 128), ("cascade", 280), ("rotor3", 80), ("hadamard", 192)):
        lines = kernel_source.rotation_text(made_codec(name, head_dim, 4, VALUE).rotation)
        for line in lines.splitlines():
            if "turn_stage" in line:
                check = decodes if "true>" in line else partial(encodes, scaled=False)
                yield line, "", partial(check, name, head_dim, 4, VALUE)
    for check in (encodes, decodes):
        yield "row[c] = sums[p];", ";", partial(check, "dense")
    rotor3 = partial(check_rotor3, 80, 3, "f32")
    for turn in ("Sandwich::turn<false>", "Sandwich::turn<true>"):
        yield f"{turn}(v + 3 * p, coefficients + 4 * g);", ";", rotor3
    for turn in ("Plane::turn<false>", "Plane::turn<true>"):
        yield f"{turn}(v + 3 * p, coefficients + 4 * ROTORS);", ";", rotor3


def scale_mutations():
    """Each scale and centre dropped; roundings to what is stored left out."""
    rotor3 = partial(check_rotor3, 80, 3, "f32")
    return [
        (" / channel_factor[p]", "", encodes),
        ("(number - centre[p])", "number", encodes),
        ("centre[p] = float(rounded)", "centre[p] = mean", partial(encodes, bits=8)),
        ("clamp(mean, -65504.0f, 65504.0f)", "mean", check_centre_of_finite_rows),
        ("row[c] * to_unit_variance", "row[c]", encodes),
        ("sqrt(float(D)) / ", "1.0f / ", encodes),
        ("const float scale = level_row / level_level;", "const float scale = level_row;", encodes),
        ("row[c] = scale * level", "row[c] = level", decodes),
        ("number *= channel_scale", "channel_scale", decodes),
        ("number += float(centres", "float(centres", decodes),
        ("number * to_unit_variance", "number", rotor3),
        ("v[3 * p + i] *= scale;", ";", rotor3),
        (
            "float(stored_scale(square_sum, lane_sum<32>(level_row), lane_sum<32>(level_level)))",
            "lane_sum<32>(level_row) / lane_sum<32>(level_level)",
            rotor3,
        ),
        ("place.z * centres_strides[0]", "place.y * centres_strides[0]", fills_up),
        ("place.y * channel_scale_strides[0]", "0 * channel_scale_strides[0]", encodes),
        ("place.y * channel_scale_strides[0]", "0 * channel_scale_strides[0]", decodes),
    ]


def rule_mutations():
    """Ties, the sign of zero, special rows, planes."""
    special = partial(check_special_rows, 4, VALUE)
    return [
        ("size >= boundaries", "size > boundaries", partial(check_ties, 4)),
        ("z < 0.0f ?", "z <= 0.0f ?", partial(check_ties, 4)),
        ("z < 0.0f ?", "z > 0.0f ?", encodes),
        ("step = 1u << (BITS - 2)", "step = 1u << (BITS - 3)", encodes),
        ("is_finite(square_sum) && ", "", special),
        ("fabs(scale) < 65520.0f", "true", special),
        ("fabs(scale) < 65520.0f", "fabs(scale) < 65504.0f", special),
        ("fits ? half(scale)", "true ? half(scale)", special),
        ("counts ? code[p] : 0u", "code[p]", special),
        ("> 0.0f;\n}", ">= 0.0f;\n}", special),
        ("> 0.0f;\n}", "> 1e-6f;\n}", special),
        ("if (!lane_any<LANES>(broken))", "if (true)", check_centre_of_finite_rows),
        ("if (!lane_any<LANES>(broken))", "if (!broken)", check_centre_of_finite_rows),
        ("weight = 1.0f / BLOCK", "weight = 1.0f", encodes),
        ("packed_fields<FIELD, FIRST>", "packed_fields<FIELD, 0>", encodes),
        ("(row - first_rows) *", "row *", encodes),
        ("<< (f * FIELD)", "<< f", encodes),
        (" >> (i & Word<BITS>::codes)", "", decodes),
        ("WordRows<BITS, COUNT>::FIRST + i / 32", "i / 32", decodes),
    ]


def mutated(old, new, found):
    """A stand-in for ``mx.fast.metal_kernel`` that changes the text first."""

    def make(*, source, header, **more):
        found.append(old in header or old in source)
        source, header = (text.replace(old, new) for text in (source, header))
        return emulator.metal_kernel(source=source, header=header, **more)

    return make


def is_caught(old, new, check):
    found = []
    with kernels_made_by(mutated(old, new, found)):
        try:
            check()
        except (AssertionError, emulator.KernelError):
            caught = True
        else:
            caught = False
    assert any(found), f"no kernel of this check holds {old!r}"
    return caught


@emulated
def test_every_mutation_is_caught(figure):
    """A barrier less, a bound one off, a stage or scale missing: some check fails each time."""
    mutations = [
        *barrier_mutations(),
        *bound_mutations(),
        *stage_mutations(),
        *scale_mutations(),
        *rule_mutations(),
    ]
    # Each is compiled anew, which is most of the time.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        caught = pool.map(is_caught, *zip(*mutations, strict=True), chunksize=8)
        missed = [(old, new) for (old, new, _), c in zip(mutations, caught, strict=True) if not c]
    caught = len(mutations) - len(missed)
    figure(f"encode, decode and rotor3 kernels: {caught} of {len(mutations)} mutations caught")
    assert missed == []
