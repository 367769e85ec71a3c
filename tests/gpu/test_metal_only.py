"""What only Metal has: its launch code, its texts, its limits and when it is chosen."""

import re
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import codebook, reference
from rotormlx.codec.format import BLOCK, KEY, ROLES, TRELLIS_BITS, VALUE
from rotormlx.codec.rotation import rotation
from rotormlx.config import ROTATIONS
from rotormlx.kernels import cpu_library, source
from rotormlx.mlx import backends
from rotormlx.mlx.backends import metal, metal_attend
from tests import emulator
from tests.support.attend_cases import MASKS, Case, Launch, problem
from tests.support.codec_cases import DTYPES, check_decode, check_encode, made_codec, rows
from tests.support.runners import METAL

emulated = pytest.mark.skipif(
    METAL.on_device, reason="about the emulator, which runs where no Metal is"
)
needs_clang = pytest.mark.skipif(
    shutil.which("clang-19") is None, reason="clang-19 is not installed"
)
# What MLX makes, which records calls where nothing can run.
REAL_METAL_KERNEL = mx.fast.metal_kernel
B, K, N = 2, 3, 2


@pytest.fixture
def runner():
    """Metal, ready to run."""
    if missing := METAL.missing():
        pytest.skip(missing)
    with METAL.kernels():
        yield METAL


# ---- encode and decode at their limits ----------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("head_dim", [16, 40, 336, 360])
def test_head_dims_at_the_limits(runner, head_dim, role):
    """16 is the least; at 336 threadgroup memory is full; 360 takes the inherited path."""
    chosen = made_codec("cascade", head_dim, 3, role)
    assert (metal.encode_bytes(chosen) > metal.THREADGROUP_BYTES) == (head_dim == 360)
    expected = check_encode(runner, mx.array(rows((1, 1, BLOCK, head_dim))), chosen)
    check_decode(runner, expected, chosen)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 256, 336])
@emulated
def test_threadgroup_memory_is_what_the_launch_expects(head_dim, bits):
    launched, chosen = [], made_codec("cascade", head_dim, bits, KEY)
    with METAL.recorded(lambda kernel, launch: launched.append(kernel)):
        METAL.encode(mx.zeros((1, 1, BLOCK, head_dim)), chosen)
    assert launched[0].report.threadgroup_bytes == metal.encode_bytes(chosen)


def test_decode_of_the_largest_head_dim_fits(runner):
    chosen = made_codec("cascade", 1024, 2, KEY)
    check_decode(runner, reference.encode(rows((1, 1, BLOCK, 1024)), chosen), chosen)


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


# ---- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repeats", "bits", "dims", "expected"),
    [(4, 4, 64, 8232), (4, 4, 128, 10280), (8, 8, 128, 17544), (8, 8, 256, 25736)],
)
@emulated
def test_threadgroup_memory_of_few_rows_is_what_the_docs_say(repeats, bits, dims, expected):
    launched = []
    shapes = {"dims": (dims, dims), "bits": (bits, bits), "kv_heads": 1, "batch": 1}
    levels = "table" if bits == 8 else "pairs"
    case = Case(repeats=repeats, launch=Launch(kernels=2, levels=levels), **shapes)
    with METAL.recorded(lambda kernel, launch: launched.append(kernel)):
        problem(case).run(METAL)
    assert launched[0].report.threadgroup_bytes == expected


@pytest.mark.parametrize(
    ("repeats", "length", "tiles"), [(8, 1, 1), (4, 16, 1), (8, 8, 1), (8, 9, 2)]
)
@emulated
def test_a_byte_is_read_once_for_its_group(repeats, length, tiles):
    """Threadgroups that read the same part of a KV head, up to 64 query rows: one."""
    grids = []
    case = Case(repeats=repeats, kv_heads=1, batch=1, length=length, mask="causal")
    with METAL.recorded(lambda kernel, launch: grids.append(launch["grid"])):
        problem(case).check(METAL)
    assert grids[0][1:] == (1, tiles)


