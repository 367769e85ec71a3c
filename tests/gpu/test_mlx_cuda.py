"""The CUDA backend of MLX's own CUDA build: its launch code and texts, run in the emulator."""

import contextlib
import itertools
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import reference
from rotormlx.codec.format import BLOCK, KEY, ROLES
from rotormlx.kernels import cuda_plan, source
from rotormlx.mlx import backends
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import cuda, cuda_text
from tests.emulator.cuda import MLXKernel
from tests.gpu.test_cuda_attend import with_own_scales
from tests.gpu.test_metal_attend import MASKS, Case, problem
from tests.gpu.test_metal_kernels import (
    DTYPES,
    as_numpy,
    compare,
    float64,
    made_codec,
    rows,
    scale_of_channels,
)

needs_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
BACKEND = cuda.MLXCUDABackend()
HAS_CUDA = mx.cuda.is_available()


@contextlib.contextmanager
def kernels_made_by(make):
    kinds = ("codec", "query", "parts", "merge")
    caches = [getattr(cuda_text, f"{kind}_kernel") for kind in kinds]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "cuda_kernel", make)
        for cached in caches:
            cached.cache_clear()
        yield
        for cached in caches:
            cached.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def _device():
    with kernels_made_by(mx.fast.cuda_kernel if HAS_CUDA else MLXKernel):
        yield


@needs_emulator
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("name", "head_dim", "bits", "dtype"),
    [("cascade", 80, 3, "bf16"), ("rotor3", 64, 4, "f16"), ("dense", 96, 8, "f32")],
)
def test_encode_and_decode_are_the_reference(name, head_dim, bits, dtype, role):
    chosen = made_codec(name, head_dim, bits, role)
    x = mx.array(rows((2, 3, 2 * BLOCK, head_dim))).astype(DTYPES[dtype])
    scale = scale_of_channels(chosen, 3) if bits == 3 else None
    given = None if scale is None else mx.array(scale)
    packed = BACKEND.encode(x, chosen, channel_scale=given)
    found = as_numpy(packed)
    expected = reference.encode(float64(x), chosen, channel_scale=scale, centres=found.centres)
    compare(found, expected, chosen)
    if role == KEY:
        again = BACKEND.encode(x, chosen, channel_scale=given, centres=packed.centres)
        assert np.array_equal(as_numpy(again).words, found.words)
    decoded = BACKEND.decode(packed, chosen, channel_scale=given, dtype=DTYPES[dtype])
    assert decoded.dtype == DTYPES[dtype]
    vectors = reference.decode(found, chosen, channel_scale=scale)
    # 1e-5 for sums in float32, the bound of docs/FORMAT.md; then one rounding to the dtype.
    error = {"f32": 1e-5, "f16": 2**-10, "bf16": 2**-7}[dtype]
    assert np.abs(float64(decoded) - vectors).max() <= error * np.abs(vectors).max()


# Masks take turns with dtypes and lengths.
CASES = [
    Case(dims=(64, 80), bits=(4, 3), mask=mask, dtype=dtype, length=length, sinks=mask == "bool")
    for mask, (dtype, length) in zip(
        MASKS, itertools.cycle([("f16", 1), ("f32", 5), ("bf16", 17)]), strict=False
    )
]


@needs_emulator
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        Case(blocks=0, dtype="f16"),
        Case(dtype="f16", tail=0, sink=0, dims=(256, 256), bits=(8, 8), batch=1, kv_heads=1),
        Case(dtype="bf16", channel_scale="none", dims=(128, 128), bits=(2, 4), repeats=5, length=2),
    ],
    ids=str,
)
def test_attend_is_the_reference(case):
    posed = problem(case)
    output = BACKEND.attend(posed.call)
    assert output.dtype == DTYPES[case.dtype]
    assert output.shape == (case.batch, case.heads, case.length, case.dims[1])
    assert posed.is_right(output)


