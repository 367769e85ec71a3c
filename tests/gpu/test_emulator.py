"""The Metal kernel emulator: right kernels pass in every order, and every planted bug is caught."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.emulator import (
    EmulatedKernel,
    KernelError,
    Kind,
    compiling_ahead,
    execution_order,
    lint,
    metal_kernel,
    missing,
    run_text,
)
from tests.emulator.cuda import Buffers, CudaModule
from tests.support import progress

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
needs_clang = pytest.mark.skipif(
    shutil.which("clang-19") is None, reason="clang-19 is not installed"
)

ORDERS = [0, 1, 7]  # ascending, descending, random


@dataclass(frozen=True)
class Demo:
    """A kernel, a call of it, and what it must return."""

    source: str
    inputs: Sequence[mx.array | float]
    expected: Sequence[np.ndarray]
    dtypes: Sequence[mx.Dtype]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    header: str = ""
    template: Sequence[tuple[str, Any]] = ()
    tolerance: float = 0.0
    init_value: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def kernel(
        self, source: str | None = None, header: str | None = None, **options: Any
    ) -> EmulatedKernel:
        return metal_kernel(
            name="demo",
            input_names=[f"x{i}" for i in range(len(self.inputs))],
            output_names=[f"y{i}" for i in range(len(self.expected))],
            source=source or self.source,
            header=header or self.header,
            **(self.options | options),
        )

    def call(self, **changes: Any) -> dict[str, Any]:
        return {
            "inputs": self.inputs,
            "template": list(self.template),
            "grid": self.grid,
            "threadgroup": self.threadgroup,
            "output_shapes": [y.shape for y in self.expected],
            "output_dtypes": self.dtypes,
        } | changes

    def text(self, source: str | None = None, header: str | None = None) -> str:
        return self.kernel(source, header).metal_text(**self.call())


def normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    random = np.random.default_rng(sum(shape))
    return mx.array(random.normal(size=shape).astype(np.float32)).astype(dtype)


def as_float(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


# ---- right kernels


def row_sum(dtype: mx.Dtype = mx.float32) -> Demo:
    """Rows of a matrix, each summed by one threadgroup of 8 simdgroups."""
    x = normal(37, 1000, dtype=dtype)
    expected = as_float(x).sum(1)
    return Demo(
        header="constant float weights[2] = {0.0f, 1.0f};\n",
        source="""
            constexpr int S = 8;  // simdgroups in a threadgroup
            threadgroup float part[S];
            uint row = threadgroup_position_in_grid.y;
            uint n = x0_shape[1];
            uint lane = thread_index_in_simdgroup;
            float sum = 0;
            for (uint i = thread_index_in_threadgroup; i < n; i += 32 * S)
                sum += float(x0[row * n + i]) * weights[1];
            sum = simd_sum(sum);
            if (lane == 0) part[simdgroup_index_in_threadgroup] = sum;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (simdgroup_index_in_threadgroup == 0) {
                sum = simd_sum(lane < S ? part[lane] : 0.0f);
                if (lane == 0) y0[row] = T(sum);
            }
        """,
        inputs=[x],
        expected=[expected],
        dtypes=[dtype],
        grid=(256, 37, 1),
        threadgroup=(256, 1, 1),
        template=[("T", dtype)],
        # Half a unit in the last place of the result, and float32's error over 1000 terms.
        tolerance={mx.float32: 2e-5, mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype]
        * max(1.0, np.abs(expected).max()),
    )


def vectors() -> Demo:
    """Vector types, bit casts; a grid that ends within a threadgroup; short inputs."""
    x = normal(1003, 4, dtype=mx.float16)
    a = as_float(x)
    bits = (np.arange(1003) * 2654435761 % 2**32).astype(np.uint32)
    nibbles = (bits[:, None] >> np.arange(0, 32, 8)) & 15
    return Demo(
        source="""
            uint i = thread_position_in_grid.x;
            vec<half, 4> h = ((const device vec<half, 4>*)x0)[i];
            float size = as_type<float>(as_type<uint>(float(h.x)) & 0x7fffffffu);
            float4 v = float4(h.w, h.z, h.y, size);
            uint sum = uint(x3[2]);
            for (int j = 0; j < 4; j++) {
                v[j] *= x1;
                sum += (x2[i] >> (8 * j)) & 15u;
            }
            ((device float4*)y0)[i] = v;
            y1[i] = sum;
        """,
        inputs=[x, 0.5, mx.array(bits), mx.array([1, 2, 3], mx.int32)],
        expected=[
            0.5 * np.stack([a[:, 3], a[:, 2], a[:, 1], abs(a[:, 0])], 1),
            nibbles.sum(1).astype(np.uint32) + 3,
        ],
        dtypes=[mx.float32, mx.uint32],
        grid=(1003, 1, 1),
        threadgroup=(256, 1, 1),
    )


def small_types() -> Demo:
    """Elements of one and of eight bytes; Python numbers, an empty and a repeated input."""
    x = mx.arange(16).astype(mx.int8) - 8
    a = as_float(x)
    return Demo(
        source="""
            uint i = thread_position_in_grid.x;
            y0[i] = x0[i] > x1;
            y1[i] = -x3[i];
            y2[i] = x2 ? int64_t(x0[i]) << 33 : 0;
            if (x4_shape[0] > 0) y2[i] = int64_t(x4[0]);
        """,
        inputs=[x, 3, True, x, mx.zeros((0, 5))],
        expected=[a.reshape(4, 4) > 3, -a, a * 2.0**33],
        dtypes=[mx.bool_, mx.int8, mx.int64],
        grid=(16, 1, 1),
        threadgroup=(8, 1, 1),
    )


def math_functions() -> Demo:
    x = mx.array(np.linspace(0.1, 4.0, 64).astype(np.float32))
    a = as_float(x)
    columns = [np.exp(a), np.sqrt(a), a, a * a + 1, np.maximum(a, 2.0), np.minimum(a, 2.0)]
    columns += [np.clip(a, 1.0, 2.0), np.exp(-a)]
    return Demo(
        source="""
            uint i = thread_position_in_grid.x;
            float v = x0[i];
            device float* y = y0 + 8 * i;
            y[0] = exp(v); y[1] = sqrt(v); y[2] = fabs(-v); y[3] = fma(v, v, 1.0f);
            y[4] = max(v, 2.0f); y[5] = min(v, 2.0f); y[6] = clamp(v, 1.0f, 2.0f);
            y[7] = fast::exp(-v);
        """,
        inputs=[x],
        expected=[np.stack(columns, 1)],
        dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
        tolerance=2e-5,  # a few units in the last place of exp(4)
    )


def simdgroup_exchange() -> Demo:
    """Each simdgroup reverses its 32 values through threadgroup memory, twice, without a barrier
    of the whole threadgroup."""
    x = normal(256)
    reversed_ = as_float(x).reshape(8, 32)[:, ::-1].reshape(-1)
    return Demo(
        source="""
            threadgroup float row[4][32];
            uint i = thread_position_in_grid.x;
            uint lane = thread_index_in_simdgroup, s = simdgroup_index_in_threadgroup;
            row[s][lane] = x0[i];
            simdgroup_barrier(mem_flags::mem_threadgroup);
            float v = row[s][31 - lane];
            simdgroup_barrier(mem_flags::mem_threadgroup);
            row[s][lane] = 2.0f * v;
            y0[i] = row[s][lane];
        """,
        inputs=[x],
        expected=[2 * reversed_],
        dtypes=[mx.float32],
        grid=(256, 1, 1),
        threadgroup=(128, 1, 1),
    )


def device_exchange() -> Demo:
    """Threads of a threadgroup pass values through device memory."""
    x = normal(192)
    rotated = np.roll(as_float(x).reshape(3, 64), -1, axis=1).reshape(-1)
    return Demo(
        source="""
            uint i = thread_position_in_grid.x, j = thread_index_in_threadgroup;
            y0[i] = x0[i];
            threadgroup_barrier(mem_flags::mem_device);
            y1[i] = y0[i - j + (j + 1) % 64];
        """,
        inputs=[x],
        expected=[as_float(x), rotated],
        dtypes=[mx.float32, mx.float32],
        grid=(192, 1, 1),
        threadgroup=(64, 1, 1),
    )


def shuffles() -> Demo:
    x = normal(96)
    a = as_float(x).astype(np.float32).reshape(3, 32)
    lanes = np.arange(32)
    columns = [
        a[:, lanes ^ 5],
        np.repeat(a.max(1, keepdims=True), 32, 1),
        np.repeat((a > 2).any(1, keepdims=True), 32, 1),
    ]
    return Demo(
        source="""
            uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;
            float v = x0[i];
            device float* y = y0 + 3 * i;
            y[0] = simd_shuffle_xor(v, 5);
            y[1] = simd_max(v);
            y[2] = float(simd_any(v > 2.0f));
        """,
        inputs=[x],
        expected=[np.stack(columns, -1).reshape(96, 3)],
        dtypes=[mx.float32],
        grid=(96, 1, 1),
        threadgroup=(96, 1, 1),
    )


def quad_shuffles() -> Demo:
    """Lanes of a quad ask different lanes; only every other quad does at all."""
    x = normal(64)
    a = as_float(x).astype(np.float32)
    lanes = np.arange(64)
    asked = np.where(lanes // 4 % 2, lanes // 4 * 4 + (lanes * 7 // 3) % 4, lanes)
    return Demo(
        source="""
            uint i = thread_position_in_grid.x;
            float v = x0[i];
            if (i / 4 % 2 != 0) v = quad_shuffle(v, ushort(i * 7 / 3 % 4));
            y0[i] = v;
        """,
        inputs=[x],
        expected=[a[asked]],
        dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
    )


def wide_loads() -> Demo:
    """Four numbers in one load, as words, turned round."""
    x = normal(64)
    a = as_float(x).astype(np.float32)
    return Demo(
        source="""
            uint i = thread_position_in_grid.x;
            const uint4 words = *(const device uint4*)((const device uint*)x0 + 4 * i);
            for (uint j = 0; j < 4; ++j) y0[4 * i + j] = as_type<float>(words[3 - j]);
        """,
        inputs=[x],
        expected=[a.reshape(16, 4)[:, ::-1].reshape(64)],
        dtypes=[mx.float32],
        grid=(16, 1, 1),
        threadgroup=(16, 1, 1),
    )


def matrix_product() -> Demo:
    """A 16 x 16 product by four simdgroups, tiles staged in threadgroup memory, and the product of
    the last tiles alone."""
    a, b = normal(16, 24), normal(24, 16)
    left, right = as_float(a), as_float(b)
    return Demo(
        source="""
            threadgroup float left[16 * 8], right[8][16], turned[16 * 8];
            uint t = thread_index_in_threadgroup, s = simdgroup_index_in_threadgroup;
            uint row = s / 2 * 8, column = s % 2 * 8;
            simdgroup_matrix<float, 8, 8> l, r, last;
            auto sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            for (uint k = 0; k < 24; k += 8) {
                left[t] = x0[t / 8 * 24 + k + t % 8];
                right[t / 16][t % 16] = x1[(k + t / 16) * 16 + t % 16];
                turned[t % 16 * 8 + t / 16] = x1[(k + t / 16) * 16 + t % 16];
                threadgroup_barrier(mem_flags::mem_threadgroup);
                simdgroup_load(l, left + row * 8, 8);
                simdgroup_load(r, &right[0][0], 16, ulong2(column, 0));
                simdgroup_multiply_accumulate(sum, l, r, sum);
                simdgroup_load(r, turned + column * 8, 8, ulong2(0, 0), true);
                simdgroup_multiply(last, l, r);
                threadgroup_barrier(mem_flags::mem_threadgroup);
            }
            simdgroup_store(sum, y0 + row * 16 + column, 16);
            simdgroup_store(last, y1 + row * 16 + column, 16);
        """,
        inputs=[a, b],
        expected=[left @ right, left[:, 16:] @ right[16:]],
        dtypes=[mx.float32, mx.float32],
        grid=(128, 1, 1),
        threadgroup=(128, 1, 1),
        tolerance=1e-5,  # float32 sums of 24 products
    )


def shared_value() -> Demo:
    """All threadgroups read one element of an output that starts with a value."""
    return Demo(
        source="""
            uint i = thread_position_in_grid.x;
            float v = y0[0];
            threadgroup_barrier(mem_flags::mem_device);
            y1[i] = v + x0[i];
        """,
        inputs=[mx.arange(128).astype(mx.float32)],
        expected=[np.full(1, 3.0), np.arange(128) + 3.0],
        dtypes=[mx.float32, mx.float32],
        grid=(128, 1, 1),
        threadgroup=(32, 1, 1),
        init_value=3.0,
    )


def strided_input() -> Demo:
    """An input with gaps, as a slice of a cache has, not copied."""
    x = normal(2, 8, 6)[:, :5, 1:4]
    return Demo(
        source="""
            uint3 i = thread_position_in_grid;
            y0[(i.z * 5 + i.y) * 3 + i.x] =
                x0[i.z * x0_strides[0] + i.y * x0_strides[1] + i.x * x0_strides[2]];
        """,
        inputs=[x],
        expected=[as_float(x)],
        dtypes=[mx.float32],
        grid=(3, 5, 2),
        threadgroup=(3, 5, 2),
        options={"ensure_row_contiguous": False},
    )


RIGHT = {
    "row_sum-f32": row_sum(),
    "row_sum-f16": row_sum(mx.float16),
    "row_sum-bf16": row_sum(mx.bfloat16),
    "vectors": vectors(),
    "small_types": small_types(),
    "math_functions": math_functions(),
    "simdgroup_exchange": simdgroup_exchange(),
    "device_exchange": device_exchange(),
    "shuffles": shuffles(),
    "quad_shuffles": quad_shuffles(),
    "wide_loads": wide_loads(),
    "matrix_product": matrix_product(),
    "shared_value": shared_value(),
    "strided_input": strided_input(),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("demo", RIGHT.values(), ids=RIGHT)
def test_right_kernel_equals_numpy(demo: Demo, order: int) -> None:
    with execution_order(order):
        outputs = demo.kernel()(**demo.call(init_value=demo.init_value))
    for output, expected, dtype in zip(outputs, demo.expected, demo.dtypes, strict=True):
        assert output.dtype == dtype
        assert output.shape == expected.shape
        np.testing.assert_allclose(as_float(output), expected, rtol=0, atol=demo.tolerance)


def test_strided_input_has_undefined_gaps() -> None:
    demo = strided_input()
    source = demo.source.replace("i.y * x0_strides[1]", "i.y * 3")  # as if it were contiguous
    assert source != demo.source
    (output,) = demo.kernel(source)(**demo.call())
    assert np.isnan(as_float(output)).any()


# ---- planted bugs


@dataclass(frozen=True)
class Bug:
    demo: Demo
    old: str
    new: str
    kinds: tuple[Kind, ...]
    call: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    buffer: str | None = None


def bug(demo: Demo, old: str, new: str, *kinds: Kind, **more: Any) -> Bug:
    assert demo.source.count(old) >= 1, old
    return Bug(demo, old, new, kinds, **more)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
SUM = "sum = simd_sum(sum);"

BUGS = {
    # races
    "barrier_missing": bug(row_sum(), BARRIER, "", Kind.RACE, Kind.UNINITIALISED, buffer="part"),
    "barrier_mem_none": bug(row_sum(), "mem_threadgroup)", "mem_none)", Kind.RACE, buffer="part"),
    "barrier_wrong_memory": bug(row_sum(), "mem_threadgroup)", "mem_device)", Kind.RACE),
    "barrier_before_reuse_missing": bug(
        matrix_product(), f"{BARRIER}\n            }}", "}", Kind.RACE
    ),
    "simdgroup_barrier_missing": bug(
        simdgroup_exchange(), SIMD_BARRIER, "", Kind.RACE, Kind.UNINITIALISED, buffer="row"
    ),
    "simdgroup_barrier_mem_none": bug(
        simdgroup_exchange(), "mem_threadgroup)", "mem_none)", Kind.RACE
    ),
    "simdgroup_barrier_for_two_simdgroups": bug(
        simdgroup_exchange(), "row[s][31 - lane]", "row[s ^ 1][31 - lane]", Kind.RACE,
        Kind.UNINITIALISED,
    ),
    "device_barrier_for_threadgroup_memory": bug(
        device_exchange(), "mem_device", "mem_threadgroup", Kind.RACE, buffer="y0"
    ),
    "threadgroups_communicate": bug(
        device_exchange(), "y0[i - j + (j + 1) % 64]", "y0[(i + 1) % 192]", Kind.RACE,
        Kind.UNINITIALISED,
    ),
    "threadgroup_updates_what_others_read": bug(
        shared_value(), "y1[i] =", "if (i % 64 == 0) y0[0] = v + 1.0f; y1[i] =", Kind.RACE,
        call={"init_value": 3.0}, buffer="y0",
    ),
    "threadgroups_write_same_element": bug(
        row_sum(), "y0[row] =", "y0[row / 2] =", Kind.RACE, buffer="y0"
    ),
    "lanes_write_same_element": bug(row_sum(), "if (lane == 0) y0", "y0", Kind.RACE),
    # bounds
    "input_read_past_end": bug(row_sum(), "i < n", "i <= n", Kind.OUT_OF_BOUNDS, buffer="x0"),
    "input_read_before_start": bug(
        row_sum(), "x0[row * n + i]", "x0[row * n + i - 1]", Kind.OUT_OF_BOUNDS, buffer="x0"
    ),
    "input_read_at_negative_index": bug(
        row_sum(), "x0[row * n + i]", "x0[int(row * n + i) - 1]", Kind.OUT_OF_BOUNDS, buffer="x0",
    ),
    "output_write_past_end": bug(row_sum(), "y0[row]", "y0[row + 1]", Kind.OUT_OF_BOUNDS),
    "grid_edge_not_guarded": bug(
        vectors(), "x2[i]", "x2[i + 21]", Kind.OUT_OF_BOUNDS, buffer="x2",
    ),
    "vector_read_past_end": bug(
        vectors(), "((const device vec<half, 4>*)x0)[i]",
        "*(const device vec<half, 4>*)(x0 + 4 * i + 4)",
        Kind.OUT_OF_BOUNDS, buffer="x0",
    ),
    "shape_read_past_end": bug(row_sum(), "x0_shape[1]", "x0_shape[2]", Kind.OUT_OF_BOUNDS),
    "short_input_read_past_end": bug(vectors(), "x3[2]", "x3[3]", Kind.OUT_OF_BOUNDS),
    "threadgroup_array_too_short": bug(row_sum(), "S = 8", "S = 7", Kind.OUT_OF_BOUNDS),
    "threadgroup_pointer_past_end": bug(
        matrix_product(), "left + row * 8, 8", "left + row * 9, 8", Kind.OUT_OF_BOUNDS,
        buffer="left",
    ),
    "inner_dimension_overrun": bug(
        simdgroup_exchange(), "row[s][31 - lane]", "row[s][32 - lane]", Kind.OUT_OF_BOUNDS
    ),
    "private_array_overrun": bug(
        row_sum(), SUM, "float v[2] = {sum, 0.0f}; sum = simd_sum(v[row % 3]);",
        Kind.OUT_OF_BOUNDS,
    ),
    "constant_table_overrun": bug(row_sum(), "weights[1]", "weights[i % 3]", Kind.OUT_OF_BOUNDS),
    "vector_component_overrun": bug(vectors(), "j < 4", "j <= 4", Kind.OUT_OF_BOUNDS),
    "pointer_to_nowhere": bug(
        row_sum(), "x0[row * n + i]", "x0[(1ul << 44) + i]", Kind.STRAY_POINTER
    ),
    # undefined values
    "threadgroup_memory_uninitialised": bug(
        row_sum(), "part[lane] : 0.0f", "part[lane] : part[8]", Kind.UNINITIALISED, buffer="part",
        options={"source_edit": ("part[S]", "part[S + 1]")},
    ),
    "output_read_before_written": bug(row_sum(), "y0[row] =", "y0[row] +=", Kind.UNINITIALISED),
    "output_never_written": bug(
        row_sum(), "if (lane == 0) y0", "if (lane == 0 && row != 3) y0", Kind.UNWRITTEN_OUTPUT,
        buffer="y0",
    ),
    # what may not be written, or not so much
    "input_written": bug(
        row_sum(), SUM, SUM + "((device float*)x0)[row] = sum;", Kind.READ_ONLY, buffer="x0"
    ),
    "constant_written": bug(row_sum(), SUM, SUM + "weights[1] = sum;", Kind.STRAY_POINTER),
    "threadgroup_memory_over_32_kb": bug(
        row_sum(), "part[S]", "part[8193]", Kind.THREADGROUP_MEMORY, buffer="part"
    ),
    # divergence
    "barrier_divergent": bug(
        row_sum(), BARRIER, "if (thread_index_in_threadgroup < 128) " + BARRIER, Kind.DIVERGENCE
    ),
    "barrier_after_early_return": bug(
        row_sum(), SUM, SUM + "if (row == 36 && thread_index_in_threadgroup >= 224) return;",
        Kind.DIVERGENCE,
    ),
    "barriers_at_two_lines": bug(
        row_sum(), BARRIER,
        f"if (simdgroup_index_in_threadgroup < 4) {BARRIER}\nelse {BARRIER}", Kind.DIVERGENCE,
    ),
    "simd_sum_divergent": bug(row_sum(), SUM, "if (sum > 0) " + SUM, Kind.DIVERGENCE),
    "simd_sum_uneven_loop": bug(
        row_sum(), "sum += float", "sum = simd_sum(sum) + float", Kind.DIVERGENCE
    ),
    "simdgroup_barrier_divergent": bug(
        simdgroup_exchange(), f"float v = row[s][31 - lane];\n            {SIMD_BARRIER}",
        f"float v = row[s][31 - lane]; if (lane != 9) {SIMD_BARRIER}", Kind.DIVERGENCE, Kind.RACE,
    ),
    "matrix_operation_divergent": bug(
        matrix_product(), "simdgroup_multiply_acc", "if (t % 32 < 16) simdgroup_multiply_acc",
        Kind.DIVERGENCE,
    ),
    "shuffle_from_absent_lane": bug(
        row_sum(), SUM, SUM + "sum = simd_shuffle_xor(sum, 16);", Kind.ABSENT_LANE,
        call={"grid": (240, 37, 1), "threadgroup": (240, 1, 1)},
    ),
    "quad_shuffle_divergent": bug(
        quad_shuffles(), "if (i / 4 % 2 != 0)", "if (i % 4 != 0)", Kind.DIVERGENCE
    ),
    "quad_shuffle_from_lane_4": bug(quad_shuffles(), "i * 7 / 3 % 4", "4", Kind.ABSENT_LANE),
    "wide_load_misaligned": bug(wide_loads(), "+ 4 * i)", "+ 2 * i)", Kind.ALIGNMENT),
    "shuffle_from_lane_32": bug(shuffles(), "(v, 5)", "(v, 32)", Kind.ABSENT_LANE),
    # arithmetic that each platform does differently
    "shift_by_32": bug(
        row_sum(), "uint lane =", "uint mask = (1u << (row % 33)) - 1; uint lane = (mask & 0) +",
        Kind.ARITHMETIC,
    ),
    "division_by_zero": bug(row_sum(), "uint lane =", "uint lane = n / row * 0 +", Kind.ARITHMETIC),
}  # fmt: skip


@pytest.mark.parametrize("planted", BUGS.values(), ids=BUGS)
def test_planted_bug_is_caught(planted: Bug) -> None:
    options = dict(planted.options)
    source = planted.demo.source.replace(planted.old, planted.new)
    source = source.replace(*options.pop("source_edit", ("", "")))
    kernel = planted.demo.kernel(source, **options)
    for order in ORDERS:
        with execution_order(order), pytest.raises(KernelError) as caught:
            kernel(**planted.demo.call(**planted.call))
        assert caught.value.kind in planted.kinds
        if planted.buffer is not None:
            assert caught.value.buffer == planted.buffer


# Who may touch one cell, step by step. `r5`, `w5`: thread 5 reads, writes; `s`: simdgroup
# barrier, `b`: threadgroup barrier; `.`: a barrier that orders no memory, so that the steps around
# it happen in this order and still race. Simdgroups have 32 threads.
WITHIN_THREADGROUP = {
    "r0 . r1 . r32": False,
    "w0 . r0 . w0": False,
    "w0 . w1": True,
    "w0 . w32": True,
    "w0 . r1": True,
    "r0 . w1": True,
    "r1 . w0": True,
    "r0 . r1 . w0": True,
    "r0 . r32 . w0": True,
    "w0 b r1": False,
    "r0 . r32 b w1": False,
    "w0 b r1 . w2": True,
    "w0 s r1": False,
    "r0 s w1": False,
    "w0 s r32": True,
    "r0 s w32": True,
    "r0 s r1 . w0": True,
    "r1 s r0 . w0": False,
    "r32 s r0 . w0": True,
}
# Threads 0 and 64 are in different threadgroups; 0's runs to its end first.
BETWEEN_THREADGROUPS = {
    "r0 . r64": False,
    "w0 . r64": True,
    "r0 . w64": True,
    "w0 b w64": True,
    "r0 . r64 b w64": True,
    "w0 b r1": False,
    "w0 s r1": False,
    "w0 . r1": True,
}

STEPS = """
    uint i = thread_position_in_grid.x;
    int seen = 0;
    threadgroup int shared[1];
    if (thread_index_in_threadgroup == 0) shared[0] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < steps_shape[0]; k++) {
        const int what = steps[2 * k], who = steps[2 * k + 1];
        if (what == '.') threadgroup_barrier(mem_flags::mem_none);
        if (what == 'b') threadgroup_barrier(mem_flags::MEMORY);
        if (what == 's') simdgroup_barrier(mem_flags::MEMORY);
        if (who != int(i)) continue;
        if (what == 'r') seen += CELL[0];
        if (what == 'w') CELL[0] = k;
    }
    device_cell[1 + i] = seen;
