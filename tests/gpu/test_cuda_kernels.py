"""The CUDA kernels encode, decode and rotor3, run in the emulator; the arguments of launch.h."""

import ctypes
import itertools
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY, ROLES, VALUE, codec
from rotormlx.config import ROTATIONS, RotorConfig
from rotormlx.kernels.source import cuda_header
from tests.codec.test_vectors import CASES, channel_scale, codec_of, load
from tests.emulator import KernelError
from tests.gpu.test_metal_kernels import (
    DTYPES,
    HEAD_DIMS,
    compare,
    float64,
    made_codec,
    rows,
    scale_of_channels,
    special_rows,
    tied_row,
)
from tests.support import cuda_calls

needs_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
B, K, N = 2, 3, 2


def check_encode(x, chosen, *, scale=None, centres=None, **more):
    """Encode x, an MLX array, and compare; returns the reference's packed rows."""
    found = cuda_calls.encode(x, chosen, channel_scale=scale, centres=centres, **more)
    if chosen.role == KEY and centres is None:
        centres = found.centres
        means = reference.block_means(float64(x).reshape(*x.shape[:2], -1, BLOCK, x.shape[-1]))
        # One unit in the last place: a mean may lie next to a tie.
        assert np.allclose(centres, means, rtol=2**-10, atol=0)
    expected = reference.encode(float64(x), chosen, channel_scale=scale, centres=centres)
    compare(found, expected, chosen)
    return expected


def check_decode(packed, chosen, *, scale=None, dtype="f32", **more):
    """Decode packed numpy arrays and compare."""
    found = cuda_calls.decode(packed, chosen, channel_scale=scale, dtype=DTYPES[dtype], **more)
    expected = reference.decode(packed, chosen, channel_scale=scale)
    assert found.dtype == DTYPES[dtype]
    # 1e-5 for sums in float32, the bound of docs/FORMAT.md; then one rounding to the dtype.
    error = {"f32": 1e-5, "f16": 2**-10, "bf16": 2**-7}[dtype]
    assert np.array_equal(np.isnan(float64(found)), np.isnan(expected))
    assert np.nanmax(np.abs(float64(found) - expected)) <= error * np.nanmax(np.abs(expected))


# ---- shared vectors -----------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize("bits", codebook.BITS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file_name.split(".")[0])
def test_the_vectors_are_reproduced(case, bits):
    """Every bit of words, scales and centres in each dtype; decoded numbers within the bound."""
    arrays, facts = load(case)
    codecs = {role: codec_of(facts, bits, role) for role in ROLES}
    made = cuda_calls.module("codec", *codecs.values())
    for role, chosen in codecs.items():
        scale = channel_scale(arrays, role)
        for dtype in DTYPES.values():
            x = mx.array(arrays[f"{role}.input"]).astype(dtype)
            packed = cuda_calls.encode(x, chosen, channel_scale=scale, made=made)
            assert np.array_equal(packed.words, arrays[f"{role}.words.{bits}"])
            assert np.array_equal(packed.scales, arrays[f"{role}.scales.{bits}"])
            assert role == VALUE or np.array_equal(packed.centres, arrays["key.centres"])
        expected = arrays[f"{role}.decoded.{bits}"]
        decoded = cuda_calls.decode(packed, chosen, channel_scale=scale, made=made)
        decoded = np.array(decoded)[:, :, : expected.shape[2]]
        # The bound of docs/FORMAT.md, section 9.
        assert np.abs(decoded - expected).max() <= 1e-5 * np.abs(expected).max()


# ---- every rotation and head_dim ----------------------------------------------------------------

# Each rotation meets three head_dims; widths and dtypes take turns.
_TURNS = itertools.cycle(itertools.product(DTYPES, codebook.BITS))
_DIMS = itertools.cycle(HEAD_DIMS)
COMBINATIONS = [(name, next(_DIMS), *next(_TURNS)) for name in ROTATIONS for _ in range(3)]


@needs_emulator
@pytest.mark.parametrize(("name", "head_dim", "dtype", "bits"), COMBINATIONS, ids=str)
def test_encode_and_decode_are_the_reference(name, head_dim, dtype, bits):
    for role in ROLES:
        chosen = made_codec(name, head_dim, bits, role)
        made = cuda_calls.module("codec", *cuda_calls.both_roles(chosen))
        x = mx.array(rows((B, K, N * BLOCK, head_dim))).astype(DTYPES[dtype])
        scale = scale_of_channels(chosen, K) if bits % 2 == 0 else None
        expected = check_encode(x, chosen, scale=scale, made=made)
        check_decode(expected, chosen, scale=scale, dtype=dtype, made=made)


