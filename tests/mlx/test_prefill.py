"""Attention of many queries: MLX's own over exact tokens and decoded ones."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import rotation
from rotormlx.codec.format import BLOCK, KEY, ROLES, Codec, Packed, codec
from rotormlx.config import BITS, ROTATIONS, RotorConfig
from rotormlx.mlx import hook, integration, prefill
from rotormlx.mlx.attend_call import AttendCall
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.backends import backend, mlx_ops
from rotormlx.mlx.backends.mlx_ops import KERNEL, LIBRARY, MLXBackend, Prompts
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView
from tests.support import attend_cases
from tests.support import models as tiny
from tests.support.attend_cases import MASKS, ROUNDING, Case

# head_dims of MLX's fast kernels on Apple's GPUs.
METAL_DIMS = (64, 72, 80, 96, 128)
# Two queries of 36 rows of a KV head, all of them in the tail.
MANY = Case(length=36, repeats=2)


class Library:
    """MLX's attention, called as tests/support/attend_cases.py calls a platform."""

    def attend(self, queries, keys, values, *, launch=None, **options):
        chosen = backend()
        chosen.prompts = Prompts(LIBRARY, LIBRARY)
        call = AttendCall(queries, keys, values, **options)
        assert prefill.choice(call, chosen) == LIBRARY
        return prefill.attend(call, chosen)


LIBRARY_RUNNER = Library()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """One KV head and a few queries at once, so that every case takes several."""
    monkeypatch.setattr(prefill, "TILE_BYTES", 1)
    monkeypatch.setattr(prefill, "SCORE_BYTES", 2**15)


WAYS = {"scores": (), "channel": (72, 96, 120, 200), "mask": (64, 80, 96, 112, 128, 192)}


@pytest.fixture(params=WAYS)
def each_way(request, monkeypatch):
    """As if MLX had a fast kernel for no head_dim, for those with room for one more channel, or
    for those of the cases.
    """
    dims = WAYS[request.param]
    monkeypatch.setattr(prefill, "_FAST_DIMS", dims)
    monkeypatch.setattr(prefill, "_is_fast", lambda dim, *_: dim in dims)
    monkeypatch.setattr(prefill, "_MASK_CHANNELS", 0)
    return request.param


def check(case, pose=attend_cases.problem, roundings=None):
    """``roundings`` of the dtype, where vectors, weights and scores are rounded to 16 bits."""
    made = pose(case)
    if roundings is not None:
        size = np.abs(made.expected).max()
        made = replace(made, tolerance=roundings * ROUNDING[case.dtype] * size)
    made.check(LIBRARY_RUNNER)


# ---- packed tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_masks(each_way, mask):
    check(replace(MANY, mask=mask))


@pytest.mark.parametrize("bits", BITS)
def test_bits(each_backend, bits):
    check(replace(MANY, bits=(bits, 12 // bits if bits in (3, 4) else 10 - bits), mask="causal"))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("mask", ["causal", "bool"])
def test_16_bits(each_way, mask, dtype):
    check(replace(MANY, dtype=dtype, mask=mask), roundings=8)


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations(name):
    check(replace(MANY, rotation=name, dims=(96, 64), bits=(3, 4), mask="causal"))


@pytest.mark.parametrize("dims", [(64, 64), (112, 80), (128, 128), (192, 128)], ids=str)
def test_head_dims(each_way, dims):
    check(replace(MANY, dims=dims, mask="causal"))


@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_sink_logits(each_way, mask):
    check(replace(MANY, mask=mask, sink_logits=True))


@pytest.mark.parametrize(("mask", "length"), [("none", 26), ("causal", 20), ("causal", 26)])
def test_ragged_rows(each_way, mask, length):
    """One row counts fewer packed tokens; one none, and 23 tokens in all."""
    case = replace(MANY, batch=3, length=length, repeats=4, mask=mask)
    check(case, attend_cases.with_own_lengths)


@pytest.mark.parametrize("mask", ["causal", "padding"])
def test_rows_with_channel_scales_of_their_own(each_way, mask):
    check(replace(MANY, mask=mask), attend_cases.with_own_scales)


@pytest.mark.parametrize("change", [{"sink": 0}, {"missing": 0}, {"blocks": 1, "missing": 63}])
def test_edges_of_the_packed_tokens(each_way, change):
    check(replace(MANY, mask="causal", **change))