"""


def run_steps(steps: str, *, space: str) -> None:
    cell = "shared" if space == "threadgroup" else "device_cell"
    source = STEPS.replace("MEMORY", f"mem_{space}")
    kernel = metal_kernel("steps", ["steps"], ["device_cell"], source.replace("CELL", cell))
    encoded = [[ord(step[0]), int(step[1:] or -1)] for step in steps.split()]
    kernel(
        inputs=[mx.array([*encoded] + [[0, -1]] * 8)],  # never so short that MLX binds it otherwise
        grid=(128, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(129,)],
        output_dtypes=[mx.int32],
        init_value=0,
    )


@pytest.mark.parametrize(
    ("space", "steps", "races"),
    [("threadgroup", steps, races) for steps, races in WITHIN_THREADGROUP.items()]
    + [("device", steps, races) for steps, races in WITHIN_THREADGROUP.items()]
    + [("device", steps, races) for steps, races in BETWEEN_THREADGROUPS.items()],
)
def test_race_is_found_exactly(space: str, steps: str, races: bool) -> None:
    if not races:
        run_steps(steps, space=space)
        return
    with pytest.raises(KernelError) as caught:
        run_steps(steps, space=space)
    assert caught.value.kind == Kind.RACE
    assert caught.value.buffer == ("shared" if space == "threadgroup" else "device_cell")


# The same on CUDA, with counters: `f`: a fence; `a`, `c`: one is added to a counter, to another;
# `R`, `W`: the first counter is read and written as any number. `b` is for all thread blocks, whose
# threads are 0 to 63, 64 to 127 and 128 to 191; the first runs to its end first.
THROUGH_COUNTERS = {
    "w1 b f0 a0 a64 f64 r64": False,
    "w1 b f0 a0 a64 f64 w64": False,
    "r1 b f0 a0 a64 f64 w64": False,
    "w1 b f0 a0 a64 f64 b r65": False,
    "w1 b f0 a0 a64 f64 r65": True,
    "w1 f0 a0 a64 f64 r64": True,
    "w1 b a0 a64 f64 r64": True,
    "r1 b a0 a64 f64 w64": True,
    "w1 b a0 f0 a64 f64 r64": True,
    "w1 b f0 a64 f64 r64": True,
    "w1 b f0 a0 f64 r64": True,
    "w1 b f0 a0 a64 r64": True,
    "w1 b f0 a0 f64 a64 r64": True,
    "w1 b f0 a0 c64 f64 r64": True,
    "w1 b f0 a0 b w1 a64 f64 r64": True,
    "r1 r65 b f0 f64 a0 a64 a128 f128 w128": False,
    "r1 r65 b f0 a0 a64 a128 f128 w128": True,
    "r1 r65 b f0 f64 a64 a128 f128 w128": True,
    "a0 a64 W64": False,
    "a0 a64 b R65": False,
    "a0 a64 R65": True,
    "a0 W64": True,
    "W0 a64": True,
}

COUNTER_STEPS = """
struct Arguments {
  const int* steps;
  int* cell;
  int* counters;
  int* seen;
  int64_t count;
};
__global__ void kernel(const Arguments call) {
  const int i = 64 * blockIdx.x + threadIdx.x;
  int seen = 0;
  for (int k = 0; k < call.count; k++) {
    const int what = call.steps[2 * k], who = call.steps[2 * k + 1];
    if (what == 'b') __syncthreads();
    if (who != i) continue;
    if (what == 'r') seen += call.cell[0];
    if (what == 'w') call.cell[0] = k;
    if (what == 'R') seen += call.counters[0];
    if (what == 'W') call.counters[0] = 0;
    if (what == 'a') seen += atomicAdd(call.counters, 1);
    if (what == 'c') seen += atomicAdd(call.counters + 1, 1);
    if (what == 'f') __threadfence();
  }
  call.seen[i] = seen;
}
extern "C" int run(const Arguments* call, void* stream) {
  void* all[] = {const_cast<Arguments*>(call)};
  return cudaLaunchKernel(kernel, dim3(3), dim3(64), all, 0, static_cast<cudaStream_t>(stream));
}
"""


class CounterArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("steps", "cell", "counters", "seen")),
        ("count", ctypes.c_int64),
    ]


@pytest.fixture(scope="module")
def counter_module(tmp_path_factory: pytest.TempPathFactory) -> CudaModule:
    path = tmp_path_factory.mktemp("counters") / "steps.cu"
    path.write_text(COUNTER_STEPS)
    return CudaModule(path, {}, {})


def run_counter_steps(module: CudaModule, steps: str) -> tuple[np.ndarray, np.ndarray]:
    """The counters, and what each thread has seen of cell and counters, added up."""
    encoded = [[ord(step[0]), int(step[1:] or -1)] for step in steps.split()]
    buffers, cell, counters, seen = Buffers(), *(np.zeros(n, np.int32) for n in (1, 2, 192))
    call = CounterArguments(
        buffers.handle("steps", np.array(encoded, np.int32)),
        buffers.handle("cell", cell, written=True),
        buffers.handle("counters", counters, written=True),
        buffers.handle("seen", seen, written=True),
        len(encoded),
    )
    module.call("run", call, buffers)
    return counters, seen


@pytest.mark.parametrize(("steps", "races"), THROUGH_COUNTERS.items())
def test_counters_order_thread_blocks(counter_module: CudaModule, steps: str, races: bool) -> None:
    if not races:
        run_counter_steps(counter_module, steps)
        return
    with pytest.raises(KernelError) as caught:
        run_counter_steps(counter_module, steps)
    assert caught.value.kind == Kind.RACE
    assert caught.value.buffer == ("counters" if set(steps) & {"R", "W"} else "cell")
    assert caught.value.line is not None


def test_counters_count(counter_module: CudaModule) -> None:
    counters, seen = run_counter_steps(counter_module, "a3 a3 c70 a128 a190")
    assert counters.tolist() == [4, 1]
    assert seen.nonzero()[0].tolist() == [3, 128, 190]
    assert seen[[3, 128, 190]].tolist() == [1, 2, 3]


def test_error_names_the_place() -> None:
    demo = row_sum()
    source = demo.source.replace("y0[row] =", "y0[row + 1] =")
    with execution_order(1), pytest.raises(KernelError) as caught:
        demo.kernel(source)(**demo.call())
    error = caught.value
    line = (
        demo.text(source).splitlines().index("                if (lane == 0) y0[row + 1] = T(sum);")
    )
    assert error.line == line + 1
    assert error.threadgroup == (0, 36, 0)
    assert error.thread == (0, 36, 0)
    assert error.buffer == "y0"
    assert error.kernel == "custom_kernel_demo__float_float_float"
    assert str(error) == (
        "[out of bounds] write to 4 bytes at byte 148 of device memory 'y0', which has 148 bytes "
        "(37 elements of 4) [kernel custom_kernel_demo__float_float_float, threadgroup "
        f"(0, 36, 0), thread (0, 36, 0), line {error.line}: "
        "if (lane == 0) y0[row + 1] = T(sum);]"
    )


def test_error_names_the_other_thread() -> None:
    demo = simdgroup_exchange()
    # In this order lane 31 of simdgroup 3 runs first; the next lane reads what it has written.
    source = demo.source.replace(SIMD_BARRIER, "").replace("31 - lane", "31")
    with execution_order(1), pytest.raises(KernelError) as caught:
        demo.kernel(source)(**demo.call())
    assert "row[127], not ordered after a write by lane 31 of simdgroup 3 " in str(caught.value)


@pytest.mark.parametrize(
    "call", [{"threadgroup": (1025, 1, 1)}, {"grid": (0, 1, 1)}], ids=["threads", "grid"]
)
def test_impossible_launch_is_refused(call: dict[str, Any]) -> None:
    demo = row_sum()
    with pytest.raises(KernelError) as caught:
        demo.kernel()(**demo.call(**call))
    assert caught.value.kind == Kind.LAUNCH


# What Apple's compiler would reject, and the shim's types make g++ reject.
NOT_COMPILED = {
    "bfloat_stored_without_conversion": (row_sum(mx.bfloat16), "T(sum)", "sum"),
    "max_of_mixed_types": (row_sum(), SUM, "sum = max(sum, half(1.0f));"),
    "simd_sum_of_16_bits": (row_sum(), SUM, "sum = float(simd_sum(half(sum)));"),
    "threadgroup_initialiser": (row_sum(), "part[S];", "part[S] = {0};"),
    "matrix_of_other_type": (matrix_product(), "threadgroup float left", "threadgroup half left"),
    "stack_too_large": (row_sum(), SUM, "volatile float v[50000]; v[row] = sum;" + SUM),
}


@pytest.mark.parametrize(("demo", "old", "new"), NOT_COMPILED.values(), ids=NOT_COMPILED)
def test_wrong_types_do_not_compile(demo: Demo, old: str, new: str) -> None:
    source = demo.source.replace(old, new)
    assert source != demo.source
    with pytest.raises(
        (RuntimeError, ValueError), match=r"demo.*\.metal:\d+|threadgroup"
    ) as caught:
        demo.kernel(source)(**demo.call())
    assert not isinstance(caught.value, KernelError)


# ---- the text, and the machinery


def test_text_is_what_mlx_prints(capfd: pytest.CaptureFixture[str]) -> None:
    demo = row_sum()
    kernel = mx.fast.metal_kernel("demo", ["x0"], ["y0"], demo.source, demo.header)
    mx.export_function(
        lambda _: None,
        lambda *x: kernel(**demo.call(inputs=list(x), verbose=True)),  # type: ignore[operator]
        *demo.inputs,
    )
    printed = capfd.readouterr().out
    assert "decltype(custom_kernel_demo" in printed
    assert printed.split("```")[1].strip() == demo.text().strip()


def test_report_counts_what_a_launch_does() -> None:
    demo = simdgroup_exchange()
    kernel = demo.kernel()
    kernel(**demo.call())
    assert kernel.report is not None
    # Six accesses a thread: input, four of `row`, output.
    assert kernel.report.accesses == 6 * 256
    # Two a thread at each of its two barriers, and two to start and end.
    assert kernel.report.switches == 6 * 256
    assert kernel.report.threadgroup_bytes == 4 * 4 * 32


def test_random_orders_differ() -> None:
    """Every thread breaks a rule; the error names the one that ran first."""
    kernel = metal_kernel("order", ["x"], ["y"], "y[96 + thread_position_in_grid.x] = x[0];")

    def first(order: int) -> int:
        with execution_order(order), pytest.raises(KernelError) as caught:
            kernel(
                inputs=[mx.zeros((8,))], grid=(96, 1, 1), threadgroup=(48, 1, 1),
                output_shapes=[(96,)], output_dtypes=[mx.float32],
            )  # fmt: skip
        assert caught.value.thread is not None
        return caught.value.thread[0]

    assert first(0) == 0
    assert first(1) == 95
    assert len({first(order) for order in range(2, 10)}) > 4
    assert first(2) == first(2)


def test_portable_fibers_give_the_same() -> None:
    """The path of machines other than x86-64, in a process of its own."""
    script = (
        "from tests.gpu import test_emulator as t; "
        "[t.test_right_kernel_equals_numpy(d, o) for d in (t.row_sum(), t.matrix_product()) "
        "for o in t.ORDERS]; "
        "t.test_planted_bug_is_caught(t.BUGS['barrier_missing']); "
        "from tests.emulator import toolchain; print(toolchain.runtime_library()._name)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ROTORMLX_EMULATOR_UCONTEXT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "runtime-" in run.stdout


def test_kernels_compiled_ahead_are_those_compiled_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three texts that begin alike, in one object: outputs are right, and errors name the line."""
    monkeypatch.setenv("ROTORMLX_EMULATOR_CACHE", str(tmp_path))
    right, half = row_sum(), row_sum(mx.float16)
    # Not as in any other test: what this process has compiled, it does not compile again.
    header = right.header.replace("weights", "weights_ahead")
    sources = [d.source.replace("weights", "weights_ahead") for d in (right, half)]
    sources.append(sources[0].replace("y0[row] =", "y0[row + 1] ="))
    calls = [
        (demo.kernel(source, header), demo.call())
        for demo, source in zip((right, half, right), sources, strict=True)
    ]
    with compiling_ahead():
        for kernel, call in calls:
            assert not any(np.array(y).any() for y in kernel(**call))
            assert kernel.report is None
    assert len(list(tmp_path.glob("kernels-*.so"))) == 1
    # Names of the three, and nothing compiled by itself.
    modules = list(tmp_path.glob("kernel-*.so"))
    assert len(modules) == 3
    for demo, (kernel, call) in zip((right, half), calls[:2], strict=True):
        (y,) = kernel(**call)
        assert np.abs(as_float(y) - demo.expected[0]).max() <= demo.tolerance
    with pytest.raises(KernelError) as caught:
        calls[2][0](**calls[2][1])
    line = right.text(sources[2], header).splitlines()[(caught.value.line or 0) - 1]
    assert "y0[row + 1] = T(sum);" in line
    assert set(tmp_path.glob("kernel-*.so")) == set(modules)


