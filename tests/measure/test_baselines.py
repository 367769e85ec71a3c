"""The schemes of a measurement: their names, the simulated codecs, and the rule they share."""

from __future__ import annotations

from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from rotormlx.cli import measure
from rotormlx.codec import codebook, reference
from rotormlx.codec.format import KEY, VALUE, codec
from rotormlx.codec.rotation import rotation
from rotormlx.config import RotorConfig
from rotormlx.measure import cache_contents, schemes
from rotormlx.measure.baselines import Affine, Kivi, SimulatedCache, Turbo
from rotormlx.measure.exl3 import Exl3
from rotormlx.measure.kvarn import KVarN
from rotormlx.measure.nvfp4 import Nvfp4
from rotormlx.measure.schemes import scheme
from rotormlx.mlx.cache.single import RotorKVCache
from tests.support import models as tiny_models

B, K, S, D = 2, 3, 192, 80
RNG = np.random.default_rng(5)
X = RNG.normal(size=(B, K, S, D)).astype(np.float32)


class Ours:
    """The codec of a rotormlx cache as a simulated one, by the float64 reference."""

    block = 64

    def __init__(self, config: RotorConfig) -> None:
        self.config = config

    def decoded(self, x: Any, *, layer: int, role: str) -> Any:
        chosen = codec(self.config, x.shape[-1], layer=layer, role=role)
        return reference.decode(reference.encode(x, chosen), chosen).astype(np.float32)

    def bits_per_value(self, head_dim: int, role: str) -> float:
        return codec(self.config, head_dim, layer=0, role=role).bits_per_value


class Nothing:
    """A codec that keeps nothing."""

    block = 64

    def decoded(self, x: Any, *, layer: int, role: str) -> Any:
        return np.zeros_like(x)

    def bits_per_value(self, head_dim: int, role: str) -> float:
        return 1.0 if role == KEY else 3.0


def fill(cache: Any, keys: Any, values: Any, chunk: int) -> Any:
    for start in range(0, keys.shape[2], chunk):
        part = np.s_[:, :, start : start + chunk]
        cache.update_and_fetch(mx.array(keys[part]), mx.array(values[part]))
    return cache


def relative(x: Any, coded: Any) -> float:
    return float(np.square(coded - x).sum() / np.square(x).sum())


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("k4v4", RotorConfig()),
        ("k3v2", RotorConfig(3, 2)),
        ("rotor3-k4v3:bare", RotorConfig(4, 3, "rotor3", sink=0, window=0)),
        ("iso4-k8v2:sink=7,window=128", RotorConfig(8, 2, "iso4", sink=7, window=128)),
        ("hadamard-k4v4:scale=prefill,seed=9", RotorConfig(4, 4, "hadamard", "prefill", seed=9)),
    ],
)
def test_scheme_of_a_rotation(name: str, config: RotorConfig) -> None:
    cache = scheme(name).make(5)
    assert type(cache) is RotorKVCache
    assert (cache.config, cache.layer) == (config, 5)


@pytest.mark.parametrize(
    ("name", "simulated", "rule"),
    [
        ("kivi-k4v2", Kivi(4, 2), (4, 64)),
        ("kivi-k2v4:bare", Kivi(2, 4), (0, 0)),
        ("affine-k6v3:window=32", Affine(6, 3), (4, 32)),
        ("turboquant-k4v3", Turbo(4, 3, "dense"), (4, 64)),
        ("turboquant-k4v4:bare,qjl", Turbo(4, 4, "dense", qjl=True), (0, 0)),
        ("rotorquant-k3v3:centred,seed=2", Turbo(3, 3, "rotor3", centred=True, seed=2), (4, 64)),
        ("kvarn-k3v2", KVarN(3, 2, 64), (4, 64)),
        ("kvarn-k4v2:group=128,window=0", KVarN(4, 2, 128), (4, 0)),
        ("exl3-k2v8:bare", Exl3(2, 8), (0, 0)),
        ("exl3-k5v3:compander", Exl3(5, 3, True), (4, 64)),
        ("nvfp4-k4v4:sink=1", Nvfp4(), (1, 64)),
    ],
)
def test_scheme_of_a_rival(name: str, simulated: Any, rule: tuple[int, int]) -> None:
    cache = scheme(name).make(5)
    assert (cache.codec, cache.layer, (cache.sink, cache.window)) == (simulated, 5, rule)