@needs_emulator
@pytest.mark.parametrize("operands", [0, 1, 2])
@pytest.mark.parametrize(("head_dim", "bits"), [(128, (4, 4)), (80, (2, 8)), (256, (3, 4))])
def test_shared_memory_is_what_the_kernel_takes(operands, head_dim, bits, tmp_path):
    """The launch code's figure is that of the structures in the kernel's text, to the byte."""
    numbers = f"{bits[0]}, {bits[1]}, {head_dim}, {head_dim}"
    plain = f"int(AttendPlain<{numbers}, {8 * max(operands, 1)}>::SHARED_BYTES)"
    packed = f"int(AttendShape<{numbers}, {operands}>::SHARED_BYTES)"
    body = f"sizes[0] = {f'max({packed}, {plain})' if operands else plain};"
    header = cuda_text.attend_header()
    kernel = MLXKernel("sizes", [], ["sizes"], body, header)
    (found,) = kernel(
        inputs=[],
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
    )
    assert found.item() == cuda_plan.part_shared_bytes(head_dim, head_dim, *bits, operands)


@needs_emulator
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("head_dim", [80, 256])
def test_shared_memory_of_the_other_kernels(head_dim, rows):
    files = (f"attend_{name}.cu" for name in ("query", "merge"))
    header = cuda_text.header_of(*(source.read(f"cuda_kernels/{name}") for name in files))
    body = "".join(
        f"sizes[{i}] = 4 * {name}Shape<{head_dim}, {rows}, {cuda_plan.THREADS}>::ALL;"
        for i, name in enumerate(("Query", "Merge"))
    )
    (found,) = MLXKernel("sizes", [], ["sizes"], body, header)(
        inputs=[],
        output_shapes=[(2,)],
        output_dtypes=[mx.int32],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
    )
    sizes = (cuda_plan.query_shared_bytes, cuda_plan.merge_shared_bytes)
    assert found.tolist() == [size(head_dim, rows) for size in sizes]


@needs_emulator
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_rows_of_a_batch_have_their_own_channel_scale(dtype):
    posed = with_own_scales(replace(CASES[0], mask="causal", dtype=dtype))
    assert posed.is_right(BACKEND.attend(posed.call))


@needs_emulator
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_attend_where_rows_share_what_they_read_of_a_matrix(case, monkeypatch):
    monkeypatch.setattr(cuda_plan, "MANY_ROWS", 1)
    cuda_plan.attend_plan.cache_clear()
    posed = problem(case)
    assert posed.is_right(BACKEND.attend(posed.call))
    cuda_plan.attend_plan.cache_clear()


@needs_emulator
def test_numbers_that_stay_are_made_once(monkeypatch):
    """The GPU waits for each array that the host makes, and would at every layer and token."""
    given, kernel = [], cuda_text.parts_kernel

    def recorded(*arguments):
        return lambda **call: given.append(call["inputs"]) or kernel(*arguments)(**call)

    monkeypatch.setattr(cuda_text, "parts_kernel", recorded)
    posed = problem(Case(dtype="f16", mask="causal"))
    later = [replace(view, tokens=view.tokens - 1) for view in posed.views]
    for views in (posed.views, posed.views, later):
        BACKEND.attend(AttendCall(posed.queries, *views, **posed.options))
    names = ("mask", "lengths", "numbers", "scale")
    same = [[a is b for a, b in zip(given[0][-4:], call[-4:], strict=True)] for call in given[1:]]
    assert dict(zip(names, same[0], strict=True)) == dict.fromkeys(names, True)
    assert dict(zip(names, same[1], strict=True)) == {
        **dict.fromkeys(names, True),
        "lengths": False,
    }


def test_it_is_refused_without_cuda(monkeypatch):
    if HAS_CUDA:
        pytest.skip("MLX has CUDA here")
    monkeypatch.setenv("ROTORMLX_BACKEND", "mlx_cuda")
    with pytest.raises(RuntimeError, match="MLX finds no CUDA GPU"):
        backends.backend()


def test_it_is_chosen_where_mlx_has_cuda(monkeypatch):
    monkeypatch.delenv("ROTORMLX_BACKEND", raising=False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert backends.backend().name == "mlx_cuda"
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    backends.choose.cache_clear()
    assert backends.backend().name == "metal"
