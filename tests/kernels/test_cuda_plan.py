"""The plan of a call of attention on CUDA: its numbers for known shapes, and what every plan keeps.

That the figures of shared memory are those of the kernels' structures is in tests/gpu.
"""

import itertools
import math

import pytest

from rotormlx.kernels import cuda_plan
from rotormlx.kernels.cuda_plan import ANY_DEVICE, Device, Shape, attend_plan, cut_both

# Shape of rotations with stages; multiprocessors and KiB of shared memory; operands, tiles, rows of
# a matrix, and whether one kernel does it; parts and tokens of each, exact and packed; bytes of
# shared memory. GPUs: H100 (132), A100 (108), B200 (148), others. As measured to be fast on an
# H100: docs/CUDA.md.
PLANS = [
    (
        (1, 32, 8, 1, 128, 128, 4, 4, 131, 32768, False),
        (132, 227),
        (1, 1, 1, 1),
        (1, 160),
        (43, 768),
        (2560, 65856, 12288),
    ),
    (
        (1, 32, 8, 1, 128, 128, 4, 4, 131, 32768, False),
        (132, 99),
        (1, 1, 1, 1),
        (1, 160),
        (43, 768),
        (2560, 65856, 12288),
    ),
    (
        (1, 32, 8, 1, 128, 128, 4, 4, 131, 131072, False),
        (132, 227),
        (1, 1, 1, 1),
        (1, 160),
        (47, 2816),
        (2560, 65856, 12288),
    ),
    (
        (4, 32, 8, 1, 128, 128, 4, 4, 131, 4096, False),
        (132, 227),
        (1, 1, 1, 1),
        (1, 160),
        (8, 512),
        (2560, 65856, 12288),
    ),
    (
        (1, 32, 8, 1, 128, 128, 4, 4, 68, 0, False),
        (132, 227),
        (1, 1, 1, 1),
        (3, 32),
        (0, 0),
        (2560, 65856, 12288),
    ),
    (
        (1, 32, 8, 16, 128, 128, 4, 4, 131, 32768, False),
        (132, 227),
        (2, 4, 1, 1),
        (1, 160),
        (8, 4096),
        (2560, 76224, 12288),
    ),
    (
        (1, 32, 8, 512, 128, 128, 4, 4, 131, 4096, False),
        (132, 227),
        (2, 128, 8, 0),
        (1, 160),
        (1, 4096),
        (20480, 76224, 24576),
    ),
    (
        (1, 32, 8, 1, 128, 128, 3, 2, 131, 32768, True),
        (132, 227),
        (0, 1, 1, 0),
        (1, 160),
        (43, 768),
        (2560, 12512, 12288),
    ),
    (
        (2, 40, 8, 1, 128, 128, 8, 8, 131, 8192, False),
        (108, 163),
        (1, 1, 1, 1),
        (1, 160),
        (16, 512),
        (2560, 66368, 12288),
    ),
    (
        (1, 16, 8, 1, 256, 256, 8, 8, 131, 8192, False),
        (108, 163),
        (1, 1, 1, 1),
        (2, 96),
        (32, 256),
        (5120, 121664, 16384),
    ),
    (
        (1, 32, 8, 4, 256, 256, 8, 8, 131, 8192, False),
        (128, 99),
        (0, 2, 1, 0),
        (1, 160),
        (16, 512),
        (5120, 18560, 16384),
    ),
    (
        (1, 128, 64, 1, 192, 128, 4, 2, 300, 16384, False),
        (148, 227),
        (1, 1, 1, 1),
        (1, 320),
        (5, 3328),
        (3840, 71744, 12288),
    ),
    (
        (1, 9, 3, 17, 80, 80, 2, 3, 17, 384, False),
        (1, 227),
        (2, 4, 1, 1),
        (1, 32),
        (1, 512),
        (1600, 70592, 10752),
    ),
    (
        (1, 2, 1, 1, 64, 80, 4, 3, 100, 1000000, False),
        (132, 227),
        (1, 1, 1, 1),
        (1, 128),
        (245, 4096),
        (1280, 59200, 10752),
    ),
    (
        (3, 6, 1, 7, 64, 80, 4, 3, 9000, 64, False),
        (50, 227),
        (2, 3, 1, 1),
        (10, 928),
        (1, 256),
        (1280, 67520, 10752),
    ),
]


