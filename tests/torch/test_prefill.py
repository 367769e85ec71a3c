"""Attention of many queries: torch's own over exact tokens and decoded tiles."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rotormlx.codec import rotation
from rotormlx.codec.format import KEY, Codec
from rotormlx.config import ROTATIONS, RotorConfig
from rotormlx.torch import prefill, torch_ops
from rotormlx.torch.torch_ops import AttendCall
from tests.support.torch_attend import (
    DTYPES,
    LAYER,
    LENGTHS,
    SINK,
    H,
    K,
    check,
    make_sources,
    masks,
    rows,
)

# Fewer than the exact tokens of every row, as in a cache.
MANY = 30


def attend(query, lengths, keys, values, config, *, layer, scale, causal, mask, sink_logits):
    call = AttendCall(query, lengths, keys, values, config.sink, scale, causal, mask, sink_logits)
    return prefill.attend(call, [tuple(pair) for pair in lengths.tolist()])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of one block of both rows, so that every case merges several."""
    monkeypatch.setattr(prefill, "TILE_NUMBERS", 1)


@pytest.mark.parametrize("name", masks(100, 5))
def test_masks(name):
    if name != "nothing":
        check(RotorConfig(), (80, 112), name, length=MANY, attend=attend)


@pytest.mark.parametrize("mask", [torch.tensor(False), torch.tensor(-torch.inf)], ids=str)
def test_a_query_that_sees_nothing_gets_zero(mask):
    sources, _ = make_sources(RotorConfig(), (80, 112), torch.float32)
    facts = {"layer": LAYER, "scale": 0.1, "causal": False, "mask": mask, "sink_logits": None}
    query = rows((len(LENGTHS), H, MANY, 80))
    assert attend(query, torch.tensor(LENGTHS), *sources, RotorConfig(), **facts).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "dims"), [((2, 3), (64, 64)), ((3, 8), (112, 80)), ((8, 4), (192, 128))], ids=str
)
def test_bits(bits, dims, dtype):
    # Decoded vectors, weights, parts and the output are rounded.
    check(RotorConfig(*bits), dims, "causal", dtype, length=MANY, attend=attend, roundings=4)


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations(name):
    check(RotorConfig(3, 4, name), (96, 64), "causal", length=MANY, attend=attend)


@pytest.mark.parametrize("name", ["none", "causal", "bool"])
def test_sink_logits(name):
    logits = np.linspace(-3, 6, H).astype(np.float32)
    check(RotorConfig(), (64, 80), name, length=MANY, logits=logits, attend=attend)


@pytest.mark.parametrize(
    "short", [(0, 0), (0, 2), (0, SINK), (0, MANY), (0, 50), (64, 64 + SINK + MANY)], ids=str
)
@pytest.mark.parametrize("name", ["causal", "bool"])
def test_short_rows(short, name):
    """Beside a long one, a row with fewer tokens than queries, as many, or one packed block."""
    lengths = (LENGTHS[0], short)
    check(RotorConfig(), (64, 80), name, length=MANY, lengths=lengths, attend=attend)


@pytest.mark.parametrize("logits", [None, np.linspace(-3, 6, H).astype(np.float32)])
def test_first_chunk(logits):
    facts = {"length": MANY, "lengths": ((0, MANY), (0, MANY)), "logits": logits}
    check(RotorConfig(), (64, 64), "causal", attend=attend, **facts)


def test_tokens_behind_the_last_column_are_hidden():
    sources, _ = make_sources(RotorConfig(), (64, 64), torch.float32)
    facts = {"layer": LAYER, "scale": 0.1, "causal": False, "sink_logits": None}
    query, lengths = rows((len(LENGTHS), H, MANY, 64)), torch.tensor(LENGTHS)
    mask = torch.zeros(MANY, LENGTHS[0][1])
    mask[:, 200:] = -torch.inf
    found, expected = (
        attend(query, lengths, *sources, RotorConfig(), mask=m, **facts)
        for m in (mask[:, :200], mask)
    )
    assert torch.equal(found, expected)


def test_calibrated_rotations():
    """A matrix of its own for every KV head, none of which keeps lengths."""
    sources, _ = make_sources(RotorConfig(channel_scale="none"), (64, 64), torch.float32)
    matrices = np.random.default_rng(3).normal(size=(K, 64, 64)) + 8 * np.eye(64)
    chosen = rotation.calibrated(matrices.astype(np.float32))
    keys = replace(sources[0], codec=Codec(KEY, 4, chosen))
    keys.packed.scales.nan_to_num_(1.0)
    call = AttendCall(
        rows((len(LENGTHS), H, MANY, 64)) / 9,
        torch.tensor(LENGTHS),
        keys,
        sources[1],
        SINK,
        0.1,
        True,
        None,
        None,
    )
    expected = torch_ops.attend(call)
    error = (prefill.attend(call, LENGTHS) - expected).abs().max()
    assert error < 2e-6 * expected.abs().max()
