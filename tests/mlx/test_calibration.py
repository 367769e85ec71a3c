"""What a calibration finds, keeps and gives to caches."""

import copy
import json
import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, save_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as own_caches

import rotormlx
from rotormlx.codec import learned_rotors, reference, rotation
from rotormlx.codec.format import BLOCK, ROLES, Codec, codec
from rotormlx.config import RotorConfig
from rotormlx.measure import calibrate
from rotormlx.mlx import calibration, fingerprint, hosts, integration, learned
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.store import same_calibrated
from rotormlx.storage import calibration as calibration_file
from rotormlx.storage import tensor_file
from rotormlx.storage.calibration import TRANSFORMS, Calibration
from rotormlx.storage.fingerprint import MODEL
from tests.support import models as tiny

TOKENS = 4 + 3 * BLOCK
SMALL = RotorConfig(sink=4, window=0)


class Bytes:
    """A tokenizer: a token a byte."""

    def encode(self, text):
        return list(text.encode())


TEXT = "".join(chr(97 + n) for n in np.random.default_rng(0).integers(0, 26, 4 * TOKENS))


@pytest.fixture(scope="module")
def llama():
    return tiny.build("llama")


@pytest.fixture(scope="module")
def made(llama):
    """A calibration of each transform."""
    return {
        name: rotormlx.calibrate(llama, Bytes(), transform=name, text=TEXT, tokens=TOKENS)
        for name in TRANSFORMS
    }


@pytest.fixture(autouse=True)
def removed(llama):
    yield
    rotormlx.remove(llama)


