"""What only the backend of MLX's own CUDA build has: sizes that its launch code must know, and when
it is chosen.
"""

import re
from dataclasses import replace

import mlx.core as mx
import pytest

from rotormlx.kernels import cuda_plan, source
from rotormlx.mlx import backends
from rotormlx.mlx.backends import cuda_text
from tests.emulator import missing
from tests.emulator.cuda import MLXKernel
from tests.support.attend_cases import Case, problem
from tests.support.runners import MLX_CUDA

needs_emulator = pytest.mark.skipif(missing() is not None, reason=str(missing()))


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


# Words and numbers, strings, and runs of signs that C++ reads as one.
TOKEN = re.compile(r'\w+|"(?:[^"\\]|\\.)*"|[-+*/&|<>=!:]+|\S')


def test_a_minified_text_has_the_same_tokens():
    folders = ("cuda_kernels", "shared_kernels")
    paths = [path for name in folders for path in source.folder(name).iterdir()]
    assert len(paths) > 10
    for path in paths:
        text = re.sub(r"//.*$", "", path.read_text(), flags=re.MULTILINE)
        assert TOKEN.findall(cuda_text.minified(text)) == TOKEN.findall(text), path.name
    assert cuda_text.minified("a - -b; // c\n\n  x = &y;") == "a- -b;\nx= &y;\n"


def test_the_text_of_a_step_is_short():
    """MLX hashes it at every call."""
    lengths = {"attend": len(cuda_text.attend_header())}
    for name in ("query", "merge"):
        lengths[name] = len(cuda_text.header_of(source.read(f"cuda_kernels/attend_{name}.cu")))
    budget = {"attend": 57_500, "query": 14_500, "merge": 18_500}
    assert {name: n for name, n in lengths.items() if n > budget[name]} == {}


@pytest.mark.parametrize("runner", ["mlx_cuda"], indirect=True)
def test_numbers_that_stay_are_made_once(runner, monkeypatch):
    """The GPU waits for each array that the host makes, and would at every layer and token."""
    given, kernel = [], cuda_text.parts_kernel

    def recorded(*arguments):
        return lambda **call: given.append(call["inputs"]) or kernel(*arguments)(**call)

    monkeypatch.setattr(cuda_text, "parts_kernel", recorded)
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