@needs_emulator
@pytest.mark.parametrize("order", [1, 12345])
@pytest.mark.parametrize("role", ROLES)
def test_execution_order_does_not_matter(role, order):
    chosen = made_codec("cascade", 80, 3, role)
    x = mx.array(rows((1, 2, BLOCK, 80)))
    plain, other = (cuda_calls.encode(x, chosen, order=o) for o in (0, order))
    for a, b in zip(plain, other, strict=True):
        assert a is None or np.array_equal(a, b)
    decoded = [np.array(cuda_calls.decode(plain, chosen, order=o)) for o in (0, order)]
    assert np.array_equal(*decoded)


@needs_emulator
@pytest.mark.parametrize("role", ROLES)
def test_blocks_do_not_depend_on_their_company(role):
    chosen = made_codec("cascade", 80, 3, role)
    x = mx.array(rows((B, K, 3 * BLOCK, 80)))
    together = cuda_calls.encode(x, chosen)
    for b, k, n in ((0, 0, 0), (1, 2, 1), (0, 1, 2)):
        part = x[b : b + 1, k : k + 1, n * BLOCK : (n + 1) * BLOCK]
        alone = cuda_calls.encode(part, chosen)
        for one, whole in zip(alone, together, strict=True):
            assert one is None or np.array_equal(one[0, 0, 0], whole[b, k, n])


def fills_up(bits=3, **more):
    """The rows that are there come as zeros; the centres are given."""
    chosen = made_codec("cascade", 80, bits, KEY)
    x = rows((B, K, BLOCK, 80))
    x[:, :, :37] = 0
    centres = rows((B, K, 1, 80), seed=3).astype(np.float16)
    scale = scale_of_channels(chosen, K)
    check_encode(mx.array(x), chosen, scale=scale, centres=centres, **more)


@needs_emulator
def test_a_block_is_filled_up_with_the_centre_it_has():
    fills_up()


# ---- special rows -------------------------------------------------------------------------------


def check_special_rows(bits, role, **more):
    special = special_rows(bits)
    chosen = made_codec("identity", 16, bits, role)
    x = rows((1, 1, BLOCK, 16))
    for i, (row, _) in enumerate(special.values()):
        x[0, 0, 5 * i] = row
    centres = np.zeros((1, 1, 1, 16), np.float16) if role == KEY else None
    found = cuda_calls.encode(mx.array(x), chosen, centres=centres, **more)
    codes = reference.unpack(found.words, chosen)[0, 0, 0]
    for i, (kind, (_, scale)) in enumerate(special.items()):
        stored = found.scales[0, 0, 0, 5 * i]
        assert np.array_equal(stored, np.float16(scale), equal_nan=True), kind
        # Rows whose codes count are constant and positive.
        code = reference.nearest(np.ones(1), bits) if np.isfinite(scale) and scale > 0 else 0
        assert (codes[5 * i] == code).all(), kind
    check_decode(found, chosen, **more)


@needs_emulator
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", codebook.BITS)
def test_special_rows(bits, role):
    check_special_rows(bits, role)


def check_centre_of_finite_rows(**more):
    """A row that is not finite counts as nothing, and the mean of a huge block is clipped."""
    chosen = made_codec("cascade", 80, 3, KEY)
    x = rows((1, 3, BLOCK, 80))
    x[0, 0, 7, 79] = np.nan
    x[0, 0, 8, 0] = np.inf
    x[0, 1] = 3e38 * np.sign(x[0, 1, :1])
    x[0, 2] = np.nan
    with np.errstate(all="ignore"):
        check_encode(mx.array(x), chosen, **more)


@needs_emulator
def test_centre_counts_finite_rows():
    check_centre_of_finite_rows()


@needs_emulator
@pytest.mark.parametrize("bits", codebook.BITS)
def test_ties_and_zeros(bits):
    """A tie goes to the larger magnitude, of either sign; either zero has code 0."""
    chosen = made_codec("identity", 16, bits, VALUE)
    x = np.zeros((1, 1, BLOCK, 16), np.float32)
    count = min(len(codebook.boundaries(bits)), 20)
    for i in range(count):
        x[0, 0, 2 * i] = tied_row(bits, i)
        x[0, 0, 2 * i + 1] = -x[0, 0, 2 * i]
    codes = reference.unpack(cuda_calls.encode(mx.array(x), chosen).words, chosen)[0, 0, 0]
    sign = 1 << (bits - 1)
    for i in range(count):
        assert codes[2 * i, 0] == i + 1
        assert codes[2 * i + 1, 0] == sign + i + 1
        assert not codes[2 * i : 2 * i + 2, 3:].any()


