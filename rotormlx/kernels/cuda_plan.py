"""Plans how a call of attention is divided among the thread blocks of a CUDA GPU.

MLX's own CUDA build and the library for torch run the same kernels (``cuda_kernels/``), so both
use this plan: MLX as numbers of a launch, torch as the structure ``rotormlx_attend_plan`` of
``cuda_kernels/launch.h``, which the launcher checks.

Shapes: B batch, H query heads, K KV heads, L queries, G = H / K * L query rows of a KV head,
D head_dim.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from rotormlx.codec.format import BLOCK, TRELLIS_BITS
from rotormlx.kernels.parts import Parts, cut

# Threads per thread block in every kernel of attention.
THREADS = 128
# The largest number of parts of a sequence: `MAX_PARTS` of scores.cuh.
MAX_PARTS = 512
# The size of a part in tokens is a multiple of these steps: one block per warp for packed tokens,
# and the tokens of one warp for exact tokens, which take longer.
PACKED_STEP, EXACT_STEP = THREADS // 32 * BLOCK, 32
# From this number of query rows on, eight rows at a time share the reads of a matrix. Fewer rows
# are rotated one at a time, in one kernel if possible.
MANY_ROWS = 2048
# Lanes hold vectors in registers. The host's operations handle vectors longer than this.
MAX_HEAD_DIM = 256


class Device(NamedTuple):
    """The properties of a GPU that a plan depends on.

    multiprocessors: Number of multiprocessors.
    shared_bytes: Largest shared memory of a thread block, in bytes.
    """

    multiprocessors: int
    shared_bytes: int


# A large GPU with the shared memory that every GPU from sm_80 on has.
ANY_DEVICE = Device(132, 99 * 1024)


class Shape(NamedTuple):
    """The sizes of one attention call.

    heads: H.
    kv_heads: K.
    exact_tokens: Largest number of exact tokens of a batch row, or the capacity of its buffer.
    packed_tokens: Largest number of packed tokens of a batch row, or the capacity of its buffer.
    is_float32: Whether queries are float32, which the tensor cores do not accept.
    has_stages: Whether the rotations of keys and values have stages, so that thread blocks can
        rotate rows themselves.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    key_dim: int
    value_dim: int
    key_bits: int
    value_bits: int
    exact_tokens: int
    packed_tokens: int
    is_float32: bool
    has_stages: bool = False


class Plan(NamedTuple):
    """A division of a call among thread blocks.

    operands: Tensor-core operands per thread block, of 8 query rows each; 0 for 8 query rows
        without tensor cores.
    tiles: Number of thread blocks that the G query rows of a KV head are divided among.
    matrix_rows: Query rows of a thread block that rotates queries or merges parts.
    one_kernel: Whether one kernel does the whole call: thread blocks of a part rotate the queries
        themselves, and the last thread block of a tile merges its parts. Otherwise each step has
        its own kernel. With one kernel, the tiles of all KV heads number fewer than ``MANY_ROWS``.
    exact: Parts of the exact tokens, which come first.
    packed: Parts of the packed tokens.
    query_bytes: Shared memory of a thread block that rotates queries.
    part_bytes: Shared memory of a thread block that computes one part.
    merge_bytes: Shared memory of a thread block that merges parts.
    """

    operands: int
    tiles: int
    matrix_rows: int
    one_kernel: bool
    exact: Parts
    packed: Parts
    query_bytes: int
    part_bytes: int
    merge_bytes: int

    @property
    def parts(self) -> int:
        """Number of all parts of a sequence."""
        return self.exact.number + self.packed.number

    @property
    def numbers(self) -> tuple[int, ...]:
        """The fields of ``rotormlx_attend_plan``, in its order."""
        rows, sizes = self[:3], self[6:]
        return *rows, int(self.one_kernel), *self.exact, *self.packed, *sizes


