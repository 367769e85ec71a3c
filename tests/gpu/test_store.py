"""The kernel that stores a decode step leaves the right bits in all buffers, in the emulator."""

import pytest

from rotormlx.codec.format import BLOCK
from tests import emulator
from tests.support.runners import CUDA
from tests.support.store_cases import StoreCase, check_steps, first_state, new_tokens

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

CASES = [
    StoreCase((2, 2), "bf16", 0, 0, 1, "none"),
    StoreCase((3, 3), "f32", 64, 4, 3, "own"),
    StoreCase((4, 4), "bf16", 70, 4, 1, "rows"),
    StoreCase((8, 8), "f32", 0, 4, 3, "own", rotation="rotor3"),
    # Eight lanes have a row of keys, and their squares are an odd number of times added in halves.
    StoreCase((2, 2), "f32", 70, 0, 1, "own", (72, 64)),
    StoreCase((3, 3), "bf16", 0, 0, 3, "shared"),
    StoreCase((4, 4), "f32", 64, 0, 1, "own"),
    StoreCase((8, 8), "bf16", 64, 4, 1, "none"),
    StoreCase((4, 4), "f32", 0, 0, 3, "own", quiet=True),
    StoreCase((4, 4), "f32", 0, 0, 3, "none", rotation="calibrated"),
    # As many tokens as a call may bring; more than two chunks of tail.
    StoreCase((4, 3), "f16", 130, 4, 64, "own", (64, 96), slack=64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_leave_the_right_bits(case):
    check_steps(CUDA, case)


@pytest.mark.parametrize("order", [1, 12345])
def test_execution_order_does_not_matter(order):
    with emulator.execution_order(order):
        check_steps(CUDA, StoreCase((3, 3), "f32", 64, 4, 3, "own"), steps=3)


def test_lengths_beyond_the_buffers_count_as_theirs():
    case = StoreCase((4, 4), "f32", 64, 0, 1, "own")
    state = first_state(case)
    state.lengths[...] = [(-5, 3), (2**30, 2**31 - 1), (0, -1), (BLOCK, 0), (0, 2**30)]
    CUDA.store(state, new_tokens(case, seed=10), case)
    all_blocks = state.packed[0].words.shape[2] * BLOCK
    full, left = case.capacity, case.capacity - BLOCK
    assert state.lengths.tolist() == [
        *([0, 4], [all_blocks, all_blocks + full], [0, 1]),
        *([BLOCK, BLOCK + 1], [BLOCK, BLOCK + left + 1]),
    ]
