"""What only the backend of MLX's own CUDA build has: sizes that its launch code must know, and when
it is chosen.
"""

import itertools
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest

from rotormlx.codec.format import ROLES
from rotormlx.kernels import source
from rotormlx.mlx import backends
from rotormlx.mlx.backends import cuda
from tests.emulator.cuda import MLXKernel
from tests.support import cuda_calls
from tests.support.attend_cases import Case, problem
from tests.support.codec_cases import DTYPES, made_codec
from tests.support.runners import MLX_CUDA

needs_emulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


@needs_emulator
@pytest.mark.parametrize("operands", [0, 1, 2])
@pytest.mark.parametrize(("head_dim", "bits"), [(128, (4, 4)), (80, (2, 8)), (256, (3, 4))])
def test_shared_memory_is_what_the_kernel_takes(operands, head_dim, bits, tmp_path):
    """The launch code's figure is that of the structures in the kernel's text, to the byte."""
    keys, values = (
        made_codec("identity", head_dim, b, r) for b, r in zip(bits, ROLES, strict=True)
    )
    numbers = f"{bits[0]}, {bits[1]}, {head_dim}, {head_dim}"
    plain = f"int(AttendPlain<{numbers}, {8 * max(operands, 1)}>::SHARED_BYTES)"
    packed = f"int(AttendShape<{numbers}, {operands}>::SHARED_BYTES)"
    body = f"sizes[0] = {f'max({packed}, {plain})' if operands else plain};"
    header = cuda._attend_header()
    kernel = MLXKernel("sizes", [], ["sizes"], body, header)
    (found,) = kernel(
        inputs=[],
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
    )
    assert found.item() == cuda.shared_bytes(keys, values, operands)


@needs_emulator
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("head_dim", [80, 256])
def test_shared_memory_of_the_other_kernels(head_dim, rows):
    files = (f"attend_{name}.cu" for name in ("query", "merge"))
    header = cuda._header(*(source.read(f"cuda_kernels/{name}") for name in files))
    body = "".join(
        f"sizes[{i}] = 4 * {name}Shape<{head_dim}, {rows}, {cuda.ATTEND_THREADS}>::ALL;"
        for i, name in enumerate(("Query", "Merge"))
    )
    (found,) = MLXKernel("sizes", [], ["sizes"], body, header)(
        inputs=[],
        output_shapes=[(2,)],
        output_dtypes=[mx.int32],
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
    )
    sizes = (cuda.query_shared_bytes, cuda.merge_shared_bytes)
    assert found.tolist() == [size(head_dim, rows) for size in sizes]


@pytest.mark.parametrize("runner", ["mlx_cuda"], indirect=True)
def test_numbers_that_stay_are_made_once(runner, monkeypatch):
    """The GPU waits for each array that the host makes, and would at every layer and token."""
    given, kernel = [], cuda._parts_kernel

    def recorded(*arguments):
        return lambda **call: given.append(call["inputs"]) or kernel(*arguments)(**call)

    monkeypatch.setattr(cuda, "_parts_kernel", recorded)
    posed = problem(Case(dtype="f16", mask="causal"))
    later = [replace(view, tokens=view.tokens - 1) for view in posed.views]
    for views in (posed.views, posed.views, later):
        replace(posed, views=views).run(runner)
    names = ("mask", "lengths", "numbers", "scale")
    same = [[a is b for a, b in zip(given[0][-4:], call[-4:], strict=True)] for call in given[1:]]
    assert dict(zip(names, same[0], strict=True)) == dict.fromkeys(names, True)
    assert dict(zip(names, same[1], strict=True)) == {
        **dict.fromkeys(names, True),
        "lengths": False,
    }


@needs_emulator
def test_a_sequence_is_cut_as_the_launcher_cuts_it():
    codecs = [made_codec("identity", 64, 4, role) for role in ROLES]
    made = cuda_calls.module("attend", *codecs, multiprocessors=cuda.MULTIPROCESSORS)
    lengths = itertools.product((0, 1, 100, 131, 700, 9000), (0, 64, 4096, 32768, 131072, 10**6))
    for (exact, packed), kv_heads, group, dtype in itertools.product(
        lengths, (1, 3, 8, 64, 500), (1, 16, 40), DTYPES.values()
    ):
        call = cuda_calls.AttendArguments(
            dtype=cuda_calls.DTYPES[dtype],
            **{"batch": 1, "heads": kv_heads * group, "kv_heads": kv_heads, "length": 1},
            **{"packed_tokens": packed, "exact_tokens": exact},
        )
        floats = made.number("rotormlx_attend_workspace", call) // 4
        operands = 0 if dtype == mx.float32 else 1 if group <= 8 else 2
        tiles = -(-group // (8 * max(operands, 1)))
        parts = cuda.cut_both(exact, packed, operands, kv_heads * tiles)
        number = sum(part.number for part in parts)
        assert floats == kv_heads * group * (64 + number * (64 + 2))
        assert number <= cuda.MAX_PARTS
        for part, tokens in zip(parts, (exact, packed), strict=True):
            # None is empty, and none is left out.
            assert tokens <= part.number * part.tokens < tokens + max(part.tokens, 1)


def test_exact_parts_take_turns_with_packed_ones_where_that_is_shorter():
    def numbers(packed, thread_blocks):
        return tuple(p.number for p in cuda.cut_both(100, packed, 1, thread_blocks))

    # 396 thread blocks run at once. Few long parts: all of them are for packed tokens, and a few
    # begin when the exact part, which is short, has ended.
    assert numbers(32768, 64) == (1, 6)
    # Short parts, or many: both kinds run beside each other.
    assert numbers(4096, 64) == (1, 4)
    assert numbers(4096, 8) == (4, 16)
    assert numbers(32768, 8) == (1, 43)


def test_it_is_refused_without_cuda(monkeypatch):
    if MLX_CUDA.on_device:
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