def test_a_run_says_how_many_kernels_it_has_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line when the interval is over, and none when nothing is new."""
    monkeypatch.setenv("ROTORMLX_EMULATOR_CACHE", str(tmp_path))
    lines: list[str] = []
    writer = SimpleNamespace(width_of_current_line=7, line=lambda text="", **_: lines.append(text))
    config = SimpleNamespace(get_terminal_writer=lambda: writer)
    shown = progress.Progress(config, interval=0)  # type: ignore[arg-type]
    shown.pytest_runtest_logstart()
    for name in ("kernel-a.so", "kernel-b.so", "kernels-c.so"):
        (tmp_path / name).touch()
    shown.pytest_runtest_logstart()
    shown.pytest_runtest_logstart()
    assert lines == ["", "GPU kernels compiled so far: 2; later runs find them."]


# ---- MLX's own kernel, from the headers that its wheel ships


def sdpa_source(*edits: tuple[str, str]) -> str:
    """MLX's vector attention, with its function constants set: no mask, no sinks."""
    headers = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
    text = (headers / "sdpa_vector.h").read_text()
    text = re.sub(r" \[\[function_constant\(\d+\)\]\];", " = 0;", text)
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    return text


def run_sdpa(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Its output and numpy's for B 1, H 4, K 2, L 3, S 77, D 64."""
    heads, kv_heads, queries, keys, head_dim = 4, 2, 3, 77, 64
    random = np.random.default_rng(1)
    q = random.normal(size=(heads, queries, head_dim)).astype(np.float16)
    k = random.normal(size=(kv_heads, keys, head_dim)).astype(np.float16)
    v = random.normal(size=(kv_heads, keys, head_dim)).astype(np.float16)
    out = np.zeros_like(q)
    arguments: dict[str, np.ndarray] = {
        "queries": q,
        "keys": k,
        "values": v,
        "gqa_factor": np.array(heads // kv_heads, np.int32),
        "N": np.array(keys, np.int32),
        "scale": np.array(head_dim**-0.5, np.float32),
    }
    arguments |= {f"{x}_head_stride": np.array(keys * head_dim, np.uint64) for x in "kv"}
    arguments |= {f"{x}_seq_stride": np.array(head_dim, np.uint64) for x in "kv"}
    absent = ["bmask", "fmask", "sinks", "num_q_heads"]
    absent += [f"mask_{x}_stride" for x in ("kv_seq", "q_seq", "head")]
    arguments |= {name: np.zeros(1, np.uint64) for name in absent}
    run_text(
        text,
        "sdpa_vector",
        arguments,
        {"out": out},
        instance="sdpa_vector<half, 64, 64>",
        grid=(heads * 1024, queries, 1),
        threadgroup=(1024, 1, 1),
    )
    scores = np.repeat(q.astype(np.float64), 1, 0) @ np.repeat(k, 2, 0).swapaxes(1, 2)
    scores = np.exp(scores * head_dim**-0.5)
    expected = scores @ np.repeat(v, 2, 0) / scores.sum(-1, keepdims=True)
    return out.astype(np.float64), expected


@pytest.mark.parametrize("order", ORDERS)
def test_mlx_attention_equals_numpy(order: int) -> None:
    with execution_order(order):
        out, expected = run_sdpa(sdpa_source())
    np.testing.assert_allclose(out, expected, rtol=0, atol=2**-11 * np.abs(expected).max())


@pytest.mark.parametrize(
    "edit",
    [
        (BARRIER, ""),
        ("simd_gid] = o[i];\n    " + BARRIER, "simd_gid] = o[i];"),
        ("(o[i] / sum_exp_score);\n    " + BARRIER, "(o[i] / sum_exp_score);"),
        ("keys += inner_k_stride;", "keys += inner_k_stride + 1;"),
        ("if (use_key) {", "if (use_key && simd_lid != 3) {"),
    ],
    ids=["barrier_1", "barrier_2", "barrier_3", "stride", "divergence"],
)
def test_mlx_attention_with_planted_bug_is_caught(edit: tuple[str, str]) -> None:
    for order in ORDERS:
        with execution_order(order), pytest.raises(KernelError):
            run_sdpa(sdpa_source(edit))


# ---- lint


@needs_clang
@pytest.mark.parametrize("demo", RIGHT.values(), ids=RIGHT)
def test_lint_accepts_right_kernel(demo: Demo) -> None:
    assert lint(demo.kernel().metal_text(**demo.call())) == []


@needs_clang
def test_lint_accepts_mlx_attention() -> None:
    text = sdpa_source() + "template decltype(sdpa_vector<half, 64>) sdpa_vector<half, 64>;\n"
    # One literal without suffix, in a kernel that is not used here.
    assert [re.sub(r"\d+", "N", complaint) for complaint in lint(text)] in (
        [],
        ["line N: warning: double precision constant requires cl_khr_fpN and __opencl_c_fpN, "
         "casting to single precision"],
    )  # fmt: skip


HELPERS = """
template <typename P> inline float first(P p) { return p[0]; }
inline float first_of_device(const device float* p) { return p[0]; }
inline void double_it(thread float& x) { x *= 2.0f; }
inline float first_of_thread(const thread float* p) { return p[0]; }
struct Pair { float a, b; float sum() const thread { return a + b; } };
inline Pair swapped(Pair p) { return {p.b, p.a}; }
constant float table[2] = {1.0f, 2.0f};
"""

ACCEPTED = {
    "helper_on_device": "sum += first_of_device(x0);",
    "helper_on_any_pointer": "sum += row < 100 ? first(x0) : first(part);",
    "helper_on_thread": "float v[2] = {sum, sum}; sum += first_of_thread(v); double_it(sum);",
    "constant_table": "sum += table[row % 2];",
    "multiplication": "uint m = row * n & 3; sum += T(m) * sum;",
    "struct": "Pair p = swapped({sum, 1.0f}); Pair q = p; p = q; sum += p.sum();",
    "struct_in_memory": """
        const uint t = thread_index_in_threadgroup;
        Pair p = ((const device Pair*)x0)[t];
        pairs[t] = p;
        p = pairs[t];
        sum += p.sum();
    """,
    "thread_pointer": "thread float* p = &sum; *p += 1.0f;",
    "names_of_opencl": "float local = sum, global = 0.0f; sum = local + global;",
}

# (header, statement, what the complaint must hold)
REJECTED = {
    "pointer_parameter": ("float g(const float* p) { return p[0]; }", "", "address space"),
    "reference_parameter": ("void g(float& x) { x = 0; }", "", "address space"),
    "reference_to_struct": (
        "struct A { int i; };\nint g(A& a) { return a.i; }",
        "",
        "address space",
    ),
    "reference_to_template": ("template <class U> void g(U& x) { x = 0; }", "", "address space"),
    "pointer_to_vector": ("float g(vec<float, 4>* p) { return p->x; }", "", "address space"),
    "pointer_to_vector_2": ("float g(const float4 *p) { return p->x; }", "", "address space"),
    "pointer_in_struct": ("struct A { float* p; };", "", "address space"),
    "pointer_cast": ("", "sum += ((float*)x0)[0];", "address space"),
    "pointer_returned": ("float* g(device float* p) { return p; }", "", "address space"),
    "local_pointer": ("", "const float* p = x0; sum += p[0];", "address space"),
    "local_auto_pointer": ("", "auto* p = part; sum += p[0];", "address space"),
    "threadgroup_as_device": ("", "sum += first_of_device(part);", "no matching function"),
    "threadgroup_as_thread": ("", "double_it(part[0]);", "no matching function"),
    "address_space_cast": ("", "sum += *(thread float*)x0;", "mismatching address spaces"),
    "const_device_written": ("", "x0[0] = sum;", "not assignable"),
    "constant_written": ("", "table[0] = sum;", "not assignable"),
    "double": ("", "double d = 1.0f;", "double"),
    "double_literal": ("", "sum += 0.5;", "double precision constant"),
    "bfloat_literal": ("", "sum += float(1.0bf);", "invalid suffix"),
    "variable_length_array": ("", "float v[n]; v[0] = sum;", "not a constant expression"),
    "mutable_global": ("float counter = 0;", "", "constant address space"),
    "static_local": ("", "static float s = 0;", "constant address space"),
    "new": ("", "thread float* p = new float[2];", "not supported"),
    "std": ("", "sum = std::max(sum, 1.0f);", "'std'"),
    "exception": ("", "throw 1;", "exceptions"),
    "virtual": ("struct V { virtual float f() const { return 0.0f; } };", "", "virtual"),
    "function_pointer": ("", "float (*f)(float) = metal::exp;", "pointers to functions"),
    "lambda": ("", "auto f = [&](float x) { return x + sum; }; sum = f(sum);", "lambda"),
    "goto": ("", "goto end; end: sum = 0;", "goto"),
    "mixed_max": ("", "sum = max(sum, half(1.0f));", "ambiguous"),
    "unknown_function": ("", "sum = rotate_by_magic(sum);", "undeclared"),
    "variable_called_thread": ("", "int thread = 1;", "expected"),
    "threadgroup_initialiser": ("", "threadgroup float t[2] = {0};", "without initialiser"),
    "threadgroup_in_block": ("", "{ threadgroup float t[2 * 2]; t[0] = 0; }", "outermost scope"),
    "threadgroup_in_helper": ("void g() { threadgroup int t; t = 0; }", "", "outermost scope"),
    "threadgroup_qualifier_second": ("", "const threadgroup float t[2];", "threadgroup variable"),
    "threadgroup_variable_length": ("", "threadgroup float t[n];", "not a constant expression"),
}


def row_sum_with(header: str, statement: str) -> Demo:
    demo = row_sum()
    return replace(
        demo,
        header=demo.header + HELPERS + header + "\n",
        source="threadgroup Pair pairs[256];" + demo.source.replace(SUM, statement + SUM),
    )


@needs_clang
@pytest.mark.parametrize("statement", ACCEPTED.values(), ids=ACCEPTED)
def test_lint_accepts(statement: str) -> None:
    assert lint(row_sum_with("", statement).text()) == []


@pytest.mark.parametrize("statement", ACCEPTED.values(), ids=ACCEPTED)
def test_what_the_lint_accepts_runs(statement: str) -> None:
    demo = row_sum_with("", statement)
    demo.kernel()(**demo.call())


@needs_clang
@pytest.mark.parametrize(("header", "statement", "complaint"), REJECTED.values(), ids=REJECTED)
def test_lint_rejects(header: str, statement: str, complaint: str) -> None:
    complaints = lint(row_sum_with(header, statement).text())
    assert any(complaint in line for line in complaints), complaints


@needs_clang
def test_lint_names_the_line() -> None:
    assert lint("\n\nfloat mutable_global = 0;\n")[0].startswith("line 3: ")


# ---- the switch


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("off", "CompilerMissingError: .*Nothing can be emulated here: ROTORMLX_EMULATOR=off"),
        ("maybe", "ValueError: ROTORMLX_EMULATOR must be 'off' or unset, but is 'maybe'"),
    ],
)
def test_a_switched_off_emulator_emulates_nothing(value: str, says: str) -> None:
    """It is no silent fallback: a test that forgets to ask fails."""
    script = "from tests.emulator import toolchain; toolchain.runtime_library()"
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ROTORMLX_EMULATOR": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert re.search(says, run.stderr)