def test_scheme_of_mlx_lm() -> None:
    cache = scheme("affine-k8v8").make(0)
    assert type(cache) is QuantizedKVCache
    assert (cache.bits, cache.group_size) == (8, 64)
    assert type(scheme("exact").make(0)) is KVCache


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("k4", "'k4' was given"),
        ("zigzag-k4v4", "'zigzag-k4v4' was given"),
        ("k5v4", "key_bits must be one of"),
        ("k4v4:sink", "has 'sink'"),
        ("k4v4:bare=1", "has 'bare=1'"),
        ("k4v4:qjl", "has qjl; leave it out"),
        ("kivi-k4v4:seed=1", "has seed; leave it out"),
        ("kivi-k0v4", "Bits must be one of 1, 2, 3"),
        ("affine-k8v4", "equal bits"),
        ("affine-k5v5", "Bits must be one of 2, 3, 4, 6, 8"),
        ("turboquant-k8v8:qjl", "Bits must be one of 2, 3, 4"),
        ("kvarn-k5v4", "Bits must be one of 2, 3, 4 here, but 'kvarn-k5v4' was given"),
        ("kvarn-k4v4:group=96", "group must be one of 64, 128 tokens, but 96 was given"),
        ("kvarn-k4v4:seed=1", "has seed; leave it out"),
        ("exl3-k1v4", "Bits must be one of 2, 3, 4, 5, 6, 7, 8"),
        ("exl3-k4v4:group=64", "has group; leave it out"),
        ("nvfp4-k3v3", "Bits must be 4 here, but 'nvfp4-k3v3' was given"),
        ("nvfp4-k4v4:compander", "has compander; leave it out"),
        ("k4v4:scale=best", "channel_scale must be one of"),
    ],
)
def test_scheme_refuses(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheme(name)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("k4v4", "k4v4:bare"),
        ("turboquant-k4v4:qjl", "turboquant-k4v4:qjl,bare"),
        ("k4v4:sink=4", "k4v4:sink=4"),
        ("affine-k4v4", "affine-k4v4"),
        ("exact", "exact"),
    ],
)
def test_all_packed(name: str, packed: str) -> None:
    assert schemes.all_packed(name) == packed


def test_grammar_and_help_name_every_family_and_option() -> None:
    with pytest.raises(ValueError, match="A scheme must be") as refused:
        scheme("zigzag-k4v4")
    [option] = get_args(measure.Schemes)[1:]
    for word in (*schemes.RIVALS, *schemes._FLAGS, *(f"{n}=N" for n in schemes._NUMBERS)):
        assert word in str(refused.value)
        assert word in option.help


def test_scheme_leaves_other_caches_alone() -> None:
    model = tiny_models.build("gemma3_text")
    kinds = [type(cache).__name__ for cache in scheme("kivi-k4v4").caches(model)]
    assert kinds == ["RotatingKVCache", "SimulatedCache"] * 2


# ---- codecs -------------------------------------------------------------------------------------