def moments(seed=0, heads=3, d=24):
    """Second moments of a few strong directions."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(heads, d, d)) * np.exp(rng.normal(size=(heads, 1, d)))
    return mix @ np.swapaxes(mix, 1, 2)


def loss(matrix, moment, metric):
    """tr(T K T^T) tr(T^-T Q T^-1): the error of scores, but for a factor, for each head."""
    inverse = np.linalg.inv(matrix)
    turned = (
        matrix @ moment @ np.swapaxes(matrix, 1, 2),
        np.swapaxes(inverse, 1, 2) @ metric @ inverse,
    )
    first, second = (np.trace(m, axis1=1, axis2=2) for m in turned)
    return first * second


# ---- the mathematics ----------------------------------------------------------------------------


def test_the_klt_reaches_the_bound():
    """No T has a smaller loss than (tr (Q^1/2 K Q^1/2)^1/2)^2, by Cauchy and Schwarz."""
    moment, metric = moments(1), moments(2)
    eigenvalues = np.linalg.eigvals(moment @ metric).real
    bound = np.sqrt(eigenvalues).sum(-1) ** 2
    found = loss(calibrate.klt(moment, metric), moment, metric)
    # Eigenvalues over ten orders of magnitude, in float64.
    assert np.allclose(found, bound, rtol=1e-5)
    assert (found < 0.7 * loss(np.eye(24)[None], moment, metric)).all()


def test_the_channel_scale_is_the_best_one():
    """No other diagonal does better, and it does better than none."""
    moment, metric = moments(1), moments(2)
    scale = calibrate.channel_scale(moment, metric)

    def diagonal(s):
        return np.eye(24) / s[:, None, :]

    best = loss(diagonal(scale), moment, metric)
    assert (best < loss(np.eye(24)[None], moment, metric)).all()
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = scale * np.exp(0.1 * rng.normal(size=scale.shape))
        assert (loss(diagonal(other), moment, metric) > best).all()
    assert np.allclose(np.log(scale).mean(-1), 0)


def test_learned_rotors_come_between_the_scale_and_the_klt(figure):
    moment, metric = moments(1, d=64), moments(2, d=64)
    coefficients, turned = learned.fitted(moment, metric)
    back = np.swapaxes(turned, 1, 2)
    assert np.allclose(turned @ back, np.eye(64), atol=1e-5)  # rotors of float32
    scale = calibrate.channel_scale(turned @ moment @ back, turned @ metric @ back)
    matrix = learned_rotors.learned_matrix(coefficients, scale, 5, "key")
    none, only, all_of_it = (
        loss(m, moment, metric).mean()
        for m in (
            np.eye(64)[None],
            np.eye(64) / calibrate.channel_scale(moment, metric)[:, None, :],
            calibrate.klt(moment, metric),
        )
    )
    found = loss(matrix, moment, metric).mean()
    gains = [10 * math.log10(none / x) for x in (only, found, all_of_it)]
    figure(
        "random moments, dB below no transform: scale {:.1f}, rotors {:.1f}, klt {:.1f}".format(
            *gains
        )
    )
    assert all_of_it < found < only
    # More than a third of the way, in dB, of what 64 times as many numbers do.
    assert gains[1] - gains[0] > (gains[2] - gains[0]) / 3


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128])
def test_rotors_that_turn_nothing_are_the_identity(head_dim):
    coefficients = mx.array(learned._identity(head_dim)[None].astype(np.float32))
    assert coefficients.shape == (1, learned_rotors.learned_size(head_dim))
    assert np.array_equal(np.array(learned._basis(coefficients, head_dim))[0], np.eye(head_dim))


@pytest.mark.parametrize("head_dim", [48, 64, 80])
def test_any_rotors_are_orthogonal_and_mix_all_channels(head_dim):
    rng = np.random.default_rng(0)
    coefficients = rng.normal(size=(2, learned_rotors.learned_size(head_dim))).astype(np.float32)
    basis = np.array(learned._basis(mx.array(coefficients), head_dim), np.float64)
    assert np.allclose(basis @ np.swapaxes(basis, 1, 2), np.eye(head_dim), atol=1e-5)
    # Fives and sevens are not learned, so a channel then meets a fifth of the others.
    met = head_dim // 5 if head_dim % 5 == 0 else head_dim
    assert ((np.abs(basis) > 1e-12).sum(-1) == met).all()


@pytest.mark.parametrize("head_dim", [48, 64, 112])
def test_learned_rotors_are_stages_of_the_format(head_dim):
    """docs/FORMAT.md, section 10, by the stages of section 4."""
    rng = np.random.default_rng(0)
    coefficients = rng.normal(size=learned_rotors.learned_size(head_dim)).astype(np.float32)
    columns, place, stride = np.eye(head_dim), 0, 1
    for radix in rotation.factors(head_dim):
        groups = head_dim // radix
        n = {4: 4, 3: 4, 2: 1}.get(radix, 0)
        own = coefficients[place : place + groups * n].reshape(groups, n).astype(np.float64)
        place += groups * n
        if n == 4:
            kind, own = (
                {4: "Left", 3: "Sandwich"}[radix],
                own / np.linalg.norm(own, axis=1)[:, None],
            )
        elif n == 1:
            kind, own = "Plane", np.concatenate([np.cos(own), np.sin(own)], 1)
        if n:
            blocks = own.reshape(groups // stride, stride, -1)
            columns = rotation.Stage(0, stride, kind, blocks).apply(columns)
        stride *= radix
    assert place == len(coefficients)
    found = learned._basis(mx.array(coefficients[None]), head_dim)
    assert np.allclose(np.array(found)[0], columns.T, atol=1e-6)


def test_448_numbers_at_head_dim_128():
    assert learned_rotors.learned_size(128) == 448


# ---- what the text shows ------------------------------------------------------------------------


def test_moments_are_those_of_an_exact_run(llama, monkeypatch):
    """Queries and keys behind RoPE, keys less the mean of their block, the sink left out."""
    ids = [n % 257 for n in range(7, 7 + TOKENS)]
    found = calibrate._moments(llama, ids, lambda n: None)
    assert not hosts.MLX_LM.installed()

    queries = []
    exact = mx.fast.scaled_dot_product_attention

    def recorded(q, k, v, **options):
        queries.append(q)
        return exact(q, k, v, **options)

    monkeypatch.setattr(base.mx.fast, "scaled_dot_product_attention", recorded)
    caches = own_caches(llama)
    mx.eval(llama(mx.array(ids)[None], cache=caches))
    assert len(queries) == len(caches) == 2
    for layer, (raw, cache) in enumerate(zip(queries, caches, strict=True)):
        q = np.array(raw, np.float64)[0].reshape(2, -1, 64)  # 2 query heads for each of 2 KV heads
        keys, values = (
            np.array(a, np.float64)[0, :, 4:].reshape(2, 3, BLOCK, 64)
            for a in cache.keys_and_values()
        )
        keys = keys - keys.mean(2, keepdims=True)
        rows = (q, keys.reshape(2, -1, 64), values.reshape(2, -1, 64))
        for got, x in zip(found[layer], rows, strict=True):
            want = np.swapaxes(x, 1, 2) @ x / x.shape[1]
            # The model runs in float32, here in one chunk and there in several.
            assert np.allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_directions_that_were_not_seen_are_not_blown_up():
    moment = np.zeros((2, 16, 16))
    moment[0, 0, 0] = 1.0
    moment[1, 3, 3] = np.nan
    steady = calibrate._steady(moment)
    assert np.linalg.eigvalsh(steady).min() > 0
    scale = calibrate.channel_scale(steady, np.broadcast_to(np.eye(16), moment.shape))
    assert scale.max() / scale.min() <= 64
    assert np.allclose(scale[1], 1)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_file_gives_it_back(llama, made, transform, tmp_path):
    path = tmp_path / "c.safetensors"
    made[transform].save(path)
    found = calibration.load(path, llama)
    assert (found.transform, found.model, found.tokens) == (
        transform,
        made[transform].model,
        TOKENS,
    )
    for layer in range(2):
        for a, b in zip(found.of(layer), made[transform].of(layer), strict=True):
            assert a.shape == ((2, 64) if transform == "scale" else (2, 64, 64))
            assert np.array_equal(a, b)


def test_another_models_calibration_is_refused(made, tmp_path):
    path = tmp_path / "c.safetensors"
    made["scale"].save(path)
    with pytest.raises(
        ValueError, match=r"^\[calibration\] .*c\.safetensors must be of this model, but .*numbers"
    ):
        calibration.load(path, tiny.build("llama", seed=1))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_corrupted_calibration_is_refused(llama, made, transform, tmp_path):
    path = tmp_path / "c.safetensors"
    made[transform].save(path)
    whole = path.read_bytes()
    for place in (0, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"^\[calibration\] "):
            calibration.load(path, llama)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"^\[calibration\] "):
        calibration.load(path, llama)


def rewritten(path, made, facts=None, **changes):
    """A file with a right checksum and wrong content."""
    arrays = {k: v for k, v in (made.numbers | changes).items() if v is not None}
    known = {
        "version": "2",
        "transform": made.transform,
        MODEL: made.model.text,
        "tokens": "200",
    }
    known |= facts or {}
    kept = {k: v for k, v in known.items() if v is not None}
    tensor_file.write_arrays(path, arrays, kept, where="calibration")


ONES = np.ones((2, 64), np.float32)


@pytest.mark.parametrize(
    ("transform", "facts", "changes", "says"),
    [
        ("scale", {"version": "1"}, {}, "be a calibration of version 2"),
        ("scale", {"transform": "other"}, {}, "a transform of scale, rotors, klt"),
        ("scale", {"transform": "klt"}, {}, "of 3 dimensions"),
        ("scale", {MODEL: None}, {}, "name its model"),
        ("scale", {MODEL: "f" * 64}, {}, "name its model"),
        ("scale", {"tokens": "-4"}, {}, "give its number of tokens"),
        ("scale", {}, {"1.value": None}, "name its arrays by layer and role"),
        ("scale", {}, {"x.key": ONES, "x.value": ONES}, "name its arrays by layer and role"),
        ("scale", {}, {"0.key": -ONES}, "scales above zero"),
        ("scale", {}, {"0.key": ONES * np.float32(np.nan)}, "hold finite float32 numbers"),
        ("scale", {}, {"0.key": ONES.astype(np.float64)}, "hold finite float32 numbers"),
        ("klt", {}, {"0.key": np.zeros((2, 64, 64), np.float32)}, "that can be inverted"),
        ("klt", {}, {"0.key": np.ones((2, 64, 32), np.float32)}, "that can be inverted"),
        ("rotors", {}, {"0.key.rotors": np.ones((2, 9), np.float32)}, "that can be inverted"),
        ("rotors", {}, {"0.key.rotors": np.zeros((2, 192), np.float32)}, "that can be inverted"),
        (
            "rotors",
            {},
            {"0.key": ONES[:, :9], "0.key.rotors": np.ones((2, 24), np.float32)},
            "that can be inverted",
        ),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else value,
)
def test_wrong_content_is_refused(llama, made, tmp_path, transform, facts, changes, says):
    path = tmp_path / "c.safetensors"
    rewritten(path, made[transform], facts, **changes)
    with pytest.raises(ValueError, match=r"^\[calibration\] .*calibrate the model again") as error:
        calibration.load(path, llama)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"0.key": np.ones((1, 64), np.float32)},
        {"1.value": np.ones((2, 32), np.float32)},
        {"1.key": None, "1.value": None},
    ],
    ids=["heads", "head_dim", "layers"],
)
def test_shapes_of_another_model_are_refused(llama, made, tmp_path, changes):
    path = tmp_path / "c.safetensors"
    rewritten(path, made["scale"], **changes)
    found = calibration.load(path, llama)
    with pytest.raises(ValueError, match=r"^\[calibration\] .* must be calibrated with shape"):
        rotormlx.apply(llama, calibration=found)
    assert not hosts.MLX_LM.installed()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"transform": "pca"}, "one of scale, rotors, klt, but 'pca'"),
        ({"text": "too short"}, "at least 196 tokens is required, but this one has 9"),
        *(({"tokens": n}, f"At least 132 tokens must be read, but {n} were") for n in (131, 0, -3)),
    ],
    ids=["transform", "text", "few tokens", "no tokens", "negative tokens"],
)
def test_bad_arguments_are_refused(llama, arguments, says):
    with pytest.raises(ValueError, match=r"^\[calibration\] ") as error:
        calibrate.calibrate(llama, Bytes(), **({"tokens": TOKENS} | arguments))
    assert says in str(error.value)


def test_progress_counts_tokens_and_layers(llama):
    steps = []
    calibrate.calibrate(llama, Bytes(), text=TEXT, tokens=TOKENS, progress=steps.append)
    assert steps == [64, 64, 64, 4, 1, 1]


# ---- caches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_caches_of_a_model_use_it(llama, made, transform):
    report = rotormlx.apply(llama, SMALL, made[transform])
    assert report.config.is_calibrated
    assert "calibrated" in report.summary
    caches = rotormlx.make_prompt_cache(llama)
    found = tiny.logits(llama, tiny.tokens(300), caches)
    without = replace(SMALL, channel_scale="none")
    plain = [RotorKVCache(without, layer) for layer in range(2)]
    other = tiny.logits(llama, tiny.tokens(300), plain)
    exact = tiny.logits(llama, tiny.tokens(300), [KVCache() for _ in range(2)])
    assert caches[1].packed_tokens == plain[1].packed_tokens == 256
    assert not mx.array_equal(found, other)
    # Both are near to the exact run; a matrix that is not undone would be off by the logits' size.
    size = mx.abs(exact).max().item()
    assert mx.abs(found - exact).max().item() < 0.2 * size
    assert mx.abs(other - exact).max().item() < 0.2 * size
    # Bytes a value are the same, and what is calibrated is no cache's own.
    assert [c.nbytes for c in caches] == [c.nbytes for c in plain]
    assert [c.used_bytes for c in caches] == [c.used_bytes for c in plain]
    assert caches[0].bits_per_value == plain[0].bits_per_value


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_packed_bytes_are_those_of_scale_and_matrix(llama, made, transform):
    """What lies in the cache is what the reference makes of the exact keys and values."""
    rotormlx.apply(llama, SMALL, made[transform])
    caches, exact = rotormlx.make_prompt_cache(llama), [KVCache() for _ in range(2)]
    for held in (caches, exact):
        mx.eval(llama(tiny.tokens(200), cache=held))
    for layer, (cache, plain) in enumerate(zip(caches, exact, strict=True)):
        arrays = cache.state[5:15]
        for place, (role, x) in enumerate(zip(ROLES, plain.keys_and_values(), strict=True)):
            if layer:  # its input went through the compressed cache of the layer before
                continue
            words, scales, centres, saved = arrays[5 * place + 1 : 5 * place + 5]
            given = made[transform].of(layer)[place]
            assert np.array_equal(saved, given)
            chosen = codec(SMALL, 64, layer=layer, role=role)
            channel_scale = np.array(given)
            if transform != "scale":
                chosen = Codec(role, 4, rotation.calibrated(np.array(given)))
                channel_scale = None
            rows = np.array(x[:, :, 4:196], np.float64)
            means = None if centres is None else np.array(centres)
            want = reference.encode(rows, chosen, channel_scale=channel_scale, centres=means)
            codes, wanted = (reference.unpack(np.array(w), chosen) for w in (words, want.words))
            # Codes within float32 errors of a boundary may differ.
            assert (codes != wanted).mean() < 1e-3
            assert np.allclose(np.array(scales), want.scales, rtol=2**-9)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_way_of_a_cache_keeps_it(llama, made, transform, tmp_path):
    """Copies, files, batches and trims go on as the cache itself does."""
    rotormlx.apply(llama, SMALL, made[transform])
    ids, more = tiny.tokens(200), tiny.tokens(90, seed=5)
    caches = rotormlx.make_prompt_cache(llama)
    mx.eval(llama(ids, cache=caches))
    expected = llama(more, cache=copy.deepcopy(caches))

    path = str(tmp_path / "p.safetensors")
    rotormlx.save_prompt_cache(path, llama, caches)
    loaded, _ = rotormlx.load_prompt_cache(path, llama)
    assert mx.array_equal(llama(more, cache=loaded), expected)

    batch = [RotorKVCache.merge([c, c]) for c in caches]
    rows = llama(mx.concatenate([more, more]), cache=batch)
    # The rows of a batch are summed in another order.
    assert mx.allclose(rows[1:], expected, atol=1e-3)
    single = [b.extract(1) for b in batch]
    for a, b in zip(single, loaded, strict=True):
        for one, other in zip(a.state[5:], b.state[5:], strict=True):
            assert (one is None and other is None) or mx.array_equal(one, other)
    for b in batch:
        b.filter([1])
        b.extend(RotorKVCache.merge([caches[batch.index(b)]]))
    assert [b.extract(0).calibrated is not None for b in batch] == [True, True]

    again = copy.deepcopy(caches)
    for cache in again:
        assert cache.trim(200) == 200
    mx.eval(llama(ids, cache=again))
    assert mx.array_equal(llama(more, cache=again), expected)


def test_empty_caches_take_it_from_the_model(llama, made, tmp_path):
    rotormlx.apply(llama, SMALL, made["scale"])
    path = str(tmp_path / "p.safetensors")
    rotormlx.save_prompt_cache(path, llama, rotormlx.make_prompt_cache(llama))
    loaded, _ = rotormlx.load_prompt_cache(path, llama)
    mx.eval(llama(tiny.tokens(200), cache=loaded))
    assert np.array_equal(loaded[1].state[9], made["scale"].of(1)[0])


def test_plain_caches_are_converted_with_it(llama, made, tmp_path):
    path = str(tmp_path / "p.safetensors")
    plain = own_caches(llama)
    mx.eval(llama(tiny.tokens(200), cache=plain))
    save_prompt_cache(path, plain)
    rotormlx.apply(llama, SMALL, made["klt"])
    loaded, _ = rotormlx.load_prompt_cache(path, llama)
    assert loaded[0].packed_tokens == 192
    assert np.array_equal(loaded[0].state[9], made["klt"].of(0)[0])


@pytest.mark.parametrize("later", [None, *TRANSFORMS], ids=str)
@pytest.mark.parametrize("first", [None, *TRANSFORMS], ids=str)
def test_a_saved_cache_outlives_other_calibrations(llama, made, tmp_path, first, later):
    """It goes on with what it was coded with, whatever the model is given since."""
    rotormlx.apply(llama, SMALL, made.get(first))
    caches = rotormlx.make_prompt_cache(llama)
    mx.eval(llama(tiny.tokens(100), cache=caches))
    path = str(tmp_path / "p.safetensors")
    rotormlx.save_prompt_cache(path, llama, caches)
    rotormlx.apply(llama, RotorConfig(3, 3), made.get(later))
    loaded, _ = rotormlx.load_prompt_cache(path, llama)
    more = tiny.tokens(10, seed=5)
    assert mx.array_equal(llama(more, cache=loaded), llama(more, cache=caches))
    for found, cache in zip(loaded, caches, strict=True):
        assert same_calibrated(found.calibrated, cache.calibrated)


def test_an_empty_cache_of_another_calibration_is_refused(llama, made, tmp_path):
    """It holds nothing that tells which one."""
    path = str(tmp_path / "p.safetensors")
    rotormlx.apply(llama, SMALL, made["klt"])
    rotormlx.save_prompt_cache(path, llama, rotormlx.make_prompt_cache(llama))
    for other in (None, made["scale"]):
        rotormlx.apply(llama, SMALL, other)
        with pytest.raises(
            ValueError, match=r"p\.safetensors holds no tokens, so its calibration must come"
        ):
            rotormlx.load_prompt_cache(path, llama)


@pytest.mark.parametrize(
    ("transform", "config", "says"),
    [
        ("klt", RotorConfig(rotation="dense"), "rotation 'dense' was given"),
        ("klt", RotorConfig(seed=3), "brings its own rotation, but seed 3 was given"),
        ("rotors", RotorConfig(channel_scale="prefill"), "channel_scale 'prefill' was given"),
        ("scale", RotorConfig(channel_scale="none"), "channel_scale 'none' was given"),
        ("scale", RotorConfig(rotation="calibrated"), "A calibrated rotation holds the channel"),
    ],
)
def test_what_a_calibration_would_replace_is_refused(llama, made, transform, config, says):
    with pytest.raises(ValueError, match=says):
        rotormlx.apply(llama, config, made[transform])
    assert not hosts.MLX_LM.installed()


def test_what_a_calibration_leaves_alone_is_taken(llama, made):
    dense = RotorConfig(rotation="dense", seed=3)
    kept = rotormlx.apply(llama, dense, made["scale"]).config
    assert kept == replace(dense, channel_scale="calibrated")
    for same in (RotorConfig(channel_scale="none"), RotorConfig(rotation="calibrated")):
        assert rotormlx.apply(llama, same, made["klt"]).config == RotorConfig(rotation="calibrated")


def test_an_object_or_a_file_of_another_model_is_refused(llama, made, tmp_path):
    other = tiny.build("llama", seed=1)
    path = tmp_path / "c.safetensors"
    made["scale"].save(path)
    for given, name in (
        (made["scale"], "A calibration"),
        (path, str(path)),
        (str(path), str(path)),
    ):
        with pytest.raises(ValueError, match=rf"^\[calibration\] {name} must be of this model"):
            rotormlx.apply(other, SMALL, given)
        assert not hosts.MLX_LM.installed()
        assert rotormlx.apply(llama, SMALL, given).config.channel_scale == "calibrated"
        rotormlx.remove(llama)


def test_rows_of_other_calibrations_are_refused(llama, made):
    rotormlx.apply(llama, SMALL, made["rotors"])
    caches = rotormlx.make_prompt_cache(llama)
    mx.eval(llama(tiny.tokens(20), cache=caches))
    rotormlx.apply(llama, SMALL, made["klt"])
    mixed = rotormlx.make_prompt_cache(llama)
    with pytest.raises(ValueError, match="must share their calibration"):
        RotorKVCache.merge([caches[0], mixed[0]])


def test_a_calibrated_cache_without_calibration_says_what_to_do():
    cache = RotorKVCache(RotorConfig(channel_scale="calibrated"))
    x = mx.zeros((1, 2, 3, 64))
    with pytest.raises(ValueError, match=r"needs an array \(2, 64\).*rotormlx calibrate MODEL"):
        cache.update_and_fetch(x, x)
    assert cache.empty()


def test_the_configuration_refuses_a_scale_beside_calibrated_rotations():
    with pytest.raises(ValueError, match="A calibrated rotation holds the channel scale"):
        RotorConfig(rotation="calibrated", channel_scale="prefill")


# ---- finding it ---------------------------------------------------------------------------------


@pytest.fixture
def kept(llama, made, monkeypatch, tmp_path):
    """A calibration in the user's cache directory, and what ``mlx_lm.load`` gives."""
    monkeypatch.setattr(calibration_file, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(mlx_lm, "load", lambda path, **options: (llama, Bytes()))

    def keep(transform):
        path = calibration.default_path(llama, transform)
        path.parent.mkdir(parents=True, exist_ok=True)
        made[transform].save(path)
        return path

    return keep


def config_of_loaded(llama, *arguments):
    rotormlx.load("model", *arguments)
    return integration.model_report(llama).config


def test_load_finds_the_latest(llama, kept):
    assert config_of_loaded(llama) == RotorConfig()
    kept("scale")
    assert config_of_loaded(llama) == RotorConfig(channel_scale="calibrated")
    assert config_of_loaded(llama, RotorConfig(3, 2)) == RotorConfig(
        3, 2, channel_scale="calibrated"
    )
    path = kept("klt")
    import os

    os.utime(path, (2e9, 2e9))
    assert config_of_loaded(llama) == RotorConfig(rotation="calibrated")
    assert rotormlx.make_prompt_cache(llama)[0].calibrated[0].shape == (2, 64, 64)


@pytest.mark.parametrize(
    "config", [RotorConfig(channel_scale="none"), RotorConfig(rotation="hadamard")], ids=str
)
def test_load_leaves_it_alone_when_told(llama, kept, config):
    kept("scale")
    assert config_of_loaded(llama, config) == config


def test_load_takes_a_file(llama, kept, made, tmp_path):
    kept("scale")
    path = tmp_path / "mine.safetensors"
    made["klt"].save(path)
    assert config_of_loaded(llama, None, path) == RotorConfig(rotation="calibrated")
    with pytest.raises(ValueError, match=r"^\[calibration\] An existing file is required"):
        rotormlx.load("model", None, tmp_path / "none.safetensors")


def test_a_calibrated_configuration_needs_one(llama, kept):
    config = RotorConfig(channel_scale="calibrated")
    with pytest.raises(ValueError, match=r"transform scale is required, but none is kept"):
        rotormlx.apply(llama, config)
    with pytest.raises(ValueError, match="transform rotors or klt is required"):
        rotormlx.apply(llama, RotorConfig(rotation="calibrated"))
    kept("scale")
    assert rotormlx.apply(llama, config).config == config
    assert rotormlx.make_prompt_cache(llama, config)[0].calibrated is not None


def test_models_of_other_shapes_read_no_weights(llama, kept, monkeypatch):
    kept("scale")
    monkeypatch.setattr(fingerprint, "_sample", lambda *_: pytest.fail("weights were read"))
    assert calibration.find(tiny.build("llama", num_hidden_layers=3)) is None


def test_a_quantized_model_is_another_model(llama, made, tmp_path):
    path = tmp_path / "c.safetensors"
    made["scale"].save(path)
    other = tiny.build("llama")
    nn.quantize(other, group_size=32, bits=4)
    with pytest.raises(ValueError, match="has other sizes or another quantization"):
        calibration.load(path, other)


def test_it_says_what_it_holds(made):
    assert {n: c.numbers_a_head for n, c in made.items()} == {
        "scale": 64,
        "rotors": 256,
        "klt": 4096,
    }
    assert all(isinstance(c, Calibration) and c.layers == [0, 1] for c in made.values())
    assert json.loads(RotorConfig(rotation="calibrated").to_json())["rotation"] == "calibrated"
