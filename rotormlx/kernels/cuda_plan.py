"""How a call of attention is spread over the thread blocks of a CUDA GPU.

MLX's own CUDA build and the library for torch run the same kernels (``cuda_kernels/``), so both
take their plan from here: the first as numbers of a launch, the second as the structure
``rotormlx_attend_plan`` of ``cuda_kernels/launch.h``, which the launcher checks.

Shapes: B batch, H query heads, K KV heads, L queries, G = H / K * L query rows of a KV head,
D head_dim.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from rotormlx.codec.format import BLOCK, TRELLIS_BITS
from rotormlx.kernels.parts import Parts, cut

# Threads of a thread block of each kernel of attention.
THREADS = 128
# The most parts of a sequence: `MAX_PARTS` of scores.cuh.
MAX_PARTS = 512
# Parts are whole steps: a block for each warp of packed tokens; of exact ones, which take longer,
# what a warp takes.
PACKED_STEP, EXACT_STEP = THREADS // 32 * BLOCK, 32
# So many query rows share, by eight, what they read of a matrix; fewer are done at once, by one
# kernel where that can be.
MANY_ROWS = 2048
# Vectors of a lane are held in registers: longer ones are left to the host's operations.
MAX_HEAD_DIM = 256


class Device(NamedTuple):
    """The properties of a GPU that a plan depends on.

    multiprocessors: Their number.
    shared_bytes: The most shared memory of a thread block.
    """

    multiprocessors: int
    shared_bytes: int


# A large GPU, with as much shared memory as every GPU from sm_80 on has.
ANY_DEVICE = Device(132, 99 * 1024)


class Shape(NamedTuple):
    """The sizes of one attention call.

    heads: H.
    kv_heads: K.
    exact_tokens: The most exact tokens of a batch row, or the capacity of its buffer.
    packed_tokens: The most packed tokens of a batch row, or the capacity of its buffer.
    is_float32: Whether queries are float32, which the tensor cores do not take.
    has_stages: Whether thread blocks can rotate rows by themselves, since the rotations of keys and
        values have stages.
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
    """How a call is spread over thread blocks.

    operands: Of 8 query rows each, in a thread block on the tensor cores; 0: one of 8 rows without
        them.
    tiles: Thread blocks that share the G query rows of a KV head.
    matrix_rows: Query rows of a thread block that rotates queries or merges parts.
    one_kernel: Whether thread blocks that do a part rotate queries themselves, and the last of a
        tile merges its parts; else there is a kernel for each. Tiles of all KV heads are then fewer
        than ``MANY_ROWS``.
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
        """All parts of a sequence."""
        return self.exact.number + self.packed.number

    @property
    def numbers(self) -> tuple[int, ...]:
        """The fields of ``rotormlx_attend_plan``, in its order."""
        rows, sizes = self[:3], self[6:]
        return *rows, int(self.one_kernel), *self.exact, *self.packed, *sizes


@lru_cache(maxsize=1024)
def attend_plan(shape: Shape, device: Device = ANY_DEVICE) -> Plan:
    """The plan of a call on a device."""
    group_rows = shape.heads // shape.kv_heads * shape.length
    widths = (shape.key_dim, shape.value_dim, shape.key_bits, shape.value_bits)
    operands = 0 if shape.is_float32 else 1 if group_rows <= 8 else 2
    # The widest codes and longest vectors take more shared memory than some devices have.
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
        # Many rows would be rotated by too many thread blocks each.
        shape.has_stages and operands > 0 and matrix_rows == 1,
        *cut_both(shape.exact_tokens, shape.packed_tokens, limit),
        query_bytes=query_shared_bytes(shape.key_dim, matrix_rows),
        part_bytes=part_shared_bytes(*widths, operands),
        merge_bytes=merge_shared_bytes(shape.value_dim, matrix_rows),
    )


def cut_both(exact_tokens: int, packed_tokens: int, limit: int) -> tuple[Parts, Parts]:
    """The parts of exact and of packed tokens, of which ``limit`` run at once.

    Exact parts begin first. Where they are short beside the packed ones, those take as many thread
    blocks as if there were no others, and some of them begin when the exact ones have ended.
    """
    # An exact token costs as much as four packed ones, about as its bytes.
    exact_cost = 4 * exact_tokens
    exact_limit = limit * exact_cost // max(exact_cost + packed_tokens, 1)
    exact = cut(exact_tokens, max(exact_limit, 1), EXACT_STEP)
    beside = cut(packed_tokens, max(limit - exact.number, 1), PACKED_STEP)
    after = cut(packed_tokens, limit, PACKED_STEP)
    return exact, beside if beside.tokens <= after.tokens + 4 * exact.tokens else after


# ---- shared memory, as the structures of the kernels lay it out ---------------------------------


def part_shared_bytes(
    key_dim: int, value_dim: int, key_bits: int, value_bits: int, operands: int
) -> int:
    """Bytes of ``AttendPlain``, and with operands of ``AttendShape`` too."""
    rows = 8 * max(operands, 1)
    levels = sum(2 ** (bits + (bits in TRELLIS_BITS)) for bits in (key_bits, value_bits))
    plain = 4 * (rows * (key_dim + 4 * BLOCK + 4) + levels)
    if operands == 0:
        return plain
    key_loads, key_steps = _loads(key_bits, key_dim)
    value_loads, _ = _loads(value_bits, BLOCK)
    slot = max(_item(key_loads, BLOCK) + 1, _item(value_loads, value_dim))
    slots = 4 if slot <= 8 else 3
    # In units of 16 bytes; behind each load stand zeros, where there is a trellis.
    load = 33 if key_bits in TRELLIS_BITS or value_bits in TRELLIS_BITS else 32
    operand_steps = key_steps + -(-key_dim // 32)
    units = 4 * slots * slot * load + 32 * operands * operand_steps
    units += rows + rows * max(4 * BLOCK // 8 + 16, key_dim // 4) + 12
    units += 32 if 8 in (key_bits, value_bits) else 0
    return max(16 * units, 16 * rows * (2 + value_dim), plain)


def query_shared_bytes(key_dim: int, rows: int) -> int:
    """Bytes of ``QueryShape``, for a kernel that rotates ``rows`` queries at once."""
    return 4 * rows * key_dim * (1 + THREADS // 32)


def merge_shared_bytes(value_dim: int, rows: int) -> int:
    """Bytes of ``MergeShape``, for a kernel that merges ``rows`` query rows at once."""
    warps = THREADS // 32
    sums = rows * max(warps // rows, 1) * value_dim
    return 4 * (2 * sums + warps * max(rows * value_dim, MAX_PARTS))


def _item(span_loads: int, lanes: int) -> int:
    """Return the loads per item of the ring: spans of 32 lanes up to 8 loads; see ``Spans``."""
    return span_loads * min(max(8 // span_loads, 1), -(-lanes // 32))


def _loads(bits: int, axis: int) -> tuple[int, int]:
    """Words of four lanes that a thread loads for the packed axis, and steps of 32 codes."""
    share = 2 if bits in (2, 3) else 1
    loads = -(-axis // (32 * share))
    return loads * (2 if bits in (3, 8) else 1), loads * share
