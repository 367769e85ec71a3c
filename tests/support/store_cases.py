"""Caches of which a step is stored by the kernel ``store``, and row by row in numpy.

The judge of a channel scale is torch; blocks are to be those of the kernel ``encode``.
"""

import copy
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import torch

from rotormlx.codec.format import BLOCK, KEY, ROLES, Codec, Packed, codec
from rotormlx.codec.rotation import calibrated
from rotormlx.config import RotorConfig
from rotormlx.torch import torch_ops
from tests.support import cuda_calls
from tests.support.codec_cases import DTYPES, rows

K, BLOCKS = 2, 3
# As numpy has them: bfloat16 as its bits.
NUMPY = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class StoreCase:
    """A cache, and steps of as many new tokens.

    Attributes:
        scale: ``none``, ``shared`` by the batch rows, of ``rows``, or ``own``, of a first block.
        rotation: Its name; ``calibrated`` for a matrix of each KV head.
        slack: Exact tokens that there is room for beyond a full tail.
        quiet: Whether a channel is very small, and all of a head zero in one row.
    """

    bits: tuple[int, int]
    dtype: str
    window: int
    sink: int
    length: int
    scale: str
    dims: tuple[int, int] = (80, 64)
    rotation: str = "cascade"
    slack: int = 5
    quiet: bool = False

    @property
    def codecs(self):
        """Of keys and values."""
        facts = zip(ROLES, self.bits, self.dims, strict=True)
        if self.rotation == "calibrated":
            return tuple(Codec(r, bits, calibrated_rotation(dim)) for r, bits, dim in facts)
        config = RotorConfig(*self.bits, self.rotation, seed=7)
        return tuple(codec(config, dim, layer=3, role=role) for role, _, dim in facts)

    @property
    def capacity(self):
        """Room for exact tokens."""
        return self.sink + self.window + BLOCK + self.slack

    @property
    def lengths(self):
        """Packed and exact tokens of rows that differ: of which a block is due soon, due at once,
        behind their last block, empty, and without room for a token.
        """
        full = self.sink + self.window + BLOCK
        counts = [(0, full - 2), (1, full), (BLOCKS, self.capacity - 2), (0, 0), (1, self.capacity)]
        return np.array([(n * BLOCK, n * BLOCK + exact) for n, exact in counts], np.int32)


@cache
def calibrated_rotation(dim):
    """A matrix for each KV head."""
    return calibrated(np.random.default_rng(0).normal(size=(K, dim, dim)))


def numbers(shape, dtype, seed):
    """Numbers as a cache holds them."""
    x = torch.from_numpy(rows(shape, seed, offset=3)).to(TORCH[dtype])
    return (x.view(torch.int16) if dtype == "bf16" else x).numpy().view(NUMPY[dtype])


def as_torch(x, dtype):
    """A tensor of the same memory."""
    if dtype != "bf16":
        return torch.from_numpy(x)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)


def new_tokens(case, seed):
    """Keys and values of a step."""
    shape = (len(case.lengths), K, case.length)
    return [numbers((*shape, dim), case.dtype, seed) for dim in case.dims]


def first_state(case):
    """The buffers of a cache before its first step; what does not count is no number."""
    lengths, state = case.lengths, SimpleNamespace(exact=[], packed=[], channel_scale=[])
    state.lengths, state.counter = lengths, np.zeros(len(lengths), np.int32)
    for chosen in case.codecs:
        exact = numbers((len(lengths), K, case.capacity, chosen.head_dim), case.dtype, 1)
        if case.quiet:
            exact[..., 3] *= 1e-4
            exact[0, 1] = 0
        for row, (packed, tokens) in enumerate(lengths):
            exact[row, :, tokens - packed :].view(np.uint8)[...] = 0xFF
        state.exact.append(exact)
        blocks = (len(lengths), K, BLOCKS)
        state.packed.append(
            Packed(
                np.full((*blocks, *chosen.words_shape), 2**32 - 1, np.uint32),
                np.full((*blocks, BLOCK), np.nan, np.float16),
                np.full((*blocks, chosen.head_dim), np.nan, np.float16)
                if chosen.role == KEY
                else None,
            )
        )
        shape = (len(lengths), K, chosen.head_dim)
        scale = np.exp(np.random.default_rng(5).normal(size=shape)).astype(np.float32)
        of_kind = {"none": None, "shared": scale[0].copy(), "rows": scale, "own": scale}
        state.channel_scale.append(of_kind[case.scale])
    return state


def store_rows(state, new, case):
    """What the kernel has to do, one batch row after the other."""
    for row, (packed, tokens) in enumerate(state.lengths):
        exact = tokens - packed
        due = exact - case.sink >= case.window + BLOCK and packed < BLOCKS * BLOCK
        left = exact - BLOCK if due else exact
        added = min(case.length, case.capacity - left)
        for i in range(2):
            of_row = state.exact[i][row]
            if due:
                pack_row(state, i, row, case)
                of_row[:, case.sink : left] = of_row[:, case.sink + BLOCK : exact].copy()
            of_row[:, left : left + added] = new[i][row, :, :added]
        state.lengths[row] = (packed + BLOCK, tokens + added) if due else (packed, tokens + added)


def pack_row(state, i, row, case):
    """The oldest block of a row's tail, and the row's channel scale where it is the first."""
    chosen, packed = case.codecs[i], state.lengths[row, 0]
    x = state.exact[i][row : row + 1, :, case.sink : case.sink + BLOCK]
    x = as_torch(np.ascontiguousarray(x), case.dtype)
    scale = state.channel_scale[i]
    if case.scale == "own" and packed == 0:
        scale[row] = torch_ops.prefill_scale(x, chosen).numpy()
    if case.scale in ("rows", "own"):
        scale = scale[row]
    x = mx.array(x.float().numpy()).astype(DTYPES[case.dtype])
    made = cuda_calls.encode(x, chosen, channel_scale=scale)
    for to, part in zip(state.packed[i], made, strict=True):
        if part is not None:
            to[row, :, packed // BLOCK] = part[0, :, 0]


def check_steps(runner, case, steps=4):
    """After each step all buffers hold the same bits.

    Args:
        runner: ``CUDA`` of tests/support/runners.py.
        case: The cache.
        steps: How many.
    """
    state = first_state(case)
    expected = copy.deepcopy(state)
    for step in range(steps):
        new = new_tokens(case, seed=10 + step)
        runner.store(state, new, case)
        store_rows(expected, new, case)
        for found, wanted in zip(arrays(state), arrays(expected), strict=True):
            assert np.array_equal(found.view(np.uint8), wanted.view(np.uint8))


def arrays(state):
    """All that a step may change."""
    parts = [state.lengths, state.counter, *state.exact, *state.channel_scale]
    parts += [a for packed in state.packed for a in packed]
    return [a for a in parts if a is not None]