@pytest.mark.parametrize(
    ("shape", "device", "rows", "exact", "packed", "sizes"),
    PLANS,
    ids=["-".join(map(str, (*row[0], *row[1]))) for row in PLANS],
)
def test_plans_of_known_shapes(shape, device, rows, exact, packed, sizes):
    multiprocessors, kilobytes = device
    plan = attend_plan(Shape(*shape, has_stages=True), Device(multiprocessors, 1024 * kilobytes))
    assert plan.numbers == (*rows, *exact, *packed, *sizes)


DECODE = Shape(1, 8, 2, 1, 64, 64, 4, 4, 131, 4096, is_float32=False)


def test_a_plan_covers_all_tokens_and_leaves_no_part_empty():
    lengths = itertools.product((0, 1, 100, 131, 700, 9000), (0, 64, 4096, 32768, 131072, 10**6))
    for (exact, packed), kv_heads, group, is_float32 in itertools.product(
        lengths, (1, 3, 8, 64, 500), (1, 16, 40), (False, True)
    ):
        shape = DECODE._replace(
            heads=kv_heads * group,
            kv_heads=kv_heads,
            exact_tokens=exact,
            packed_tokens=packed,
            is_float32=is_float32,
        )
        plan = attend_plan(shape)
        rows = 8 * max(plan.operands, 1)
        assert group <= plan.tiles * rows < group + rows
        assert plan.parts <= cuda_plan.MAX_PARTS
        parts = (plan.exact, exact, cuda_plan.EXACT_STEP), (plan.packed, packed, 256)
        for part, tokens, step in parts:
            assert part.tokens % step == 0
            assert tokens <= part.number * part.tokens < tokens + max(part.tokens, 1)


def test_exact_parts_take_turns_with_packed_ones_where_that_is_shorter():
    def numbers(packed, thread_blocks):
        limit = 3 * ANY_DEVICE.multiprocessors // thread_blocks
        return tuple(p.number for p in cut_both(100, packed, limit))

    # 396 thread blocks run at once. Few long parts: all of them are for packed tokens, and a few
    # begin when the exact part, which is short, has ended.
    assert numbers(32768, 64) == (1, 6)
    # Short parts, or many: both kinds run beside each other.
    assert numbers(4096, 64) == (1, 4)
    assert numbers(4096, 8) == (4, 16)
    assert numbers(32768, 8) == (1, 43)


def test_a_thread_block_has_the_shared_memory_of_the_device():
    widths = (64, 80, 128, 256), (2, 3, 4, 8), (99, 163, 227)
    for key_dim, value_dim, bits, kilobytes in itertools.product(widths[0], *widths):
        shape = DECODE._replace(
            heads=32, key_dim=key_dim, value_dim=value_dim, key_bits=bits, value_bits=bits
        )
        plan = attend_plan(shape, Device(132, 1024 * kilobytes))
        assert plan.part_bytes <= 1024 * kilobytes
        assert kilobytes < 227 or plan.operands == 2


def test_rows_share_a_matrix_where_there_are_many():
    for batch, length in itertools.product((1, 2, 7), (1, 127, 128, 255, 256)):
        shape = DECODE._replace(batch=batch, length=length)
        many = math.prod((batch, shape.heads, length)) >= cuda_plan.MANY_ROWS
        assert attend_plan(shape).matrix_rows == (8 if many else 1)


def test_one_kernel_does_few_rows_in_stages_on_the_tensor_cores():
    for has_stages, is_float32, length in itertools.product((True, False), (True, False), (1, 300)):
        shape = DECODE._replace(has_stages=has_stages, is_float32=is_float32, length=length)
        few = math.prod((shape.batch, shape.heads, length)) < cuda_plan.MANY_ROWS
        assert attend_plan(shape).one_kernel == (has_stages and not is_float32 and few)


def test_one_kernel_needs_fewer_counters_than_there_are_for_many_rows():
    for batch, kv_heads, group in itertools.product((1, 7, 300), (1, 3, 64), (1, 8, 9, 40)):
        shape = DECODE._replace(batch=batch, heads=kv_heads * group, kv_heads=kv_heads)
        plan = attend_plan(shape._replace(has_stages=True))
        assert not plan.one_kernel or batch * kv_heads * plan.tiles < cuda_plan.MANY_ROWS