def test_kivi_steps() -> None:
    """Keys share a step along tokens, values along channels; no value is further off than half."""
    for role, axes in ((KEY, (B, K, S // 64, 64, D)), (VALUE, (B, K, S, 2, 40))):
        groups = X.reshape(axes)
        axis = -2 if role == KEY else -1
        step = np.ptp(groups, axis=axis, keepdims=True) / 15
        error = np.abs(Kivi(4, 4).decoded(X, layer=0, role=role).reshape(axes) - groups)
        # Minimum and step are float16: 2^-11 of the largest value and of 15 steps besides.
        limit = step / 2 + 2**-11 * (np.abs(groups).max() + 15 * step)
        assert (error <= limit).all()
        # Codes are used from end to end, so some value is nearly half a step off.
        assert (error.max(axis) > 0.35 * step.squeeze(axis)).all()


def test_kivi_axes() -> None:
    """A channel of constant offset costs keys nothing, and values all the others."""
    x = X.copy()
    x[..., 7] += 500
    others = np.delete(np.arange(D), 7)
    exact = Kivi(4, 4).decoded(X, layer=0, role=KEY)[..., others]
    np.testing.assert_array_equal(Kivi(4, 4).decoded(x, layer=0, role=KEY)[..., others], exact)
    coded = Kivi(4, 4).decoded(x, layer=0, role=VALUE)[..., :40]
    assert relative(x[..., others[:39]], np.delete(coded, 7, -1)) > 0.5


def test_affine_is_mlx_lms() -> None:
    keys, values = X[..., :64].astype(np.float16), X[:, :, ::-1, :64].astype(np.float16)
    cache = fill(QuantizedKVCache(64, 4), keys, values, 100)
    found = [np.array(part) for part in cache_contents.decoded(cache)]
    for role, x, theirs in ((KEY, keys, found[0]), (VALUE, values, found[1])):
        ours = Affine(4, 4).decoded(x.astype(np.float32), layer=0, role=role)
        np.testing.assert_array_equal(ours, theirs)
        assert 0.001 < relative(x.astype(np.float32), ours) < 0.03


@pytest.mark.parametrize("name", ["dense", "rotor3"])
def test_turbo_has_the_directions_of_the_packed_codec(name: str) -> None:
    """The same rotation and, where those are nearest levels, the same codes; another factor."""
    bits = 4
    config = RotorConfig(bits, bits, name, "none", seed=3)
    chosen = codec(config, D, layer=2, role=VALUE)
    ours = reference.decode(reference.encode(X, chosen), chosen)
    coded = Turbo(bits, bits, name, seed=3).decoded(X, layer=2, role=VALUE)
    cosines = (
        (ours * coded).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(coded, axis=-1)
    )
    # float32 against float64; a code that differs would cost 1e-4 at least.
    assert cosines.min() > 1 - 1e-5
    # The norm as a factor instead of the least-squares one, which is a little smaller or larger.
    factors = np.linalg.norm(coded, axis=-1) / np.linalg.norm(ours, axis=-1)
    assert np.abs(factors - 1).mean() > 0.001


def test_turbo_keeps_the_norm_of_levels() -> None:
    """The decoded vector is norm / sqrt(D) times the levels, rotated back."""
    matrix = rotation("dense", D, layer=1, role=KEY).matrix
    coded = Turbo(3, 3).decoded(X, layer=1, role=KEY) @ matrix.T
    levels = coded * np.sqrt(D) / np.linalg.norm(X, axis=-1, keepdims=True)
    distance = np.abs(levels[..., None] - codebook.levels(3)).min(-1)
    # The norm is float16.
    assert distance.max() < 2**-11 * 2.2


def test_turbo_centre_takes_a_common_part_away() -> None:
    x = X + 100 * RNG.normal(size=D).astype(np.float32)
    plain = Turbo(4, 4).decoded(x, layer=0, role=KEY)
    centred = Turbo(4, 4, centred=True).decoded(x, layer=0, role=KEY)
    # The centre is float16: 2^-11 of numbers up to 300 beside an error of 0.009 of 1.
    assert np.square(centred - x).mean() < 0.02
    assert np.square(plain - x).mean() > 10
    # Values are not centred.
    assert np.square(Turbo(4, 4, centred=True).decoded(x, layer=0, role=VALUE) - x).mean() > 10


@pytest.mark.parametrize("bits", [2, 3])
def test_qjl_takes_the_bias_away_and_adds_variance(bits: int) -> None:
    unit = X[:1, :1] / np.linalg.norm(X[:1, :1], axis=-1, keepdims=True)
    slopes, errors = {}, {}
    for qjl in (False, True):
        codecs = [Turbo(bits, bits, qjl=qjl, seed=seed) for seed in range(40)]
        coded = np.stack([c.decoded(unit, layer=0, role=KEY) for c in codecs])
        # A vector with itself shows the bias at its largest.
        slopes[qjl] = float((coded * unit).sum(-1).mean())
        errors[qjl] = float(np.square(coded - unit).sum(-1).mean())
    # 40 * 192 estimates with a deviation of about 0.1 each, not all independent.
    assert slopes[True] == pytest.approx(1, abs=0.01)
    assert slopes[False] < 1 - {2: 0.1, 3: 0.025}[bits]
    assert errors[True] > 2 * errors[False]


def test_qjl_is_for_keys_only() -> None:
    with_qjl, without = Turbo(4, 4, qjl=True), Turbo(4, 4)
    for role, same in ((VALUE, True), (KEY, False)):
        pair = [c.decoded(X, layer=0, role=role) for c in (with_qjl, without)]
        assert np.array_equal(*pair) == same


def test_zero_vectors_stay_zero() -> None:
    zeros = np.zeros((1, 1, 64, D), np.float32)
    for simulated in (Kivi(4, 4), Turbo(4, 4), Turbo(4, 4, qjl=True, centred=True)):
        for role in (KEY, VALUE):
            np.testing.assert_array_equal(simulated.decoded(zeros, layer=0, role=role), zeros)


@pytest.mark.parametrize(
    ("simulated", "key", "value"),
    [
        (Kivi(4, 3), 4 + 32 / 64, 3 + 32 / 64),
        (Affine(4, 2), 4 + 32 / 64, 2 + 32 / 64),
        (Turbo(4, 3), 4 + 16 / 128, 3 + 16 / 128),
        (Turbo(4, 3, qjl=True), 4 + 32 / 128, 3 + 16 / 128),
        (Turbo(4, 3, centred=True), 4 + 16 / 128 + 16 / 64, 3 + 16 / 128),
    ],
)
def test_true_bits(simulated: Any, key: float, value: float) -> None:
    assert simulated.bits_per_value(128, KEY) == key
    assert simulated.bits_per_value(128, VALUE) == value


# ---- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sink", "window"), [(4, 64), (0, 0), (9, 30)])
@pytest.mark.parametrize("chunk", [1, 37, 500])
def test_simulated_cache_is_our_cache_with_our_codec(sink: int, window: int, chunk: int) -> None:
    """Sink, blocks and window are those of the real cache, whatever the chunks."""
    config = RotorConfig(3, 4, channel_scale="none", sink=sink, window=window)
    rng = np.random.default_rng(6)
    keys = rng.normal(size=(1, 2, 331, 48)).astype(np.float32)
    values = rng.normal(size=(1, 2, 331, 80)).astype(np.float32)
    real = fill(RotorKVCache(config, 3), keys, values, chunk)
    simulated = fill(SimulatedCache(Ours(config), 3, sink=sink, window=window), keys, values, chunk)
    assert simulated.packed_tokens == real.packed_tokens > 128
    assert simulated.offset == real.offset == 331
    assert simulated.bits_per_value == pytest.approx(real.bits_per_value)
    assert simulated.nbytes == cache_contents.used_bytes([real])
    for ours, theirs in zip(
        cache_contents.decoded(real), cache_contents.decoded(simulated), strict=True
    ):
        # A scale that lies near a tie of float16 may be rounded the other way: 2^-10 of numbers
        # up to 4. A token coded in one and exact in the other differs by 0.1 and more.
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=4e-3)


def test_simulated_cache_returns_new_tokens_exact() -> None:
    cache = SimulatedCache(Nothing(), 0, sink=4, window=0)
    keys, _ = cache.update_and_fetch(mx.array(X), mx.array(X))
    np.testing.assert_array_equal(np.array(keys), X)
    assert cache.packed_tokens == 128
    held, _ = cache.keys_and_values()
    expected = X.copy()
    expected[:, :, 4:132] = 0
    np.testing.assert_array_equal(np.array(held), expected)
    assert cache.bits_per_value == 2
    assert cache.nbytes == B * K * 2 * D * (128 * 2 / 8 + 64 * 4)


def test_simulated_cache_refuses_when_empty() -> None:
    with pytest.raises(ValueError, match="The cache is empty"):
        SimulatedCache(Nothing(), 0).keys_and_values()


def test_sizes() -> None:
    half = X[..., :64].astype(np.float16)
    values = B * K * S * 2 * 64
    exact = fill(KVCache(), half, half, 100)
    affine = fill(QuantizedKVCache(64, 4), half, half, 100)
    assert cache_contents.used_bytes([exact]) == values * 2  # room for growth does not count
    assert cache_contents.used_bytes([affine, exact]) == values * 4.5 / 8 + values * 2
    assert cache_contents.bits_per_value([exact]) == 16
    assert cache_contents.bits_per_value([affine]) == 4.5
    assert [index for index, _ in cache_contents.compressed([exact, affine])] == [0, 1]