def test_longer_vectors_take_the_operations_of_mlx():
    """No kernel is built for them."""
    with METAL.kernels(lambda **_: pytest.fail("a kernel is built")):
        problem(Case(dims=(320, 64), batch=1, kv_heads=1, missing=0)).check(METAL)


@pytest.mark.parametrize("kernels", [1, 2])
def test_attention_sink_logits_may_have_gaps(runner, kernels):
    posed = problem(Case(sink_logits=True, launch=Launch(kernels=kernels)))
    logits = mx.repeat(posed.options["sink_logits"], 2)
    logits = mx.where(mx.arange(logits.size) % 2 == 0, logits, 99.0)[::2]
    replace(posed, options={**posed.options, "sink_logits": logits}).check(runner)


@emulated
def test_nothing_short_comes_to_a_kernel():
    """MLX binds fewer than 8 numbers to another address space: the kernel is compiled anew."""
    sizes = []
    for case in (Case(batch=1, kv_heads=4), Case(batch=1, kv_heads=4, blocks=0)):
        for kernels in (1, 2):
            posed = problem(replace(case, sink_logits=True, launch=Launch(kernels=kernels)))
            with METAL.recorded(lambda kernel, launch: sizes.extend(launch["inputs"])):
                posed.run(METAL)
    # Tops and totals of the parts are as many as there are rows.
    assert min(a.size for a in sizes) >= 8


def test_buffers_that_are_not_counted_in_32_bits_take_the_operations_of_mlx(monkeypatch):
    monkeypatch.setattr(metal_attend, "MAX_BUFFER", 2 * 3 * 41 * 80)
    with METAL.kernels(lambda **_: pytest.fail("a kernel is built")):
        problem(Case(dtype="f16")).check(METAL)


@pytest.mark.parametrize("length", [5, 17])
def test_unrotated_queries_fail(runner, monkeypatch, length):
    """Of many rows: the rotation of the keys, left out or reversed; no channel scale."""
    case = Case(bits=(3, 3), dims=(64, 64), kv_heads=2, length=length, blocks=5, mask="causal")
    case = replace(case, launch=Launch((2, 2)))
    right = metal_attend.rotated_queries
    matrix = mx.array(problem(case).views[0].codec.rotation.matrix.astype(np.float32))
    wrong = [
        lambda q, keys: q * keys.channel_scale[:, None, :],
        lambda q, keys: (q * keys.channel_scale[:, None, :]) @ matrix,
        lambda q, keys: right(q, replace(keys, channel_scale=None)),
    ]
    for rotated in wrong:
        monkeypatch.setattr(metal_attend, "rotated_queries", rotated)
        assert not problem(case).is_right(problem(case).run(runner))


# ---- the rotation as the kernels take it --------------------------------------------------------


