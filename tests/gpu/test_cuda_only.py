"""What only the launchers of CUDA have: their arguments, shared memory and devices of a size."""

import ctypes
import itertools
import re
import subprocess
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import codebook
from rotormlx.codec.format import KEY, codec
from rotormlx.config import RotorConfig
from rotormlx.kernels import cuda_plan
from rotormlx.kernels.source import cells_text, cuda_header
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.backends import cuda_text
from tests.emulator import missing
from tests.emulator.cuda import MLXKernel
from tests.support import cuda_calls
from tests.support.attend_cases import Case, Launch, problem
from tests.support.runners import CUDA

needs_emulator = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@needs_emulator
def test_arguments_are_plain_c(tmp_path):
    """launch.h is C, and lays its structures out as the tests' twins of them."""
    twins = {
        "rotormlx_packed": cuda_calls.PackedArguments,
        "rotormlx_encode_arguments": cuda_calls.EncodeArguments,
        "rotormlx_decode_arguments": cuda_calls.DecodeArguments,
        "rotormlx_store_arguments": cuda_calls.StoreArguments,
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


def test_cells_find_what_the_boundaries_say():
    """At 8 bits: for each boundary, the float32 before it, and sizes from 0 to far behind them."""
    text = cells_text(8)
    words = re.findall(r"\{0x(\w+)u, (\d+)u\}", text)
    limits = np.array([int(limit, 16) for limit, _ in words], np.uint32).view(np.float32)
    below = np.array([int(count) for _, count in words])
    boundaries = codebook.boundaries(8)
    before = np.nextafter(boundaries, np.float32(0))
    sizes = np.concatenate([boundaries, before, np.linspace(0, 20, 10_001, dtype=np.float32)])

    # As the kernel does: 2^23 is added in float32.
    last = np.float32((len(words) - 1) / 64)
    shifted = np.minimum(sizes, last) * np.float32(64) + np.float32(2**23)
    cell = shifted.view(np.uint32) - 0x4B000000
    found = below[cell] + (sizes >= limits[cell])
    assert np.array_equal(found, np.searchsorted(boundaries, sizes, side="right"))


@needs_emulator
@pytest.mark.parametrize("bits", codebook.BITS)
def test_lanes_that_are_served_together_meet_no_bank_twice(bits):
    """Of shared memory: 8 neighbouring lanes where each moves 16 bytes, 16 where it moves 8."""
    body = f"""
      using Packed = AttendPacked<{bits}, {bits}, 128, 128, 1>;
      const int lane = int(threadIdx.x), group = lane / 4, quad_lane = lane % 4;
      copied[lane] = Packed::place_of_words(lane % 8, lane / 8);
      taken[lane] = Packed::place_of_words(group, quad_lane);
      for (int step = 0; step < 2; ++step) {{
        const int chunk = Chunks<{bits}, BLOCK>::chunk(step, quad_lane);
        read[32 * step + lane] = 8 * group + Packed::place_of_weights(group, chunk);
        for (int r = 0; r < 2; ++r) {{
          const int row = 2 * quad_lane + r;
          const int place = 8 * row + Packed::place_of_weights(row, 4 * step + group / 2);
          written[32 * (2 * step + r) + lane] = 2 * place + group % 2;
        }}
      }}
    """
    kernel = MLXKernel(
        "places", [], ["copied", "taken", "read", "written"], body, cuda_text.attend_header()
    )
    *of_sixteen_bytes, of_eight = kernel(
        inputs=[],
        output_shapes=[(32,), (32,), (64,), (128,)],
        output_dtypes=[mx.int32] * 4,
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    assert np.array_equal(*(np.sort(places) for places in of_sixteen_bytes[:2]))
    for places in of_sixteen_bytes:
        assert all(len(set(lanes)) == 8 for lanes in np.array(places).reshape(-1, 8) % 8)
    assert all(len(set(lanes)) == 16 for lanes in np.array(of_eight).reshape(-1, 16) % 16)


@needs_emulator
@pytest.mark.parametrize("kilobytes", [99, 120, 163])
def test_devices_with_less_shared_memory(kilobytes, monkeypatch):
    """Each takes the kernel that fits: the one in float32, that of 8 rows, that of 16."""
    case = Case(dims=(256, 256), bits=(8, 8), dtype="f16", mask="causal", length=9, batch=1)
    posed = problem(case)
    made = CUDA.attend_module(*(view.codec for view in posed.views), Launch())
    monkeypatch.setattr(made, "shared_memory", 1024 * kilobytes)
    posed.check(CUDA)
    # In float32 a kernel rotates the queries before.
    kernel_bytes = made.reports[1 if kilobytes == 99 else 0].threadgroup_bytes
    least = {99: 0, 120: 99, 163: 120}[kilobytes]
    assert 1024 * least < kernel_bytes <= 1024 * kilobytes


@needs_emulator
@pytest.mark.parametrize("field", [name for name, _ in cuda_calls.AttendPlan._fields_])
def test_the_launcher_refuses_a_plan_that_does_not_fit(field, monkeypatch):
    """A number that is one off launches nothing."""
    planned = cuda_calls.plan_of

    def one_off(*call):
        plan = planned(*call)
        setattr(plan, field, getattr(plan, field) + 1)
        return plan

    monkeypatch.setattr(cuda_calls, "plan_of", one_off)
    posed = problem(Case(dims=(64, 64), dtype="f16", mask="causal", batch=1, kv_heads=1))
    with pytest.raises(RuntimeError, match="rotormlx_attend returned the CUDA error 1"):
        posed.run(CUDA)


@needs_emulator
@pytest.mark.parametrize(
    ("changes", "kernels"),
    [
        ({}, 1),
        ({"rotation": "hadamard", "channel_scale": "none"}, 1),
        ({"rotation": "identity", "channel_scale": "none"}, 1),
        ({"blocks": 0}, 1),
        ({"dtype": "f32"}, 3),
        ({"rotation": "dense", "channel_scale": "none"}, 3),
        ({"launch": Launch(shares_rows=True)}, 3),
        ({"launch": Launch(kernels=3)}, 3),
    ],
    ids=str,
)
def test_one_kernel_does_what_it_can(changes, kernels):
    """A matrix, many rows and float32 take three, and so does a call without counters."""
    posed = problem(replace(Case(dtype="f16", mask="causal", bits=(4, 3)), **changes))
    posed.check(CUDA)
    made = CUDA.attend_module(*(view.codec for view in posed.views), posed.case.launch)
    assert len(made.reports) == kernels


@needs_emulator
def test_counters_serve_call_after_call():
    """They are 0 again, whatever number of parts and of tiles a call has."""
    counters = np.zeros(cuda_plan.MANY_ROWS, np.int32)
    for length, multiprocessors in ((1, 50), (17, 50), (1, 1), (1, 50)):
        posed = problem(
            Case(dtype="f16", bits=(4, 3), mask="causal", batch=1, length=length, blocks=30)
        )
        made = CUDA.attend_module(
            *(view.codec for view in posed.views), Launch(multiprocessors=multiprocessors)
        )
        call = AttendCall(posed.queries, *posed.views, **posed.options)
        output = cuda_calls.attend(call, made=made, counters=counters)
        assert posed.is_right(output)
        assert len(made.reports) == 1
        assert not counters.any()


@needs_emulator
@pytest.mark.parametrize("mask", ["bool", "additive"])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_tokens_behind_the_last_column_of_a_mask_are_hidden(mask, dtype):
    """The host knows no lengths; the emulator forbids reads behind a mask's end."""
    posed = problem(Case(mask=mask, dtype=dtype, length=9, batch=1, kv_heads=1))
    whole = posed.options["mask"]
    for columns in (2, posed.case.sink + 70, posed.case.tokens - 5):
        short = {**posed.options, "mask": whole[..., :columns]}
        hidden = mx.array(False if whole.dtype == mx.bool_ else -np.inf, whole.dtype)
        visible = mx.arange(whole.shape[-1]) < columns
        padded = {**posed.options, "mask": mx.where(visible, whole, hidden)}
        outputs = [replace(posed, options=options).run(CUDA) for options in (short, padded)]
        assert mx.array_equal(*outputs)


@needs_emulator
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_lengths_beyond_the_buffers_are_cut(dtype):
    """No length on the device makes a kernel read what is not there."""
    posed = problem(Case(dtype=dtype, mask="none", batch=1, kv_heads=1))
    packed, tokens = posed.case.packed_tokens, posed.case.tokens
    right = posed.run(CUDA)
    for lengths in ((packed, tokens + 7), (packed + 64, tokens + 64), (2**30, 2**31 - 1)):
        assert mx.array_equal(posed.run(CUDA, lengths=[lengths]), right)
    # Negative ones count as none.
    assert not posed.run(CUDA, lengths=[(-64, -1)]).any()
    exact = tokens - packed
    of_exact = [posed.run(CUDA, lengths=[lengths]) for lengths in ((0, exact), (-1, exact))]
    assert mx.array_equal(*of_exact)