# ---- the published method -----------------------------------------------------------------------


def check_rotor3(head_dim=80, bits=3, dtype="f32", **more):
    chosen = codec(RotorConfig(bits, bits, "rotor3", seed=2), head_dim, layer=5, role=VALUE)
    count = 11  # no multiple of the rows of a thread block
    x = rows((count, head_dim))
    x[3] = 0
    x[4, 1] = np.nan
    x[5] *= 1e20
    x = mx.array(x).astype(DTYPES[dtype])
    found = cuda_calls.rotor3(x, chosen, **more)
    block = np.zeros((1, 1, BLOCK, head_dim))
    block[0, 0, :count] = float64(x)
    with np.errstate(invalid="ignore"):
        expected = reference.decode(reference.encode(block, chosen), chosen)[0, 0, :count]
    assert found.dtype == DTYPES[dtype]
    error = {"f32": 2e-6, "f16": 2**-10, "bf16": 2**-7}[dtype]
    assert np.array_equal(np.isnan(float64(found)), np.isnan(expected))
    assert np.nanmax(np.abs(float64(found) - expected)) <= error * np.nanmax(np.abs(expected))


@needs_emulator
@pytest.mark.parametrize(
    ("head_dim", "bits", "dtype"),
    [(64, 2, "f32"), (80, 3, "f16"), (96, 4, "bf16"), (128, 8, "f32"), (128, 4, "f16")],
)
def test_rotor3_is_the_reference(head_dim, bits, dtype):
    """Head_dims that leave a channel, a pair and nothing behind the threes."""
    check_rotor3(head_dim, bits, dtype)


# ---- the arguments ------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_arguments_are_plain_c(tmp_path):
    """launch.h is C, and lays its structures out as the tests' twins of them."""
    twins = {
        "rotormlx_packed": cuda_calls.PackedArguments,
        "rotormlx_encode_arguments": cuda_calls.EncodeArguments,
        "rotormlx_decode_arguments": cuda_calls.DecodeArguments,
        "rotormlx_rotor3_arguments": cuda_calls.Rotor3Arguments,
        "rotormlx_attend_arguments": cuda_calls.AttendArguments,
    }
    checks = [
        f'_Static_assert(offsetof({name}, {field}) == {getattr(twin, field).offset}, "{field}");'
        for name, twin in twins.items()
        for field, _ in twin._fields_
    ]
    checks += [
        f'_Static_assert(sizeof({name}) == {ctypes.sizeof(twin)}, "size");'
        for name, twin in twins.items()
    ]
    source = tmp_path / "twins.c"
    source.write_text("\n".join([f'#include "{cuda_calls.KERNELS / "launch.h"}"', *checks, ""]))
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_header_depends_on_nothing_else():
    """One compiled configuration serves all layers and seeds."""
    texts = {
        cuda_header(codec(RotorConfig(seed=seed), 128, layer=layer, role=KEY))
        for seed, layer in itertools.product((0, 5), (0, 9))
    }
    assert len(texts) == 1


# ---- mutations ----------------------------------------------------------------------------------


def encodes(role=KEY, **more):
    chosen = made_codec("cascade", 80, 3, role)
    x = mx.array(rows((2, 2, 2 * BLOCK, 80)))
    check_encode(x, chosen, scale=scale_of_channels(chosen, 2), **more)


def decodes(role=KEY, **more):
    chosen = made_codec("cascade", 80, 3, role)
    scale = scale_of_channels(chosen, 2)
    packed = reference.encode(rows((2, 2, 2 * BLOCK, 80)), chosen, channel_scale=scale)
    check_decode(packed, chosen, scale=scale, **more)