@pytest.mark.parametrize("name", ROTATIONS)
def test_coefficients_are_the_rotation(name):
    """Of all stages in a row, or the matrix; never so few that MLX would bind them elsewhere."""
    rotated = rotation(name, 16, layer=2)
    given = source.coefficients(rotated)
    assert given.dtype == np.float32
    assert given.size >= 8
    if rotated.stages:
        stages = np.concatenate([stage.coefficients.ravel() for stage in rotated.stages])
        assert np.array_equal(given, stages.astype(np.float32))
    elif name == "dense":
        assert np.allclose(given.reshape(16, 16), rotated.matrix.T)
        back = source.coefficients(rotated, back=True)
        assert np.allclose(back.reshape(16, 16), rotated.matrix)


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 80, 96, 112, 120, 128, 192, 256, 840])
def test_lanes_of_a_row_hold_whole_groups(name, head_dim):
    """What the stages of rotation.h take for granted: a group is within the lanes or within one."""
    rotated = rotation(name, head_dim)
    template = dict(source.row_template(rotated))
    lanes, held = template["LANES"], template["HELD"]
    assert metal.THREADS // lanes <= BLOCK
    if held == 1:
        assert head_dim % lanes == 0
    for stage in rotated.stages:
        for channels in groups_of(stage):
            holders = {channel // held % lanes for channel in channels}
            registers = {channel // (lanes * held) for channel in channels}
            assert len(holders) == 1 or (held == 1 and len(registers) == 1)


def groups_of(stage):
    for o in range(stage.outer):
        for i in range(stage.stride):
            first = stage.start + o * stage.radix * stage.stride + i
            yield [first + r * stage.stride for r in range(stage.radix)]


# ---- the texts ----------------------------------------------------------------------------------


def codec_calls():
    """Calls that make each kernel of the codec in some configurations."""
    x = mx.zeros((1, 2, BLOCK, 840))
    for name, head_dim in (("cascade", 280), ("rotor3", 128), ("hadamard", 336), ("dense", 64)):
        for role, bits in ((KEY, 3), (VALUE, 4)):
            chosen = made_codec(name, head_dim, bits, role)
            part = x[..., :head_dim]
            scale = np.ones((2, head_dim), np.float32) if bits == 3 else None
            yield lambda c=chosen, p=part, s=scale: METAL.encode(p, c, scale=s)
            packed = reference.encode(np.array(part), chosen)
            yield lambda c=chosen, p=packed, s=scale: METAL.decode(p, c, scale=s)
            if role == KEY:
                yield lambda c=chosen, p=part, m=packed.centres: METAL.encode(p, c, centres=m)
    rotor3 = made_codec("rotor3", 128, 3, VALUE)
    yield lambda: METAL.rotor3(mx.zeros((3, 128)), rotor3, seed=7, layer=3)


def complaints_about(call):
    """What the lint says about each kernel that a call launches."""
    texts = []
    with METAL.recorded(lambda kernel, launch: texts.append(kernel.metal_text(**launch))):
        call()
    return [emulator.lint(text) for text in texts]


@needs_clang
@emulated
def test_lint_accepts_every_kernel_of_the_codec():
    complaints = [said for call in codec_calls() for said in complaints_about(call)]
    assert len(complaints) == 21
    assert [line for lines in complaints for line in lines] == []


@needs_clang
@emulated
@pytest.mark.parametrize(
    "case",
    [
        Case(bits=(2, 8), dtype="f16", sink_logits=True, mask="additive"),
        Case(bits=(3, 3), dtype="bf16", repeats=4, mask="causal"),
        Case(bits=(4, 4), dtype="f32", repeats=5, mask="bool", batch=5),
        Case(bits=(3, 2), dtype="f16", length=17, sink_logits=True, mask="additive", batch=5),
        Case(bits=(8, 4), dtype="bf16", length=17, dims=(192, 128), mask="bool"),
        Case(bits=(4, 3), dtype="f32", length=17, mask="causal"),
    ],
    ids=str,
)
def test_lint_accepts_attention(case):
    """By one kernel and by two, and each way to find levels."""
    complaints = []
    for kernels, levels in ((1, "quad"), (2, "arithmetic"), (2, "table")):
        posed = problem(replace(case, launch=Launch(kernels=kernels, levels=levels)))
        complaints += complaints_about(lambda posed=posed: posed.run(METAL))
    assert len(complaints) == (5 if case.length == 1 else 6)
    assert [line for lines in complaints for line in lines] == []


def test_levels_are_the_codebook():
    text = source.read("shared_kernels/levels.h")
    of_nearest = {bits: codebook.magnitudes(bits) for bits in codebook.BITS}
    of_trellis = {bits: codebook.trellis_levels(bits)[: 2**bits] for bits in TRELLIS_BITS}
    tables = {f"MAGNITUDES_{bits}": m for bits, m in (of_nearest | of_trellis).items()}
    tables |= {f"PUBLISHED_MAGNITUDES_{bits}": of_nearest[bits] for bits in TRELLIS_BITS}
    for name, magnitudes in tables.items():
        (table,) = re.findall(rf"\b{name}\[{len(magnitudes)}\] = {{(.*?)}};", text, re.DOTALL)
        patterns = [int(word.strip().rstrip("u"), 16) for word in table.split(",")]
        assert patterns == magnitudes.view(np.uint32).tolist()


def test_missing_text_is_named():
    with pytest.raises(RuntimeError, match=r"metal_kernels/abacus.metal must be in .*reinstall"):
        source.metal_text("abacus")


# ---- launches, recorded where no kernel can run -------------------------------------------------


def exported(function, x):
    """Names and texts of the kernels that a function of x launches."""
    kernels = []

    def record(event):
        if event["type"] == "primitive" and event["name"] == "CustomKernel":
            kernels.append(tuple(event["arguments"][:2]))

    mx.export_function(record, function, x)
    return kernels


def exported_attention(case):
    """The same of attention."""
    return exported(lambda q: replace(problem(case), queries=q).run(METAL), problem(case).queries)


@pytest.mark.parametrize("role", ROLES)
def test_codec_launches_are_traced_without_metal(role):
    """Under export MLX records the calls, so grids, shapes and templates are seen anywhere."""
    chosen = made_codec("cascade", 128, 4, role)

    def there_and_back(x):
        packed = METAL.backend.encode(x, chosen)
        decoded = METAL.backend.decode(packed, chosen, dtype=mx.float16)
        return metal.rotor3_quantize_dequantize(decoded.reshape(-1, 128), 4)

    with METAL.kernels(REAL_METAL_KERNEL):
        kernels = exported(there_and_back, mx.zeros((B, K, N * BLOCK, 128)))
    names = ("encode_cascade_128_4", "decode_cascade_128_4", "rotor3_128_4")
    assert len(kernels) == len(names)
    for name, (kernel, _) in zip(names, kernels, strict=True):
        assert f"rotormlx_{name}" in kernel


@pytest.mark.parametrize(
    ("length", "kernels", "names"),
    [
        (1, 1, ["attend_alone"]),
        (1, 2, ["attend_parts", "attend_merge"]),
        (17, 1, ["prefill", "attend_merge"]),
    ],
)
def test_attention_can_be_exported(length, kernels, names):
    case = Case(length=length, mask="causal", sink_logits=True, launch=Launch(kernels=kernels))
    with METAL.kernels(REAL_METAL_KERNEL):
        found = exported_attention(case)
    assert len(found) == len(names)
    for (kernel, _), name in zip(found, names, strict=True):
        assert f"rotormlx_{name}" in kernel


def test_buffers_of_the_cache_are_read_where_they_lie():
    copies = {}

    def recorded(**arguments):
        copies[arguments["name"]] = arguments.get("ensure_row_contiguous", True)
        return REAL_METAL_KERNEL(**arguments)

    with METAL.kernels(recorded):
        for case in (Case(), Case(launch=Launch(kernels=2)), Case(length=17)):
            exported_attention(case)
    assert len(copies) == 4
    assert not any(copies.values())


def test_a_name_stands_for_one_text():
    """MLX compiles anew whenever a name's text is not the one before."""
    base = Case(batch=1, kv_heads=1, sink_logits=True)
    changes = [
        *({"dtype": dtype} for dtype in DTYPES),
        *({"batch": 5}, {"sink": 0, "tail": 0}, {"repeats": 8}, {"blocks": 0}),
        *({"mask": mask} for mask in MASKS),
        *({"tail": 300}, {"channel_scale": "none"}, {"sink_logits": False}, {"length": 17}),
    ]
    texts = {}
    with METAL.kernels(REAL_METAL_KERNEL):
        for change in changes:
            for name, text in exported_attention(replace(base, **change)):
                assert texts.setdefault(name, text) == text, change
    assert len(texts) > 12


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
