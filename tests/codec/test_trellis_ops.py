"""Paths in operations of MLX and torch are those of the reference in float32, bit for bit."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from rotormlx.codec import codebook, trellis, trellis_ops
from rotormlx.codec.format import TRELLIS_BITS

LIBRARIES = {"mlx": mx, "torch": torch}


@pytest.fixture(params=LIBRARIES)
def cheapest_path(request):
    def find(z, state, bits):
        if request.param == "mlx":
            found = trellis_ops.cheapest_path(mx, mx.array(z), mx.array(state, mx.uint32), bits)
            return [np.array(a) for a in found]
        state = torch.from_numpy(state.astype(np.int32))
        found = trellis_ops.cheapest_path(torch, torch.from_numpy(z), state, bits)
        return [a.numpy().view(np.uint32) for a in found]

    return find


def exact_ties(bits, shape, rng):
    """Numbers halfway between two levels, of which many leave two paths or two members equal."""
    levels = np.sort(codebook.trellis_levels(bits))
    step = rng.choice([1, 2, 4], shape)
    lower = rng.integers(0, len(levels) - step)
    return ((levels[lower] + levels[lower + step]) / 2).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "ties", "outliers", "zeros"])
@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_the_path_is_that_of_the_reference(cheapest_path, bits, kind):
    rng = np.random.default_rng(1)
    shape = (80, 300)
    z = {
        "normal": lambda: rng.normal(size=shape),
        "ties": lambda: exact_ties(bits, shape, rng),
        "outliers": lambda: rng.standard_cauchy(shape).clip(-9, 9),
        "zeros": lambda: np.zeros(shape),
    }[kind]().astype(np.float32)
    state = rng.integers(0, trellis.STATES, shape[1])
    codes, index = cheapest_path(z, state, bits)

    # The reference begins behind three numbers that have codes.
    begun = np.concatenate([np.zeros((3, shape[1]), np.float32), z])
    wanted = trellis.encode(begun, bits, start=3, state=state)
    assert np.array_equal(codes, wanted[3:])
    assert np.array_equal(index, trellis.level_codes(wanted, bits, start=3, state=state)[3:])


@pytest.mark.parametrize("library", LIBRARIES)
def test_low_bits_of_magnitudes_are_read_from_whole_words(library):
    rng = np.random.default_rng(2)
    words = rng.integers(0, 2**32, (5, 40), dtype=np.uint32)
    before = np.concatenate([np.zeros((1, 40), np.uint32), words[:-1]])
    if library == "mlx":
        found = np.array(trellis_ops.low_magnitudes(mx.array(words), mx.array(before)))
    else:
        pair = (torch.from_numpy(a.view(np.int32)) for a in (words, before))
        found = trellis_ops.low_magnitudes(*pair).numpy().view(np.uint32)
    fields = np.arange(16, dtype=np.uint32)[:, None] * 2
    codes = (words[:, None] >> fields & 3).reshape(80, 40)
    wanted = trellis.level_codes(codes, 2) & 3
    assert np.array_equal((found[:, None] >> fields & 3).reshape(80, 40), wanted)