MUTATIONS = [
    *(
        (f"__syncthreads();  // {place}", "", encodes)
        for place in ("sums written", "codes written")
    ),
    ("batch * call.x_strides[0] +", "", encodes),
    ("int64_t(block) * BLOCK * call.x_strides[2];", "0;", encodes),
    (
        "head * packed.centres_strides[1] + block * packed.centres_strides[2];\n  const bool",
        "0;\n  const bool",
        encodes,
    ),
    ("Codec::IS_KEY && !call.given_centres", "Codec::IS_KEY", fills_up),
    ("if (!lane_any<LANES>(broken))", "if (true)", check_centre_of_finite_rows),
    ("if (!lane_any<LANES>(broken))", "if (!broken)", check_centre_of_finite_rows),
    ("weight = 1.0f / BLOCK", "weight = 1.0f", encodes),
    ("mask = LANES; mask < 32", "mask = 2 * LANES; mask < 32", encodes),
    ("sums[thread / 32 * D + c] = sum[p]", "sums[c] = sum[p]", encodes),
    ("w < WARPS; ++w) mean", "w < WARPS - 1; ++w) mean", encodes),
    ("fminf(fmaxf(mean, -65504.0f), 65504.0f)", "mean", check_centre_of_finite_rows),
    ("centre = __half2float(rounded)", "centre = 0.0f", encodes),
    ("centre = __half2float(centres[c]);\n      }", "centre = 0.0f;\n      }", fills_up),
    ("if (call.channel_scale != nullptr) channel_factor", "if (false) channel_factor", encodes),
    (
        "channel_factor = call.channel_scale[head * D + c];",
        "channel_factor = call.channel_scale[c];",
        encodes,
    ),
    ("Codec::template rotate<ROWS>(rows, call.coefficients, lane);", "", encodes),
    ("codes[token * CODE_STRIDE + c]", "codes[token * CODE_STRIDE + (c ^ 1)]", encodes),
    (
        "if (lane == 0) scales[token] = scale;",
        "if (lane == 0 && token > 0) scales[token] = scale;",
        encodes,
    ),
    (
        "i < WORD_ROWS * WORD_LANES; i += THREADS",
        "i < WORD_ROWS * WORD_LANES - 1; i += THREADS",
        encodes,
    ),
    (
        "i < WORD_ROWS * WORD_LANES; i += THREADS",
        "i < WORD_ROWS * WORD_LANES + 1; i += THREADS",
        encodes,
    ),
    (
        "word_lane * (Codec::IS_KEY ? CODE_STRIDE : 1)",
        "word_lane * (Codec::IS_KEY ? D : 1)",
        encodes,
    ),
    (
        "word_lane * (Codec::IS_KEY ? CODE_STRIDE : 1)",
        "word_lane * (Codec::IS_KEY ? CODE_STRIDE : 2)",
        partial(encodes, VALUE),
    ),
    (
        "Codec::IS_KEY ? 1 : CODE_STRIDE, uint",
        "Codec::IS_KEY ? 1 : D, uint",
        partial(encodes, VALUE),
    ),
    ("head * packed.words_strides[1] +\n                block", "0 * head + block", encodes),
    ("const float scale = __half2float(scales[token]);", "const float scale = 1.0f;", decodes),
    (
        "(Codec::IS_KEY ? token : c), WORD_LANES",
        "(Codec::IS_KEY ? token : c), BLOCK",
        partial(decodes, VALUE),
    ),
    ("Codec::template unrotate<ROWS>(rows, call.coefficients, lane);", "", decodes),
    ("+ head) * call.blocks + block) * BLOCK;", "+ head) * call.blocks) * BLOCK;", decodes),
    ("call.channel_scale == nullptr ? 1.0f : call.channel_scale[head * D + c]", "1.0f", decodes),
    (
        "fmaf(rows[r * CHANNELS + p], channel_factor, centre)",
        "rows[r * CHANNELS + p] * channel_factor",
        decodes,
    ),
    ("Codec::template rotate<1>(row, call.coefficients, lane);", "", check_rotor3),
    ("Codec::template unrotate<1>(row, call.coefficients, lane);", "", check_rotor3),
    ("row[p] = scale * level_of_code", "row[p] = level_of_code", check_rotor3),
    ("(at < call.rows ? at : call.rows - 1)", "at", check_rotor3),
    ("&& at < call.rows) store", ") store", check_rotor3),
    ("key_rotation::rotate_rows<LANES, ROWS>(rows, coefficients, lane);", "", encodes),
    (
        "value_rotation::rotate_rows<LANES, ROWS>(rows, coefficients, lane);",
        "",
        partial(encodes, VALUE),
    ),
]


def is_caught(old, new, check):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_calls, "module", partial(_mutated, cuda_calls.module, (old, new)))
        try:
            check()
        except (AssertionError, KernelError):
            return True
    return False


def _mutated(module, change, name, keys, values):
    return module(name, keys, values, (change,))


@needs_emulator
def test_every_mutation_is_caught(figure):
    """A barrier less, a bound one off, a rotation or scale missing: some check fails each time."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        caught = list(pool.map(is_caught, *zip(*MUTATIONS, strict=True), chunksize=4))
    missed = [(old, new) for (old, new, _), c in zip(MUTATIONS, caught, strict=True) if not c]
    figure(
        f"CUDA encode, decode and rotor3 kernels: {sum(caught)} of {len(caught)} mutations caught"
    )
    assert missed == []
