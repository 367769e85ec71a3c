"""``scripts/rivals.py``: what its rows measure, on a tiny model of transformers."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import typer
from transformers import DynamicCache

from rotormlx.measure import schemes
from rotormlx.measure.baselines import SimulatedCache
from rotormlx.measure.schemes import Scheme, scheme
from scripts import rivals
from tests.support import torch_models

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST, TOKENS = 128, 321


class Doubling:
    """A codec that gives back everything twice as large, or as it is."""

    block = 64

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def decoded(self, x: Any, *, layer: int, role: str) -> Any:
        return self.factor * x

    def bits_per_value(self, head_dim: int, role: str) -> float:
        return 5.0


def simulated(factor: float) -> Scheme:
    return Scheme("fake", lambda layer: SimulatedCache(Doubling(factor), layer, sink=4, window=0))


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> Any:
    return torch_models.build(request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch_models.tokens(TOKENS)


def exact(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return rivals.log_probabilities(model, ids, DynamicCache(config=model.config), FIRST)


def cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


def test_log_probabilities_are_those_of_the_whole_text(model: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        logits = model(ids).logits[0, FIRST:-1]
    # Chunks add in another order.
    torch.testing.assert_close(
        exact(model, ids), torch.log_softmax(logits.float(), -1), atol=2e-4, rtol=0
    )


def test_a_row_of_a_codec_without_loss_is_zero(model: Any, ids: torch.Tensor) -> None:
    line = rivals.row(model, ids, exact(model, ids), simulated(1.0))
    found = "`fake` | 5.000 | 4 + 0 | 0.00000 | 0.00000 to 0.00000 | 0.00000 | 0.000 | 100.0%"
    assert line == f"| {found} |"


def test_a_simulated_row_reads_coded_blocks_only_of_full_attention(
    model: Any, ids: torch.Tensor
) -> None:
    with rivals.simulated_cache(model, simulated(2.0)) as (cache, bits):
        rivals.log_probabilities(model, ids, cache, FIRST)
        assert bits() == 5
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(cache.layers)
    own = DynamicCache(config=model.config)
    rivals.log_probabilities(model, ids, own, FIRST)
    full = [kind == "full_attention" for kind in kinds]
    assert [isinstance(layer, rivals.SimulatedLayer) for layer in cache.layers] == full
    # The input of the first of these layers is exact.
    index = full.index(True)
    layer, x = cache.layers[index], own.layers[index].keys.numpy()
    # 321 tokens, the last one unread: 4 of the sink, then whole blocks, then the tail.
    assert layer.held.packed_tokens == 256
    kept = np.array(layer.held.keys_and_values()[0])
    x[:, :, 4:260] *= 2
    np.testing.assert_allclose(kept, x, atol=1e-4)  # sums in float32


def test_our_row_is_of_the_real_cache(model: Any, ids: torch.Tensor) -> None:
    before, reference = model.config._attn_implementation, exact(model, ids)
    chosen = scheme("k2v3:window=0,sink=7")
    with rivals.our_cache(model, chosen.config) as (cache, bits):
        rivals.log_probabilities(model, ids, cache, FIRST)
        assert cache.packed_tokens == 256
        # As the cache of mlx-lm says it of the same config.
        head_dim = cache.rotor_layers[0].stores[0].codec.head_dim
        other, x = chosen.make(0), mx.zeros((1, 1, 128, head_dim))
        other.update_and_fetch(x, x)
        assert bits() == pytest.approx(other.bits_per_value)
        assert 2.5 < bits() < 4
    assert model.config._attn_implementation == before
    row = cells(rivals.row(model, ids, reference, chosen))
    assert row[2] == "7 + 0"
    assert float(row[3]) > 0
    # More bits, less divergence.
    finer = cells(rivals.row(model, ids, reference, scheme("k8v8:window=0,sink=7")))
    assert float(finer[3]) < float(row[3]) / 4


def test_row_refuses_what_packs_nothing(model: Any, ids: torch.Tensor) -> None:
    for name in ("k4v4:window=300", "kivi-k4v4:window=300"):
        with pytest.raises(RuntimeError, match="must read packed tokens, but k"):
            rivals.row(model, ids, exact(model, ids), scheme(name))


@pytest.mark.parametrize("name", ["exact", "affine-k4v4", "k4v4:calibrated=scale"])
def test_read_refuses(name: str) -> None:
    with pytest.raises(typer.BadParameter, match=re.escape(f"got {name!r}")):
        rivals.read([name])


def test_default_schemes_are_all_rivals_packed_alike() -> None:
    names = list(rivals.default_schemes())
    chosen = rivals.read(names)
    assert {(c.make(0).sink, c.make(0).window) for c in chosen if c.config is None} == {(4, 0)}
    assert {(c.config.sink, c.config.window) for c in chosen if c.config} == {(4, 0)}
    for family in schemes.RIVALS:
        assert any(name.startswith(f"{family}-") for name in names)
