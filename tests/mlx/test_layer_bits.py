"""Bits where they count: what is measured, how bits are allotted, and what caches make of it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, save_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as own_caches

import rotormlx
from rotormlx.codec import layer_bits, reference
from rotormlx.codec.format import BLOCK, KEY, codec
from rotormlx.config import BITS, RotorConfig
from rotormlx.measure import cache_contents, layer_losses, schemes, scoring
from rotormlx.mlx import calibration, hosts
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.storage import tensor_file
from rotormlx.storage.calibration import Calibration
from rotormlx.storage.fingerprint import MODEL
from tests.support import models as tiny

TOKENS = 4 + 3 * BLOCK
THREE = RotorConfig(3, 3, window=0)
# Of layers 0 and 1, keys and values: the first needs far more bits than the others.
LOSSES = [[1.0, 1e-2], [2e-2, 1e-4]]
GIVEN = [(4, 3), (3, 2)]


class Bytes:
    """A tokenizer: a token a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


TEXT = "".join(chr(97 + n) for n in np.random.default_rng(0).integers(0, 26, 4 * TOKENS))


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.build("llama")


@pytest.fixture(scope="module")
def measured(llama: Any) -> Calibration:
    return rotormlx.calibrate(llama, Bytes(), text=TEXT, tokens=TOKENS, layers=True)


@pytest.fixture
def made(measured: Calibration) -> Calibration:
    """A calibration with losses that are known."""
    numbers = measured.numbers | {
        f"{layer}.{role}.loss": np.array([loss], np.float32)
        for layer, pair in enumerate(LOSSES)
        for role, loss in zip(("key", "value"), pair, strict=True)
    }
    return Calibration("scale", measured.model, numbers, TOKENS)


@pytest.fixture(autouse=True)
def removed(llama: Any) -> Any:
    yield
    rotormlx.remove(llama)


def bits_of(caches: list[Any]) -> list[tuple[int, int]]:
    return [(cache.config.key_bits, cache.config.value_bits) for cache in caches]


