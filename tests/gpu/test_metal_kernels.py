"""The kernels encode, decode and rotor3: on the device where there is Metal, else emulated."""

import contextlib
import itertools
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, Packed, codec
from rotormlx.codec.rotation import rotation
from rotormlx.config import ROTATIONS, RotorConfig
from rotormlx.kernels import cpu_library, source
from rotormlx.mlx import backends
from rotormlx.mlx.backends import metal
from tests import emulator
from tests.codec.test_vectors import CASES, channel_scale, codec_of, load, packed_of

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_in_every_combination(head_dim, role, bits, dtype):
    chosen = made_codec("cascade", head_dim, bits, role)
    packed = reference.encode(rows((1, 1, BLOCK, head_dim)), chosen)
    check_decode(packed, chosen, dtype=dtype)


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
def test_coefficients_are_the_rotation(name):
    """Of all stages in a row, or the matrix; never so few that MLX would bind them elsewhere."""
    turned = rotation(name, 16, layer=2)
    given = source.coefficients(turned)
    assert given.dtype == np.float32
    assert given.size >= 8
    if turned.stages:
        stages = np.concatenate([stage.coefficients.ravel() for stage in turned.stages])
        assert np.array_equal(given, stages.astype(np.float32))
    elif name == "dense":
        assert np.allclose(given.reshape(16, 16), turned.matrix.T)
        back = source.coefficients(turned, back=True)
        assert np.allclose(back.reshape(16, 16), turned.matrix)


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 80, 96, 112, 120, 128, 192, 256, 840])
def test_lanes_of_a_row_hold_whole_groups(name, head_dim):
    """What the stages of rotation.h take for granted: a group is within the lanes or within one."""
    turned = rotation(name, head_dim)
    template = dict(source.row_template(turned))
    lanes, held = template["LANES"], template["HELD"]
    assert metal.THREADS // lanes <= BLOCK
    if held == 1:
        assert head_dim % lanes == 0
    for stage in turned.stages:
        for channels in groups_of(stage):
            holders = {channel // held % lanes for channel in channels}
            registers = {channel // (lanes * held) for channel in channels}
            assert len(holders) == 1 or (held == 1 and len(registers) == 1)


def groups_of(stage):
    for o in range(stage.outer):
        for i in range(stage.stride):
            first = stage.start + o * stage.radix * stage.stride + i
            yield [first + r * stage.stride for r in range(stage.radix)]


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
    names = ("encode_cascade_128_4", "decode_cascade_128_4", "rotor3_128_4")
    assert len(recorded) == len(names)
    for name, kernel in zip(names, recorded, strict=True):
        assert f"rotormlx_{name}" in kernel


def test_missing_text_is_named():
    with pytest.raises(RuntimeError, match=r"metal_kernels/abacus.metal must lie in .*install"):
        source.metal_text("abacus")


# ---- the choice ---------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine seems to have."""

    def pretend(*, metal_gpu, device):
        monkeypatch.setattr(mx.metal, "is_available", lambda: metal_gpu)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
        monkeypatch.setattr(cpu_library, "missing", lambda: "it is not built")

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
    """Each barrier deleted; each for no memory."""
    for place in ("sums written", "codes written"):
        barrier = f"threadgroup_barrier(mem_flags::mem_threadgroup);  // {place}"
        yield barrier, "", encodes
        yield barrier, "threadgroup_barrier(mem_flags::mem_none);", encodes


def bound_mutations():
    """Each bound shifted by one, or to where a nearby one stands."""
    rotor3 = partial(check_rotor3, 80, 3, "f32")
    threes = partial(encodes, "rotor3", 80)
    dense = partial(encodes, "dense", 80)
    wide = partial(encodes, "cascade", 128)
    return [
        ("(D + LANES * HELD - 1)", "D", threes),
        ("|| channel < D;", "|| channel < D - 1;", threes),
        ("|| channel < D;", "|| channel < D + 1;", threes),
        ("|| channel < D;", "|| channel < D - 1;", rotor3),
        ("|| channel < D;", "|| channel < D + 1;", rotor3),
        (
            "p < CHANNELS; ++p) {\n    const uint c = lane",
            "p < CHANNELS - 1; ++p) {\n    const uint c = lane",
            encodes,
        ),
        (
            "row < ROWS; ++row) {\n      const float x = rows",
            "row < ROWS - 1; ++row) {\n      const float x = rows",
            encodes,
        ),
        ("m < RADIX; ++m) {\n        turned =", "m < RADIX - 1; ++m) {\n        turned =", encodes),
        ("m < RADIX; ++m) {\n      weights", "m < RADIX - 1; ++m) {\n      weights", encodes),
        ("m < N; ++m", "m < N - 1; ++m", wide),
        ("r < N; ++r) x[r]", "r < N - 1; ++r) x[r]", wide),
        ("g < CHANNELS / RADIX", "g < CHANNELS / RADIX - 1", wide),
        ("g < CHANNELS / RADIX", "g < CHANNELS / RADIX + 1", wide),
        ("row < ROWS; ++row) {\n      thread", "row < ROWS - 1; ++row) {\n      thread", wide),
        ("r < RADIX; ++r) first", "r < RADIX - 1; ++r) first", wide),
        ("p < CHANNELS / HELD;", "p < CHANNELS / HELD - 1;", threes),
        ("place < FIRST + GROUPS", "place < FIRST + GROUPS - 1", threes),
        ("place < FIRST + GROUPS", "place < FIRST + GROUPS + 1", threes),
        ("place >= FIRST", "place > FIRST", threes),
        ("row < ROWS; ++row) {\n        Block", "row < ROWS - 1; ++row) {\n        Block", threes),
        ("m < LANES; ++m", "m < LANES - 1; ++m", dense),
        ("q < CHANNELS; ++q", "q < CHANNELS - 1; ++q", dense),
        (
            "p < CHANNELS; ++p) {\n    for (uint m",
            "p < CHANNELS - 1; ++p) {\n    for (uint m",
            dense,
        ),
        (
            "p < Channels::CHANNELS; ++p) square_sum",
            "p < Channels::CHANNELS - 1; ++p) square_sum",
            encodes,
        ),
        (
            "p < Channels::CHANNELS; ++p) {\n    code",
            "p < Channels::CHANNELS - 1; ++p) {\n    code",
            encodes,
        ),
        ("p < CHANNELS; ++p) broken", "p < CHANNELS - 1; ++p) broken", check_centre_of_finite_rows),
        ("p < CHANNELS; ++p) sum[p] = fma", "p < CHANNELS - 1; ++p) sum[p] = fma", encodes),
        (
            "p < CHANNELS; ++p) {\n    for (ushort",
            "p < CHANNELS - 1; ++p) {\n    for (ushort",
            encodes,
        ),
        ("mask < 32", "mask < 16", encodes),
        ("worker % (32 / LANES) == 0", "worker == 0", encodes),
        ("worker % (32 / LANES) == 0", "true", encodes),
        ("s < SIMDGROUPS; ++s", "s < SIMDGROUPS - 1; ++s", encodes),
        ("s < SIMDGROUPS; ++s", "s < SIMDGROUPS + 1; ++s", encodes),
        ("if (worker == 0) centres", "if (worker == 1 && lane > 0) centres", encodes),
        (
            "r < ROWS; ++r) {\n    device const T* row",
            "r < ROWS - 1; ++r) {\n    device const T* row",
            encodes,
        ),
        (
            "r < ROWS; ++r) {\n    device const T* row",
            "r < ROWS + 1; ++r) {\n    device const T* row",
            encodes,
        ),
        ("r < ROWS; ++r) {\n    bool broken", "r < ROWS - 1; ++r) {\n    bool broken", encodes),
        ("r < ROWS; ++r) {\n        rows", "r < ROWS - 1; ++r) {\n        rows", encodes),
        (
            "r < ROWS; ++r) {\n    const uint token",
            "r < ROWS - 1; ++r) {\n    const uint token",
            encodes,
        ),
        (
            "r < ROWS; ++r) {\n    const uint token",
            "r < ROWS + 1; ++r) {\n    const uint token",
            encodes,
        ),
        (
            "r < ROWS; ++r) {\n    const uint token",
            "r < ROWS - 1; ++r) {\n    const uint token",
            decodes,
        ),
        (
            "r < ROWS; ++r) {\n        const float number",
            "r < ROWS - 1; ++r) {\n        const float number",
            decodes,
        ),
        (
            "r < ROWS; ++r) {\n        const float number",
            "r < ROWS + 1; ++r) {\n        const float number",
            decodes,
        ),
        ("worker + r * WORKERS", "worker + r * (WORKERS - 1)", encodes),
        ("worker + r * WORKERS", "worker + r * (WORKERS + 1)", decodes),
        ("if (lane == 0) scales", "if (true) scales", encodes),
        ("i < WORD_ROWS * WORD_LANES", "i < WORD_ROWS * WORD_LANES - 1", encodes),
        ("i < WORD_ROWS * WORD_LANES", "i < WORD_ROWS * WORD_LANES + 1", encodes),
        ("f < 32 / FIELD && f < count", "f < 32 / FIELD - 1 && f < count", encodes),
        ("f < 32 / FIELD && f < count", "f < 32 / FIELD", encodes),
        ("f < 32 / FIELD && f < count", "f < 32 / FIELD && f < count - 1", encodes),
        ("row < first_rows", "row < first_rows - 1", encodes),
        ("row < first_rows", "row < first_rows + 1", encodes),
        ("mask = LANES / 2; mask > 0", "mask = LANES / 2; mask > 1", encodes),
        ("mask = LANES / 2; mask > 0", "mask = LANES / 4; mask > 0", encodes),
        ("mask = LANES / 2; mask > 0", "mask = LANES / 4; mask > 0", check_centre_of_finite_rows),
        ("&& at < count", "&& at < count - 1", rotor3),
        ("&& at < count", "", rotor3),
        ("long(count) - 1", "long(count)", rotor3),
    ]


# Each block type with the line that does the work, and where it occurs.
BLOCKS = {
    "Left": ("return sign_at(BACK ? 0xAC60u : 0x5390u, r, m) * rotor[m];", ("cascade", 64)),
    "Plane": ("return sign_at(BACK ? 0x20u : 0x10u, r, m) * plane[m];", ("planar2", 64)),
    "Walsh4": ("return sign_at(0x0AC6u, r, m) * 0.5f;", ("hadamard", 64)),
    "Walsh2": ("return sign_at(0x02u, r, m) * 0.707106781f;", ("hadamard", 128)),
    "Signs": ("return sign[0];", ("hadamard", 64)),
    "Sandwich": ("const float x = v[0]", ("rotor3", 64)),
    "Odd3": ("const float sum = 0.666666667f", ("cascade", 96)),
    "Odd5": ("for (uint i = 0; i < RADIX; ++i) sum = fma", ("cascade", 80)),
    "Odd7": ("const float y = 0.445902914f;", ("cascade", 112)),
}


def stage_mutations():
    """Each kind of block, each stage and the matrix replaced by the identity, both ways."""
    for name, (line, where) in BLOCKS.items():
        same = ""
        if line.startswith("return"):
            same = " 1.0f" if name == "Signs" else " m == 0 ? 1.0f : 0.0f"
        yield line, f"return{same}; {line}", partial(encodes, *where, scaled=False)
        yield line, f"if (BACK) return{same}; {line}", partial(decodes, *where)
    for name, head_dim in (("cascade", 64), ("rotor3", 64), ("planar2", 64), ("cascade", 112)):
        yield "BACK ?", "false ?", partial(decodes, name, head_dim)
    for old, new, where in (
        ("0x5390u", "0x5380u", ("cascade", 64)),
        ("0x5390u", "0x3590u", ("cascade", 64)),
        ("0x0AC6u", "0x0AC4u", ("hadamard", 64)),
        ("0x02u", "0x00u", ("hadamard", 128)),
        ("m * STRIDE", "m", ("cascade", 64)),
        ("lane / STRIDE % RADIX", "lane % RADIX", ("cascade", 64)),
        ("* STRIDE + c % STRIDE;", "* STRIDE;", ("cascade", 64)),
        ("g / STEP * (RADIX * STEP) + g % STEP", "g * RADIX", ("cascade", 128)),
        ("(g * LANES + lane) * Block", "(g * LANES) * Block", ("cascade", 128)),
        ("(place - FIRST) * Block", "place * Block", ("rotor3", 80)),
    ):
        yield old, new, partial(encodes, *where, scaled=False)
    for name, head_dim in (("cascade", 128), ("cascade", 280), ("rotor3", 80), ("hadamard", 192)):
        lines = source.rotation_text(made_codec(name, head_dim, 4, VALUE).rotation)
        for line in lines.splitlines():
            if "turn_" in line:
                check = decodes if "true>" in line else partial(encodes, scaled=False)
                yield line, "", partial(check, name, head_dim, 4, VALUE)
    for check in (encodes, decodes):
        yield "rows[i] = sums[i];", ";", partial(check, "dense")
    rotor3 = partial(check_rotor3, 80, 3, "f32")
    yield "rotate_rows<LANES, 1>(row, coefficients, lane);\n\n", "\n\n", rotor3
    yield "unrotate_rows<LANES, 1>(row, coefficients, lane);", "", rotor3


def scale_mutations():
    """Each scale and centre dropped; roundings to what is stored left out."""
    rotor3 = partial(check_rotor3, 80, 3, "f32")
    return [
        (" / channel_factor", "", encodes),
        ("(rows[r * CHANNELS + p] - centre)", "rows[r * CHANNELS + p]", encodes),
        ("centre = float(rounded)", "centre = mean", partial(encodes, bits=8)),
        ("clamp(mean, -65504.0f, 65504.0f)", "mean", check_centre_of_finite_rows),
        ("row[p] * to_unit_variance", "row[p]", encodes),
        ("row[p] * to_unit_variance", "row[p]", rotor3),
        ("sqrt(float(D)) / ", "1.0f / ", encodes),
        ("const float scale = level_row / level_level;", "const float scale = level_row;", encodes),
        ("number = scale * level", "number = level", decodes),
        ("row[p] = scale * level", "row[p] = level", rotor3),
        (
            "fma(rows[r * CHANNELS + p], channel_factor, centre)",
            "rows[r * CHANNELS + p] + centre",
            decodes,
        ),
        (
            "fma(rows[r * CHANNELS + p], channel_factor, centre)",
            "rows[r * CHANNELS + p] * channel_factor",
            decodes,
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
        ("if (!has_codes(scale))", "if (false)", special),
        ("> 0.0f;\n}", ">= 0.0f;\n}", special),
        ("> 0.0f;\n}", "> 1e-6f;\n}", special),
        (
            "if (Channels::exists(Channels::channel(lane, p)))",
            "if (true)",
            partial(encodes, "rotor3", 80),
        ),
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
