"""The binding of the CUDA kernels, compiled with the C++ compiler around launchers that write down
what they were given.
"""

import ctypes
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rotormlx.codec.format import BLOCK, Codec, Packed, codec
from rotormlx.codec.rotation import calibrated
from rotormlx.config import RotorConfig
from rotormlx.kernels.cuda_plan import MANY_ROWS, Device, Shape, attend_plan
from rotormlx.kernels.source import coefficients
from rotormlx.torch import build, cuda, torch_ops
from rotormlx.torch.build import Configuration
from rotormlx.torch.torch_ops import AttendCall, KVView
from tests.support.cuda_calls import (
    AttendArguments,
    AttendPlan,
    DecodeArguments,
    EncodeArguments,
    StoreArguments,
)

# Compiling takes ten seconds.
pytestmark = pytest.mark.slow

CHOSEN = Configuration("cascade", 64, 80, 4, 3, "sm_90a")
CONFIG = RotorConfig(4, 3)
B, K, H, L, N, LAYER = 2, 3, 6, 5, 4, 1
DEVICE = Device(108, 163 * 1024)


# Launchers that keep a copy of what they were given; attend needs 1000 bytes of workspace.
STUB = """
#include <cstring>
#include "launch.h"
extern "C" {
rotormlx_encode_arguments last_encode;
rotormlx_decode_arguments last_decode;
rotormlx_store_arguments last_store;
rotormlx_attend_arguments last_attend;
rotormlx_attend_plan last_plan;
void* last_stream;
int answer;
int rotormlx_encode(const rotormlx_encode_arguments* a, void* s) {
  last_encode = *a;
  last_stream = s;
  return answer;
}
int rotormlx_decode(const rotormlx_decode_arguments* a, void* s) {
  last_decode = *a;
  last_stream = s;
  return answer;
}
int rotormlx_store(const rotormlx_store_arguments* a, void* s) {
  last_store = *a;
  last_stream = s;
  return answer;
}
size_t rotormlx_attend_workspace(const rotormlx_attend_arguments*, const rotormlx_attend_plan*) {
  return 1000;
}
int rotormlx_attend(const rotormlx_attend_arguments* a, const rotormlx_attend_plan* p, void* s) {
  last_attend = *a;
  last_plan = *p;
  last_stream = s;
  std::memset(a->workspace, 1, 1000);
  return answer;
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """binding.cpp around the stub, loaded; ctypes reads what it kept."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("binding")
    (folder / "stub.cpp").write_text(STUB)
    kernels = build.folder("cuda_kernels")
    command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O0", "-w"]
    command += [flag for flag in CHOSEN.cpp_flags() if flag.startswith("-D")]
    command += [f"-I{path}" for path in (kernels, *build.cpp_extension.include_paths())]
    command += [str(kernels / "binding.cpp"), str(folder / "stub.cpp"), "-o", str(folder / "b.so")]
    command += [f"-L{path}" for path in build.cpp_extension.library_paths()]
    command += ["-lc10", "-ltorch_cpu", "-ltorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(str(folder / "b.so"))
    return ctypes.CDLL(str(folder / "b.so"))


@pytest.fixture
def kernels(library, monkeypatch):
    """The CUDA operators on tensors of the host, with the stub for kernels."""
    monkeypatch.setattr(build, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(build, "build", lambda configuration: None)
    monkeypatch.setattr(cuda, "_loaded", {})
    monkeypatch.setattr(cuda, "_on", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "_stream", lambda device: 77)
    monkeypatch.setattr(cuda, "_device", lambda device: DEVICE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda._can_compile.cache_clear()
    # As in a model, where attention comes first: encode and decode then take the same library.
    pair = (
        codec(CONFIG, 64, layer=LAYER, role="key"),
        codec(CONFIG, 80, layer=LAYER, role="value"),
    )
    cuda._operators(*pair, torch.device("cpu"))
    assert list(cuda._loaded) == [CHOSEN]
    yield library
    assert list(cuda._loaded) == [CHOSEN]
    cuda._can_compile.cache_clear()


def kept(library, name, kind):
    assert ctypes.c_void_p.in_dll(library, "last_stream").value == 77
    return kind.in_dll(library, f"last_{name}")


def strided(shape, dtype=torch.float32, seed=0):
    """Numbers with room behind the third axis, as a cache's buffers have it."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn((*shape[:2], shape[2] + 2, *shape[3:]), generator=generator)
    return whole.to(dtype)[:, :, : shape[2]]


def is_array(pointer, steps, x):
    return pointer == x.data_ptr() and list(steps) == list(x.stride()[: len(steps)])


def numbers_at(pointer, shape):
    """The float32 numbers that a pointer points to."""
    count = int(np.prod(shape))
    array = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * count)).contents
    return np.array(array, np.float32).reshape(shape)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_encode_fills_its_structure(kernels, role, dtype):
    chosen = codec(CONFIG, 64 if role == "key" else 80, layer=LAYER, role=role)
    x = strided((B, K, N * BLOCK, chosen.head_dim), dtype)
    scale = torch.rand(K, chosen.head_dim)
    packed = cuda.encode(x, chosen, channel_scale=scale)
    a = kept(kernels, "encode", EncodeArguments)
    assert (a.role, a.dtype) == (
        role == "value",
        [torch.float16, torch.bfloat16, torch.float32].index(dtype),
    )
    assert (a.batch, a.kv_heads, a.blocks, a.given_centres) == (B, K, N, 0)
    assert is_array(a.x, a.x_strides, x)
    table = coefficients(chosen.rotation)
    assert np.array_equal(numbers_at(a.coefficients, table.shape), table)
    assert (a.coefficients_stride, a.channel_scale) == (0, scale.data_ptr())
    assert packed.words.shape == (B, K, N, *chosen.words_shape)
    assert is_array(a.packed.words, a.packed.words_strides, packed.words)
    assert is_array(a.packed.scales, a.packed.scales_strides, packed.scales)
    assert (a.start, a.state) == (0, None)
    if role == "value":
        assert packed.centres is a.packed.centres is None
        state = torch.zeros(B, K, N, 80, dtype=torch.int32)
        cuda.encode(x, chosen, start=21, state=state)
        a = kept(kernels, "encode", EncodeArguments)
        assert (a.start, a.state) == (21, state.data_ptr())
        return
    assert is_array(a.packed.centres, a.packed.centres_strides, packed.centres)
    centres = torch.rand(B, K, N, 64).half()
    cuda.encode(x, chosen, centres=centres)
    a = kept(kernels, "encode", EncodeArguments)
    assert (a.given_centres, a.channel_scale) == (1, None)
    assert is_array(a.packed.centres, a.packed.centres_strides, centres)


def test_channel_scales_of_batch_rows_are_told_by_their_strides(kernels):
    chosen = codec(CONFIG, 64, layer=LAYER, role="key")
    for shape, stride in (((K, 64), 0), ((B, K, 64), K * 64)):
        scale = torch.rand(shape)
        cuda.encode(strided((B, K, N * BLOCK, 64)), chosen, channel_scale=scale)
        a = kept(kernels, "encode", EncodeArguments)
        assert (a.channel_scale, a.channel_scale_stride) == (scale.data_ptr(), stride)
        cuda.decode(packed_like(chosen), chosen, channel_scale=scale, dtype=torch.float16)
        a = kept(kernels, "decode", DecodeArguments)
        assert (a.channel_scale, a.channel_scale_stride) == (scale.data_ptr(), stride)
    query, lengths, *views = attend_inputs()
    for rows, strides in (((), (0, 0)), ((B,), (K * 64, K * 80))):
        views = [replace(v, channel_scale=torch.rand(*rows, K, v.codec.head_dim)) for v in views]
        cuda.attend(AttendCall(query, lengths, *views, **FACTS))
        a = kept(kernels, "attend", AttendArguments)
        assert (a.key_channel_scale_stride, a.value_channel_scale_stride) == strides


def packed_like(chosen):
    words = strided((B, K, N, *chosen.words_shape)).int()
    scales = strided((B, K, N, BLOCK), torch.float16)
    centres = strided((B, K, N, chosen.head_dim), torch.float16) if chosen.role == "key" else None
    return Packed(words, scales, centres)


def test_decode_fills_its_structure(kernels):
    chosen = codec(CONFIG, 80, layer=LAYER, role="value")
    packed = packed_like(chosen)
    out = cuda.decode(packed, chosen, dtype=torch.bfloat16)
    a = kept(kernels, "decode", DecodeArguments)
    assert (a.role, a.dtype, a.batch, a.kv_heads, a.blocks) == (1, 1, B, K, N)
    assert is_array(a.packed.words, a.packed.words_strides, packed.words)
    assert is_array(a.packed.scales, a.packed.scales_strides, packed.scales)
    assert (a.packed.centres, a.channel_scale, a.coefficients_stride) == (None, None, 0)
    assert np.array_equal(
        numbers_at(a.coefficients, (8,)), coefficients(chosen.rotation, back=True)[:8]
    )
    assert out.shape == (B, K, N * BLOCK, 80)
    assert out.dtype == torch.bfloat16
    assert a.out == out.data_ptr()


def attend_inputs(dtype=torch.bfloat16):
    keys, values = (
        KVView(c, strided((B, K, 70, c.head_dim), dtype), packed_like(c), torch.rand(K, c.head_dim))
        for c in (codec(CONFIG, d, layer=LAYER, role=r) for r, d in (("key", 64), ("value", 80)))
    )
    query = strided((B, L, H, 64), dtype).transpose(1, 2)
    return query, torch.ones(B, 2, dtype=torch.int32), keys, values


def store_inputs(dtype=torch.bfloat16):
    """Tensors of the operator ``store``, by name and in its order."""
    keys, values = (codec(CONFIG, d, layer=LAYER, role=r) for r, d in (("key", 64), ("value", 80)))
    made = {f"new_{r}s": strided((B, K, 3, d), dtype) for r, d in (("key", 64), ("value", 80))}
    made |= {"lengths": torch.ones(B, 2).int(), "counter": torch.zeros(B).int()}
    for chosen in (keys, values):
        made[f"{chosen.role}_exact"] = strided((B, K, 140, chosen.head_dim), dtype)
        for name, part in packed_like(chosen)._asdict().items():
            if part is not None:
                made[f"{chosen.role}_{name}"] = part
        made[f"{chosen.role}_channel_scale"] = torch.rand(B, K, chosen.head_dim)
    for chosen in (keys, values):
        made[f"{chosen.role}_coefficients"] = torch.from_numpy(coefficients(chosen.rotation).copy())
    return made


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_store_fills_its_structure(kernels, dtype):
    x = store_inputs(dtype)
    operator = cuda._loaded[CHOSEN].store
    assert operator(*x.values(), 4, 64, True, 77) is None
    a = kept(kernels, "store", StoreArguments)
    assert a.dtype == [torch.float16, torch.bfloat16, torch.float32].index(dtype)
    assert (a.batch, a.kv_heads, a.length, a.blocks, a.capacity) == (B, K, 3, N, 140)
    assert (a.sink, a.window, a.own_scale) == (4, 64, 1)
    assert (a.lengths, a.counter) == (x["lengths"].data_ptr(), x["counter"].data_ptr())
    for role, packed in (("key", a.keys), ("value", a.values)):
        for name, array in ((f"new_{role}s", f"new_{role}s"), (f"exact_{role}s", f"{role}_exact")):
            assert is_array(getattr(a, name), getattr(a, f"{name}_strides"), x[array])
        assert is_array(packed.words, packed.words_strides, x[f"{role}_words"])
        assert is_array(packed.scales, packed.scales_strides, x[f"{role}_scales"])
        for name in ("channel_scale", "coefficients"):
            assert getattr(a, f"{role}_{name}") == x[f"{role}_{name}"].data_ptr()
            assert getattr(a, f"{role}_coefficients_stride") == 0
    assert is_array(a.keys.centres, a.keys.centres_strides, x["key_centres"])
    assert a.values.centres is None
    assert (a.key_channel_scale_stride, a.value_channel_scale_stride) == (K * 64, K * 80)


def test_store_takes_what_there_is_of_scales_and_matrices(kernels):
    x = store_inputs() | {"key_channel_scale": None, "value_channel_scale": torch.rand(K, 80)}
    x |= {f"{r}_coefficients": torch.rand(K, d, d) for r, d in (("key", 64), ("value", 80))}
    cuda._loaded[CHOSEN].store(*x.values(), 0, 0, False, 77)
    a = kept(kernels, "store", StoreArguments)
    assert (a.sink, a.window, a.own_scale) == (0, 0, 0)
    assert (a.key_channel_scale, a.key_channel_scale_stride) == (None, 0)
    assert a.value_channel_scale == x["value_channel_scale"].data_ptr()
    assert a.value_channel_scale_stride == 0
    assert (a.key_coefficients_stride, a.value_coefficients_stride) == (64**2, 80**2)


def test_store_says_what_it_changes(kernels):
    arguments = cuda._loaded[CHOSEN].store.default._schema.arguments
    changed = [x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write]
    kept_as_they_are = {"new_keys", "new_values", "key_coefficients", "value_coefficients"}
    assert changed == [name for name in store_inputs() if name not in kept_as_they_are]


FACTS = {"sink": 4, "scale": 0.125, "causal": True, "mask": None, "sink_logits": None}


def test_attend_fills_its_structure(kernels):
    query, lengths, keys, values = attend_inputs()
    logits = torch.rand(H)
    out = cuda.attend(AttendCall(query, lengths, keys, values, **{**FACTS, "sink_logits": logits}))
    a = kept(kernels, "attend", AttendArguments)
    assert (a.dtype, a.batch, a.heads, a.kv_heads, a.length, a.sink) == (1, B, H, K, L, 4)
    # Capacities: what counts is in the lengths, on the device.
    assert (a.packed_tokens, a.exact_tokens) == (N * BLOCK, 70)
    assert (a.lengths, a.scale, a.sink_logits) == (lengths.data_ptr(), 0.125, logits.data_ptr())
    assert is_array(a.q, a.q_strides, query)
    for source, packed, exact, steps in (
        (keys, a.keys, a.exact_keys, a.exact_keys_strides),
        (values, a.values, a.exact_values, a.exact_values_strides),
    ):
        assert is_array(packed.words, packed.words_strides, source.packed.words)
        assert is_array(packed.scales, packed.scales_strides, source.packed.scales)
        assert is_array(exact, steps, source.exact)
    assert is_array(a.keys.centres, a.keys.centres_strides, keys.packed.centres)
    assert a.values.centres is None
    assert a.key_channel_scale == keys.channel_scale.data_ptr()
    assert a.value_channel_scale == values.channel_scale.data_ptr()
    # A query, a row, times the first is C^-T q; a rotated row times the second is turned back.
    for pointer, matrix in (
        (a.key_matrix, np.linalg.inv(keys.codec.rotation.matrix)),
        (a.value_matrix, np.linalg.inv(values.codec.rotation.matrix).T),
    ):
        # float32 of numbers up to 1.
        assert np.allclose(numbers_at(pointer, matrix.shape), matrix, rtol=0, atol=1e-6)
    assert (a.key_matrix_stride, a.value_matrix_stride) == (0, 0)
    for pointer, table in (
        (a.key_coefficients, coefficients(keys.codec.rotation)),
        (a.value_coefficients, coefficients(values.codec.rotation)),
    ):
        assert np.array_equal(numbers_at(pointer, table.shape), table)
    assert (a.mask_kind, a.mask) == (1, None)
    assert (out.shape, out.dtype) == ((B, H, L, 80), torch.bfloat16)
    assert a.out == out.data_ptr()
    # The plan of what the buffers hold, for this device.
    shape = Shape(B, H, K, L, 64, 80, *(4, 3), 70, N * BLOCK, is_float32=False, has_stages=True)
    plan = AttendPlan.in_dll(kernels, "last_plan")
    numbers = tuple(getattr(plan, name) for name, _ in plan._fields_)
    assert numbers == attend_plan(shape, DEVICE).numbers


def test_calls_of_a_stream_share_counters(kernels, monkeypatch):
    """Calls in a graph have their own, and three kernels take none."""
    call = AttendCall(*attend_inputs(), **FACTS)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    made, zeros = [], cuda._zeros
    monkeypatch.setattr(cuda, "_zeros", lambda device: made.append(zeros(device)) or made[-1])

    def taken(stream):
        monkeypatch.setattr(cuda, "_stream", lambda device: stream)
        cuda.attend(call)
        return AttendArguments.in_dll(kernels, "last_attend").counters

    cuda._kept_counters.cache_clear()
    found = [taken(stream) for stream in (77, 77, 78)]
    assert found == [made[0].data_ptr(), made[0].data_ptr(), made[1].data_ptr()]
    capturing = True
    found += [taken(77), taken(77)]
    assert found[3:] == [x.data_ptr() for x in made[2:]]
    assert len(set(found)) == len(made) == 4
    assert all(x.dtype == torch.int32 and x.tolist() == [0] * MANY_ROWS for x in made)
    for query in (call.query.float(), call.query[:, :, :1].expand(-1, -1, 700, -1)):
        call = call._replace(query=query)
        assert taken(77) is None
        assert AttendPlan.in_dll(kernels, "last_plan").one_kernel == 0
    cuda._kept_counters.cache_clear()


def test_matrices_of_each_head_are_told_by_their_strides(kernels, monkeypatch):
    rng = np.random.default_rng(0)
    made = [
        Codec(role, bits, calibrated(rng.normal(size=(K, d, d))))
        for role, bits, d in (("key", 4, 64), ("value", 3, 80))
    ]
    query, lengths, *views = attend_inputs()
    views = [replace(view, codec=chosen) for view, chosen in zip(views, made, strict=True)]
    # They take the kernels of one matrix for all heads.
    dense = replace(CHOSEN, rotation="dense")
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_loaded", {dense: cuda._loaded[CHOSEN]})
        for chosen in made:
            cuda.encode(strided((B, K, N * BLOCK, chosen.head_dim)), chosen)
            a = kept(kernels, "encode", EncodeArguments)
            table = coefficients(chosen.rotation)
            assert np.array_equal(numbers_at(a.coefficients, table.shape), table)
            assert a.coefficients_stride == chosen.head_dim**2
            cuda.decode(packed_like(chosen), chosen, dtype=torch.float16)
            a = kept(kernels, "decode", DecodeArguments)
            table = coefficients(chosen.rotation, back=True)
            assert np.array_equal(numbers_at(a.coefficients, table.shape), table)
            assert a.coefficients_stride == chosen.head_dim**2
        cuda.attend(AttendCall(query, lengths, *views, **FACTS))
        assert list(cuda._loaded) == [dense]
    a = kept(kernels, "attend", AttendArguments)
    assert a.counters is None
    assert (a.key_matrix_stride, a.value_matrix_stride) == (64**2, 80**2)
    for pointer, matrix in (
        (a.key_matrix, np.linalg.inv(made[0].rotation.matrix)),
        (a.value_matrix, np.linalg.inv(made[1].rotation.matrix).swapaxes(1, 2)),
    ):
        assert np.allclose(numbers_at(pointer, matrix.shape), matrix, rtol=1e-6, atol=1e-6)


def test_a_plan_is_for_the_device_of_the_tensors(monkeypatch):
    facts = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert cuda._device.__wrapped__(torch.device("cuda:1")) == (132, 227 * 1024)
    del facts.shared_memory_per_block_optin
    assert cuda._device.__wrapped__(torch.device("cuda:1")) == (132, 48 * 1024)


def test_attend_passes_masks_as_they_lie(kernels):
    query, lengths, keys, values = attend_inputs()
    tokens = 300
    for mask, kind, steps in (
        (None, 0, [0, 0, 0, 0]),
        (torch.ones(B, 1, L, tokens).bool(), 2, [L * tokens, 0, tokens, 1]),
        (torch.ones(tokens).half(), 3, [0, 0, 0, 1]),
        (torch.ones(1, H, L, 1), 3, [0, L, 1, 0]),
    ):
        cuda.attend(
            AttendCall(query, lengths, keys, values, **{**FACTS, "causal": False, "mask": mask})
        )
        a = kept(kernels, "attend", AttendArguments)
        assert (a.mask_kind, list(a.mask_strides)) == (kind, steps)
        # One column is for all tokens that the buffers can hold.
        if mask is not None:
            assert a.mask_columns == (tokens if steps[3] else N * BLOCK + 70)
        assert (a.mask is None) == (mask is None)


def test_attend_without_packed_blocks(kernels):
    query, lengths, keys, values = attend_inputs()
    keys, values = (replace(x, packed=None, channel_scale=None) for x in (keys, values))
    cuda.attend(AttendCall(query, lengths, keys, values, **FACTS))
    a = kept(kernels, "attend", AttendArguments)
    assert (a.packed_tokens, a.exact_tokens) == (0, 70)
    assert a.keys.words is a.values.words is a.keys.centres is a.key_channel_scale is None


def test_tensors_that_the_kernels_cannot_load_are_copied(kernels):
    """Rows that do not begin at multiples of 16 bytes, words that do not lie side by side."""
    query, lengths, keys, values = attend_inputs()
    moved = torch.nn.functional.pad(query, (1, 0))[..., 1:]
    words = torch.nn.functional.pad(keys.packed.words, (0, 4))[..., :-4]
    keys = replace(keys, packed=keys.packed._replace(words=words))
    cuda.attend(AttendCall(moved, lengths, keys, values, **FACTS))
    a = kept(kernels, "attend", AttendArguments)
    assert a.q != moved.data_ptr()
    assert list(a.q_strides) == [H * L * 64, L * 64, 64]
    assert a.keys.words != words.data_ptr()
    rows, lanes = words.shape[-2:]
    assert a.keys.words_strides[2] == rows * lanes


def test_a_view_is_prepared_once_where_nothing_of_it_is_copied(kernels):
    """What is copied would be out of date with the next token."""
    query, lengths, keys, values = attend_inputs()
    wide = keys.exact.float()
    for asked, dtype in ((query, torch.bfloat16), (query.float(), torch.float32), (query, None)):
        exact = wide if dtype is None else keys.exact
        view = keys if dtype is not None else replace(keys, exact=wide)
        for _ in range(2):
            cuda.attend(AttendCall(asked, lengths, view, values, **FACTS))
            a = kept(kernels, "attend", AttendArguments)
            assert (a.exact_keys == exact.data_ptr()) == (asked.dtype == exact.dtype)
            assert a.keys.words == keys.packed.words.data_ptr()
            assert a.exact_values_strides[2] == 80
        assert ("cuda" in view.prepared) == (dtype is not None)


def test_an_error_of_cuda_is_raised(kernels):
    answer = ctypes.c_int.in_dll(kernels, "answer")
    answer.value = 719
    try:
        with pytest.raises(RuntimeError, match=r"\[attend\] The CUDA kernel must .* error 719"):
            cuda.attend(AttendCall(*attend_inputs(), **FACTS))
    finally:
        answer.value = 0


def test_large_head_dims_take_torch_operations(kernels):
    chosen = codec(CONFIG, 320, layer=LAYER, role="value")
    x = torch.randn(1, 1, BLOCK, 320)
    assert torch.equal(cuda.encode(x, chosen).words, torch_ops.encode(x, chosen).words)


def test_strides_that_kernels_cannot_follow_are_copied():
    """On the meta device, since such a tensor takes gigabytes."""
    for stride, same in ((2**29 - 8, True), (2**29, False)):
        x = torch.empty_strided((1, 1, 2, 64), (8, 8, stride, 1), device="meta")
        assert (cuda._aligned(x) is x) == same