# ---- allotting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_squared_error_is_that_of_the_code(bits: int) -> None:
    """Of normal numbers, each along its path where there is one."""
    chosen = codec(RotorConfig(bits, bits, "identity"), 1024, layer=0, role=KEY)
    z = np.random.default_rng(2).normal(size=(1, 1, BLOCK, 1024))
    z *= 32 / np.linalg.norm(z, axis=-1, keepdims=True)
    packed = reference.encode(z, chosen, centres=np.zeros((1, 1, 1, 1024)))
    level = reference.levels(reference.unpack(packed.words, chosen), chosen)
    # 65,536 numbers.
    assert layer_bits.squared_error(bits) == pytest.approx(np.mean((z - level) ** 2), rel=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_allotment_is_much_better(seed: int) -> None:
    """All 4,096 allotments of six parts of unequal size, by force."""
    rng = np.random.default_rng(seed)
    loss, sizes = rng.gamma(0.5, size=6), rng.integers(1, 4, size=6).astype(float)
    every = np.array(list(itertools.product(BITS, repeat=6)))
    error = {bits: layer_bits.squared_error(bits) for bits in BITS}
    total = np.vectorize(error.get)(every) @ loss
    best = total[every @ sizes <= 3 * sizes.sum()].min()
    found = layer_bits.allotted(loss, sizes, 3)
    assert found @ sizes <= 3 * sizes.sum()
    # Steps from 4 to 8 bits and sizes that do not add up keep a greedy choice from the very best.
    assert np.vectorize(error.get)(found) @ loss < 1.15 * best
    assert 1.15 * best < error[3] * loss.sum()


@pytest.mark.parametrize("mean", [2, 3, 3.5, 4, 8])
def test_all_bits_are_given(mean: float) -> None:
    loss = np.random.default_rng(1).gamma(1, size=(30, 2)) * [5, 1]
    found = layer_bits.allotted(loss, np.ones_like(loss), mean)
    # A last step of 4 bits may not fit: less than that is left over.
    assert 0 <= mean * found.size - found.sum() < 4
    assert found[:, 0].mean() >= found[:, 1].mean()


# ---- measuring ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "bits"), [(0, (3, 8)), (1, (8, 3))])
def test_a_loss_is_that_of_one_layer(
    llama: Any, measured: Calibration, layer: int, bits: tuple[int, int]
) -> None:
    ids = Bytes().encode(TEXT[-TOKENS:])
    caches: list[Any] = [KVCache(), KVCache()]
    caches[layer] = RotorKVCache(RotorConfig(*bits, window=0), layer)
    with hosts.MLX_LM.in_place():
        exact, coded = (scoring.score(llama, ids, c) for c in ([KVCache(), KVCache()], caches))
    wanted = scoring.differences(exact, coded, start=128).kl.mean()
    role = ("key", "value")[bits.index(3)]
    # Sums of float32 in another order, on divergences of 1e-5 and more.
    assert wanted > 1e-6
    assert measured.numbers[f"{layer}.{role}.loss"][0] == pytest.approx(wanted, rel=0.05)


def test_measuring_computes_in_float32_and_leaves_the_model_as_it_was() -> None:
    model = tiny.build("llama")
    wide = layer_losses.losses(model, Bytes().encode(TEXT[:TOKENS]), [1], lambda n: None)
    model.set_dtype(mx.bfloat16)
    before = tree_flatten(model.parameters())
    told: list[int] = []
    found = layer_losses.losses(model, Bytes().encode(TEXT[:TOKENS]), [1], told.append)
    # The weights are rounded, what is computed with them is not.
    assert found == pytest.approx(wide, rel=0.2)
    assert sum(told) == 3 * (TOKENS - 1)
    after = tree_flatten(model.parameters())
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
    assert not hosts.MLX_LM.installed()


def test_predictions_that_are_not_finite_are_refused() -> None:
    model = tiny.build("llama")
    model.model.norm.weight = model.model.norm.weight * mx.nan
    with pytest.raises(ValueError, match=r"^\[calibration\] A model must predict finite numbers"):
        layer_losses.losses(model, Bytes().encode(TEXT[:TOKENS]), [0], lambda n: None)


# ---- files --------------------------------------------------------------------------------------


def test_a_file_gives_it_back(llama: Any, measured: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    measured.save(path)
    found = calibration.load(path, llama)
    assert found.has_losses
    assert set(found.numbers) == set(measured.numbers)
    assert not found.without_losses.has_losses
    assert found.numbers_a_head == found.without_losses.numbers_a_head == 64


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"1.key.loss": None}, "name its arrays by layer and role"),
        ({"2.key.loss": np.ones(1, np.float32)}, "name its arrays by layer and role"),
        ({"1.key.loss": np.array([-1], np.float32)}, "hold a loss not below zero"),
        ({"1.key.loss": np.ones(2, np.float32)}, "hold a loss not below zero"),
        ({"1.key.loss": np.array([np.inf], np.float32)}, "hold finite float32 numbers"),
        ({"1.key.loss": np.ones((1, 1), np.float32)}, "of 1 dimensions"),
    ],
)
def test_wrong_content_is_refused(
    llama: Any, made: Calibration, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    arrays = {name: x for name, x in (made.numbers | changes).items() if x is not None}
    facts = {"version": "2", "transform": "scale", MODEL: made.model.text, "tokens": "9"}
    tensor_file.write_arrays(path, arrays, facts, where="calibration")
    with pytest.raises(ValueError, match=says):
        calibration.load(path, llama)


# ---- caches -------------------------------------------------------------------------------------


def test_caches_have_the_bits_and_the_report_says_so(llama: Any, made: Calibration) -> None:
    report = rotormlx.apply(llama, THREE, made)
    caches = rotormlx.make_prompt_cache(llama)
    assert bits_of(caches) == GIVEN
    tiny.logits(llama, tiny.tokens(300), caches)
    assert report.bits_per_value == pytest.approx(cache_contents.bits_per_value(caches))
    assert [layer.bits_per_value for layer in report.layers] == [c.bits_per_value for c in caches]
    assert "K3 V3 on average, by layer, " in report.summary
    # All bits are mean bits of the configuration; without losses they are the same everywhere.
    same = rotormlx.apply(llama, THREE, made.without_losses)
    assert same.bits_per_value == pytest.approx(report.bits_per_value)
    assert bits_of(rotormlx.make_prompt_cache(llama)) == [(3, 3), (3, 3)]
    assert "by layer" not in same.summary


def test_a_saved_cache_goes_on_with_its_bits(llama: Any, made: Calibration, tmp_path: Path) -> None:
    rotormlx.apply(llama, THREE, made)
    caches = rotormlx.make_prompt_cache(llama)
    mx.eval(llama(tiny.tokens(200), cache=caches))
    path = str(tmp_path / "p.safetensors")
    rotormlx.save_prompt_cache(path, llama, caches)
    loaded, _ = rotormlx.load_prompt_cache(path, llama)
    assert bits_of(loaded) == GIVEN
    more = tiny.tokens(90, seed=5)
    again = copy.deepcopy(caches)
    assert mx.array_equal(llama(more, cache=loaded), llama(more, cache=caches))
    # As the file says, whatever the model was given since.
    rotormlx.apply(llama, RotorConfig())
    loaded, _ = rotormlx.load_prompt_cache(path, llama)
    assert bits_of(loaded) == GIVEN
    assert mx.array_equal(llama(more, cache=loaded)[:, -1], llama(more, cache=again)[:, -1])


def test_plain_caches_are_converted_to_them(llama: Any, made: Calibration, tmp_path: Path) -> None:
    path = str(tmp_path / "p.safetensors")
    plain = own_caches(llama)
    mx.eval(llama(tiny.tokens(200), cache=plain))
    save_prompt_cache(path, plain)
    rotormlx.apply(llama, THREE, made)
    loaded, _ = rotormlx.load_prompt_cache(path, llama)
    assert bits_of(loaded) == GIVEN
    assert loaded[0].packed_tokens == 192


def test_a_scheme_takes_them_only_when_it_says_so(
    llama: Any, made: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "find", lambda model, transform: made)
    own = schemes.scheme("k3v3:window=0,calibrated=scale,layers").bound(llama)
    assert bits_of(own.caches(llama)) == GIVEN
    same = schemes.scheme("k3v3:window=0,calibrated=scale").bound(llama)
    assert bits_of(same.caches(llama)) == [(3, 3), (3, 3)]
    monkeypatch.setattr(calibration, "find", lambda model, transform: made.without_losses)
    with pytest.raises(ValueError, match=r"rotormlx calibrate MODEL --layers --transform scale"):
        own.bound(llama)
    with pytest.raises(ValueError, match="add calibrated=scale"):
        schemes.scheme("k3v3:layers")