@lru_cache(maxsize=1024)
def attend_plan(shape: Shape, device: Device = ANY_DEVICE) -> Plan:
    """Return the plan of a call on a device."""
    group_rows = shape.heads // shape.kv_heads * shape.length
    widths = (shape.key_dim, shape.value_dim, shape.key_bits, shape.value_bits)
    operands = 0 if shape.is_float32 else 1 if group_rows <= 8 else 2
    # The widest codes and longest vectors need more shared memory than some devices have.
    while operands and part_shared_bytes(*widths, operands) > device.shared_bytes:
        operands -= 1
    tiles = -(-group_rows // (8 * max(operands, 1)))
    kv_heads = shape.batch * shape.kv_heads
    blocks_at_once = device.multiprocessors * (2 if operands == 2 else 3)
    limit = max(1, min(MAX_PARTS // 2, blocks_at_once // (kv_heads * tiles)))
    matrix_rows = 8 if kv_heads * group_rows >= MANY_ROWS else 1
    return Plan(
        operands,
        tiles,
        matrix_rows,
        # With many rows, too many thread blocks would rotate the same row.
        shape.has_stages and operands > 0 and matrix_rows == 1,
        *cut_both(shape.exact_tokens, shape.packed_tokens, limit),
        query_bytes=query_shared_bytes(shape.key_dim, matrix_rows),
        part_bytes=part_shared_bytes(*widths, operands),
        merge_bytes=merge_shared_bytes(shape.value_dim, matrix_rows),
    )


def cut_both(exact_tokens: int, packed_tokens: int, limit: int) -> tuple[Parts, Parts]:
    """Return the parts of exact and of packed tokens; ``limit`` parts run at once.

    Exact parts begin first. If they are short compared with the packed parts, packed tokens are cut
    into ``limit`` parts, and some of these begin after the exact parts end.
    """
    # An exact token costs as much as four packed ones, roughly in proportion to its bytes.
    exact_cost = 4 * exact_tokens
    exact_limit = limit * exact_cost // max(exact_cost + packed_tokens, 1)
    exact = cut(exact_tokens, max(exact_limit, 1), EXACT_STEP)
    beside = cut(packed_tokens, max(limit - exact.number, 1), PACKED_STEP)
    after = cut(packed_tokens, limit, PACKED_STEP)
    return exact, beside if beside.tokens <= after.tokens + 4 * exact.tokens else after


# ---- shared memory: the sizes of the structures of the kernels ----------------------------------


def part_shared_bytes(
    key_dim: int, value_dim: int, key_bits: int, value_bits: int, operands: int
) -> int:
    """Return the bytes of ``AttendPlain``; with operands, large enough for ``AttendShape`` too."""
    rows = 8 * max(operands, 1)
    levels = sum(2 ** (bits + (bits in TRELLIS_BITS)) for bits in (key_bits, value_bits))
    plain = 4 * (rows * (key_dim + 4 * BLOCK + 4) + levels)
    if operands == 0:
        return plain
    key_loads, key_steps = _loads(key_bits, key_dim)
    value_loads, _ = _loads(value_bits, BLOCK)
    slot = max(_item(key_loads, BLOCK) + 1, _item(value_loads, value_dim))
    slots = 4 if slot <= 8 else 3
    # In units of 16 bytes. For trellis codes, zeros follow each load.
    load = 33 if key_bits in TRELLIS_BITS or value_bits in TRELLIS_BITS else 32
    operand_steps = key_steps + -(-key_dim // 32)
    units = 4 * slots * slot * load + 32 * operands * operand_steps
    units += rows + rows * max(4 * BLOCK // 8 + 16, key_dim // 4) + 12
    units += 32 if 8 in (key_bits, value_bits) else 0
    return max(16 * units, 16 * rows * (2 + value_dim), plain)


def query_shared_bytes(key_dim: int, rows: int) -> int:
    """Return the bytes of ``QueryShape``, for a kernel that rotates ``rows`` queries at once."""
    return 4 * rows * key_dim * (1 + THREADS // 32)


def merge_shared_bytes(value_dim: int, rows: int) -> int:
    """Return the bytes of ``MergeShape``, for a kernel that merges ``rows`` query rows at once."""
    warps = THREADS // 32
    sums = rows * max(warps // rows, 1) * value_dim
    return 4 * (2 * sums + warps * max(rows * value_dim, MAX_PARTS))


def _item(span_loads: int, lanes: int) -> int:
    """Return the loads per item of the ring, made of spans of 32 lanes; see ``Spans``."""
    return span_loads * min(max(8 // span_loads, 1), -(-lanes // 32))


def _loads(bits: int, axis: int) -> tuple[int, int]:
    """Return the number of loads of a thread for the packed axis, and of steps of 32 codes.

    A load is one word in each of four lanes.
    """
    share = 2 if bits in (2, 3) else 1
    loads = -(-axis // (32 * share))
    return loads * (2 if bits in (3, 8) else 1), loads * share
