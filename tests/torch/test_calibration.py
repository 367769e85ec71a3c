"""Calibrations on the torch side: the bytes of MLX, files that go both ways, what is refused."""

import copy
import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest
import torch

import rotormlx
import rotormlx.torch as rt
from rotormlx.codec import reference, rotation
from rotormlx.codec.format import BLOCK, KEY, ROLES, Codec, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.mlx import calibration as mlx_calibration
from rotormlx.mlx import hosts
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.fingerprint import fingerprint
from rotormlx.storage.calibration import TRANSFORMS, default_path
from rotormlx.torch import torch_ops
from rotormlx.torch.calibration import arrays_of
from rotormlx.torch.fingerprint import weights
from rotormlx.torch.layer import RotorLayer
from rotormlx.torch.prompt_cache import state_of
from rotormlx.torch.torch_ops import KVView
from tests.support import codec_cases, noise
from tests.support.both_hosts import assert_same_state, by_mlx, by_torch, calibration, written
from tests.support.torch_models import CACHE, tokens

K, D, DV, LAYER = 3, 64, 80, 1
CONFIG = RotorConfig(4, 3, window=10)
# Of layers 0 and 1, keys and values: the first needs far more bits than the others.
LOSSES = [(1.0, 1e-2), (2e-2, 1e-4)]
GIVEN = [(4, 3), (3, 2)]


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """The native library, and torch operations."""
    if request.param == "torch":
        monkeypatch.setattr("rotormlx.kernels.cpu_library.missing", lambda: "not wanted")
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return written(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def models(checkpoint):
    """One checkpoint in both hosts."""
    pair = by_mlx(checkpoint), by_torch(checkpoint)
    yield pair
    rotormlx.remove(pair[0])


def made_of(model, transform, **options):
    """A calibration of a model of MLX with the shapes of the tiny Llama."""
    return calibration(transform, fingerprint(model), heads=2, dims=(32, 32), **options)


def of_layer(transform):
    """A calibration whose layer has the shapes of the vectors of this file."""
    return calibration(transform, None, heads=K, dims=(D, DV), layers=(LAYER,))


def vectors(tokens, seed=0):
    """Keys and values, float16 ``[1, K, tokens, D]`` and ``[..., DV]``."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(1, K, tokens, D)) * np.exp(rng.normal(size=D)) + rng.normal(size=D)
    values = rng.normal(size=(1, K, tokens, DV))
    return keys.astype(np.float16), values.astype(np.float16)


def add(layer, pair):
    handle, _ = layer.update(*map(torch.from_numpy, pair))
    return handle.step.read(None)


# ---- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_bytes_are_those_of_the_mlx_cache(transform):
    """After appends and trims, into packed blocks and to the last token."""
    made = of_layer(transform)
    config = made.configured(CONFIG)
    layer = RotorLayer(config, LAYER, arrays_of(made, LAYER))
    cache = RotorKVCache(config, LAYER, calibrated=mlx_calibration.arrays_of(made, LAYER))
    keys, values = vectors(900)
    start = 0
    for change in (300, -160, 210, -340, 250, -40, 200):
        if change > 0:
            part = [x[:, :, start : start + change] for x in (keys, values)]
            start += change
            add(layer, part)
            cache.update_and_fetch(*map(mx.array, part))
        else:
            layer.crop(change)
            cache.trim(-change)
        assert_same_state(state_of(layer), cache.state)
    assert layer.packed_tokens >= 3 * BLOCK


def reference_codec(made, role):
    """The codec of a layer's role, by the reference's own way, and its channel scale."""
    given = made.of(LAYER)[ROLES.index(role)]
    bits = CONFIG.code_bits(role)
    if made.transform == "scale":
        return codec(CONFIG, given.shape[-1], layer=LAYER, role=role), given
    return Codec(role, bits, rotation.calibrated(given)), None


def numpy_of(packed, blocks):
    """The first blocks as the reference takes them."""
    words, *rest = (None if a is None else a[:, :, :blocks].numpy() for a in packed)
    return Packed(words.view(np.uint32), *rest)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_packed_blocks_are_the_reference(path, transform):
    made = of_layer(transform)
    layer = RotorLayer(made.configured(CONFIG), LAYER, arrays_of(made, LAYER))
    pair = vectors(4 + 3 * BLOCK + 80)
    add(layer, pair)
    assert layer.packed == [4 * BLOCK]
    for role, store, x in zip(ROLES, layer.stores, pair, strict=True):
        chosen, scale = reference_codec(made, role)
        found = numpy_of(store.packed, 4)
        rows = x[:, :, 4 : 4 + 4 * BLOCK].astype(np.float64)
        expected = reference.encode(rows, chosen, channel_scale=scale, centres=found.centres)
        z = codec_cases.unit_rows(rows, chosen, scale=scale, centres=found.centres)
        codec_cases.compare(found, expected, chosen, z)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_attention_is_the_reference(path, transform):
    made = of_layer(transform)
    config = made.configured(CONFIG)
    layer = RotorLayer(config, LAYER, arrays_of(made, LAYER))
    add(layer, vectors(300))
    view = add(layer, vectors(5, seed=1))
    query = np.random.default_rng(2).normal(size=(1, 2 * K, 5, D)).astype(np.float32)
    found = rt.attend(
        torch.from_numpy(query),
        view.lengths,
        view.keys,
        view.values,
        config,
        layer=LAYER,
        scale=0.05,
        causal=True,
    )
    packed, count = view.lengths.tolist()[0]
    assert packed == 3 * BLOCK + BLOCK
    whole = []
    for role, side in zip(ROLES, view[:2], strict=True):
        chosen, scale = reference_codec(made, role)
        held = numpy_of(side.packed, packed // BLOCK)
        decoded = reference.decode(held, chosen, channel_scale=scale)
        if role == KEY:
            taken = noise.of_sequence(
                query,
                held,
                chosen,
                scale=0.05,
                channel_scale=scale,
                sink=4,
                packed_tokens=packed,
                tokens=count,
            )
        exact = side.exact[:, :, : count - packed].double().numpy()
        whole.append(np.concatenate([exact[:, :, :4], decoded, exact[:, :, 4:]], axis=2))
    wanted = reference.attend(query, *whole, scale=0.05, noise=taken, mask="causal")
    # Sums in float32 of some hundred terms, and exponentials of scores of about 10.
    assert np.abs(found.numpy() - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_decoded_vectors_are_the_reference(path, transform):
    made = of_layer(transform)
    config = made.configured(CONFIG)
    for role, x in zip(ROLES, vectors(2 * BLOCK), strict=True):
        chosen, scale = reference_codec(made, role)
        options = {
            "layer": LAYER,
            "role": role,
            "channel_scale": None if scale is None else torch.from_numpy(scale),
            "rotation": chosen.rotation,
        }
        packed = rt.encode(torch.from_numpy(x), config, **options)
        found = rt.decode(packed, config, head_dim=x.shape[-1], **options).numpy()
        wanted = reference.decode(numpy_of(packed, 2), chosen, channel_scale=scale)
        # 1e-5 for sums in float32, the bound of docs/FORMAT.md.
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


# ---- operators ----------------------------------------------------------------------------------


def klt_layer(made=None):
    made = made or of_layer("klt")
    return RotorLayer(made.configured(CONFIG), LAYER, arrays_of(made, LAYER))


def test_operators_with_calibrated_rotations_pass_opcheck():
    layer = klt_layer()
    add(layer, vectors(300))
    view = add(layer, vectors(2, seed=1))
    names = [rotation.reference_to(side.codec.rotation) for side in view[:2]]
    none = Packed(None, None, None)
    arguments = (
        *(torch.randn(1, 2 * K, 2, D), view.lengths, view.keys.exact, *(view.keys.packed or none)),
        *(None, view.values.exact, *(view.values.packed or none)[:2], None, None, None),
    )
    options = {"key_bits": 4, "value_bits": 3, "seed": 0, "layer": LAYER, "sink": 4}
    options |= {"rotation": names[0], "value_rotation": names[1], "scale": 0.1, "causal": True}
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rotormlx.attend, arguments, options, test_utils=tests)


def test_rotations_that_do_not_fit_are_refused():
    layer = klt_layer()
    add(layer, vectors(300))
    keys, values = (store.codec.rotation for store in layer.stores)
    config, x = layer.config, torch.from_numpy(vectors(BLOCK)[0])
    options = {"layer": LAYER, "role": "key"}
    for rows, own, message in (
        (x, None, r"^\[rotation\] A calibrated rotation must be given as an object"),
        (x, values, r"^\[codec\] The keys must have the head_dim of their calibrated rotation, 80"),
        (x[:, :2], keys, r"^\[encode\] A calibrated rotation must have one matrix per KV head"),
    ):
        with pytest.raises(ValueError, match=message):
            rt.encode(rows, config, rotation=own, **options)


def test_a_copy_of_a_cache_outlives_it():
    """Operators find a rotation by a text; the matrices go with the last cache that uses them."""
    first, more = klt_layer(), vectors(100, seed=3)
    add(first, vectors(300))
    twin, used = copy.deepcopy(first), weakref.ref(first.stores[0].codec.rotation)
    add(first, more)
    expected = state_of(first)
    del first
    gc.collect()
    add(twin, more)
    for a, b in zip(state_of(twin), expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    del twin
    gc.collect()
    assert used() is None


def test_rotations_go_with_the_calibration_and_not_with_each_cache():
    """What is derived from them is made once for all conversations."""
    held = [of_layer("klt")]

    def new():
        layer = klt_layer(held[0])
        add(layer, vectors(300))
        return weakref.ref(layer.stores[0].codec.rotation)

    first = new()
    gc.collect()
    assert first() is not None
    assert new()() is first()
    held.clear()
    gc.collect()
    assert first() is None


# ---- models -------------------------------------------------------------------------------------


def filled(model, count=230, **options):
    """A cache of a torch model that has read some tokens."""
    cache = rt.RotorCache(model.config, **options)
    with torch.inference_mode():
        model(tokens(count), **{CACHE: cache})
    return cache


def read_by_mlx(model, count=230):
    caches = rotormlx.make_prompt_cache(model)
    mx.eval(model(mx.array(tokens(count).numpy()), cache=caches))
    return caches


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_file_goes_from_mlx_to_torch_and_back(models, tmp_path, transform):
    model, other = models
    made = made_of(model, transform)
    made.save(tmp_path / "c.safetensors")
    rotormlx.apply(model, CONFIG, tmp_path / "c.safetensors")
    caches = read_by_mlx(model)
    rotormlx.save_prompt_cache(tmp_path / "a.safetensors", model, caches, {"x": "y"})
    rt.apply(other)  # the file says how it was calibrated
    cache, facts = rt.load_prompt_cache(tmp_path / "a.safetensors", other)
    assert (facts["x"], cache.rotor_config) == ("y", made.configured(CONFIG))
    rt.save_prompt_cache(tmp_path / "b.safetensors", other, cache, facts)
    again, _ = rotormlx.load_prompt_cache(tmp_path / "b.safetensors", model)
    for first, layer, last in zip(caches, cache.layers, again, strict=True):
        assert_same_state(state_of(layer), first.state)
        assert_same_state(state_of(layer), last.state)
    more = tokens(9, seed=5)
    with torch.inference_mode():
        found = other(more, **{CACHE: cache}).logits.numpy()
    expected = np.array(model(mx.array(more.numpy()), cache=again))
    # Two hosts multiply the same float32 weights; a code at a boundary may be another.
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_model_generates_with_its_calibration(models, tmp_path, transform):
    model, other = models
    made = made_of(model, transform)
    made.save(tmp_path / "c.safetensors")
    found = []
    for given in (made, tmp_path / "c.safetensors", str(tmp_path / "c.safetensors")):
        report = rt.apply(other, CONFIG, given)
        assert report.config == made.configured(CONFIG)
        assert "calibrated" in report.summary
        used = other.generate(tokens(230), max_new_tokens=8, return_dict_in_generate=True)
        cache = getattr(used, "past_key_values", None) or used[CACHE]
        assert cache.rotor_config == report.config
        for layer in cache.rotor_layers:
            for a, b in zip(layer.calibrated, made.of(layer.layer), strict=True):
                assert np.array_equal(a, b)
        found.append(used.sequences)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    mine = filled(other, rotor_config=CONFIG, calibration=rt.load_calibration(given, other))
    assert mine.rotor_config == report.config


def test_bits_by_layer_are_those_of_mlx(models, tmp_path):
    model, other = models
    made = made_of(model, "scale", losses=LOSSES)
    reports = (
        rotormlx.apply(model, RotorConfig(3, 3), made),
        rt.apply(other, RotorConfig(3, 3), made),
    )
    for a, b in zip(reports[0].layers, reports[1].layers, strict=True):
        assert (a.key_bits, a.value_bits) == (b.key_bits, b.value_bits)
    assert "K3 V3 on average, by layer, cascade with calibrated" in reports[1].summary
    caches = read_by_mlx(model)
    rotormlx.save_prompt_cache(tmp_path / "a.safetensors", model, caches)
    cache, _ = rt.load_prompt_cache(tmp_path / "a.safetensors", other)
    assert cache.rotor_config is None
    fresh = rt.RotorCache(other.config, RotorConfig(3, 3), made)
    for held in (caches, cache.layers, fresh.layers):
        assert [(c.config.key_bits, c.config.value_bits) for c in held] == GIVEN
    rt.save_prompt_cache(tmp_path / "b.safetensors", other, cache)
    again, _ = rotormlx.load_prompt_cache(tmp_path / "b.safetensors", model)
    for layer, last in zip(cache.layers, again, strict=True):
        assert_same_state(state_of(layer), last.state)


def test_the_calibration_that_is_kept_is_taken_when_asked(models):
    """One that MLX has kept, and one with the name that torch would give it."""
    model, other = models
    config = RotorConfig(channel_scale="calibrated")
    with pytest.raises(ValueError, match=r"transform scale is required, but none is kept"):
        rt.apply(other, config)
    assert other.config._attn_implementation != "rotormlx"
    for place in (
        mlx_calibration.default_path(model, "scale"),
        default_path(weights(other), "scale"),
    ):
        place.parent.mkdir(parents=True, exist_ok=True)
        made_of(model, "scale").save(place)
        assert rt.apply(other, config).config == config
        assert rotormlx.apply(model, config).config == config
        place.write_bytes(place.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"^\[calibration\] .*it is damaged"):
            rt.apply(other, config)
        place.unlink()


def test_a_file_without_tokens_has_no_calibration(models, tmp_path):
    model, other = models
    rotormlx.apply(model, CONFIG, made_of(model, "klt"))
    where = tmp_path / "e.safetensors"
    rotormlx.save_prompt_cache(where, model, rotormlx.make_prompt_cache(model))
    rt.apply(other)
    with pytest.raises(ValueError, match=r"e\.safetensors must hold tokens, whose calibration"):
        rt.load_prompt_cache(where, other)


# ---- what is refused ----------------------------------------------------------------------------


def test_another_models_files_are_refused_on_both_sides(models, tmp_path):
    model, other = models
    strangers = [load(written(tmp_path / "s", seed=7)) for load in (by_mlx, by_torch)]
    rotormlx.apply(strangers[0])
    rt.apply(strangers[1])
    made = made_of(model, "scale")
    made.save(tmp_path / "c.safetensors")
    for given in (made, tmp_path / "c.safetensors"):
        for apply, stranger in zip((rotormlx.apply, rt.apply), strangers, strict=True):
            with pytest.raises(ValueError, match=r"^\[calibration\] .* must be of this model, but"):
                apply(stranger, CONFIG, given)
    rotormlx.apply(model, CONFIG, made)
    rt.apply(other, CONFIG, made)
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    rotormlx.save_prompt_cache(paths[0], model, read_by_mlx(model))
    rt.save_prompt_cache(paths[1], other, filled(other))
    loads = rotormlx.load_prompt_cache, rt.load_prompt_cache
    for where in paths:
        for load, stranger, own in zip(loads, strangers, models, strict=True):
            message = rf"^\[prompt cache\] {where} must be of this llama, but other weights made it"
            with pytest.raises(ValueError, match=message):
                load(where, stranger)
            load(where, own)
    rotormlx.remove(strangers[0])


def test_a_fingerprint_that_is_none_is_refused(models, tmp_path):
    """A file that names its model in another way; one that names none is taken, as mlx-lm's are."""
    from mlx_lm.models.cache import save_prompt_cache

    model, other = models
    rt.apply(other)
    rotormlx.apply(model)
    caches = read_by_mlx(model)
    where = str(tmp_path / "a.safetensors")
    with hosts.MLX_LM.in_place():
        for texts, says in (({"rotormlx_model": "f" * 64}, "fingerprint of version 1"), ({}, None)):
            save_prompt_cache(where, caches, texts)
            for load, reader in (
                (rotormlx.load_prompt_cache, model),
                (rt.load_prompt_cache, other),
            ):
                if says is None:
                    assert load(where, reader)[1] == {}
                    continue
                with pytest.raises(ValueError, match=says) as error:
                    load(where, reader)
                assert where in str(error.value)


def test_arguments_in_another_order_are_refused(models, tmp_path):
    _, other = models
    rt.apply(other)
    cache = filled(other)
    where = tmp_path / "a"
    with pytest.raises(ValueError, match=r"A RotorCache is required after the model, but a dict"):
        rt.save_prompt_cache(where, cache, {"x": "y"})
    with pytest.raises(ValueError, match=r"must be a model of transformers, but a RotorCache"):
        rt.save_prompt_cache(where, cache, cache)
    rt.save_prompt_cache(where, other, cache)
    with pytest.raises(ValueError, match=r"must be a model of transformers, but a LlamaConfig"):
        rt.load_prompt_cache(tmp_path / "a.safetensors", other.config)


def test_a_calibrated_cache_without_its_calibration_says_what_to_do(models):
    model, other = models
    rt.apply(other)
    with pytest.raises(
        ValueError, match=r"needs its calibration, but none was given; .*load_calibration"
    ):
        rt.RotorCache(other.config, RotorConfig(rotation="calibrated"))
    with pytest.raises(ValueError, match=r"needs its calibration, but a str was given; .*load"):
        rt.RotorCache(other.config, CONFIG, "c.safetensors")
    for apply, own in ((rotormlx.apply, model), (rt.apply, other)):
        with pytest.raises(ValueError, match=r"a Calibration or its file, but a dict was given"):
            apply(own, CONFIG, {})
    with pytest.raises(ValueError, match=r"Layer 0 must be calibrated, but the calibration has 1"):
        rt.RotorCache(other.config, CONFIG, made_of(model, "scale", layers=(1,)))
    with pytest.raises(ValueError, match=r"Layer 0 must be calibrated, but the calibration has 1"):
        rt.RotorCache(
            other.config, CONFIG, made_of(model, "scale", layers=(1,), losses=[(1.0, 1.0)])
        )
    wrong = calibration("klt", fingerprint(model), heads=3, dims=(32, 32))
    with pytest.raises(ValueError, match=r"needs an array \(2, 32, 32\) for the keys of layer 0"):
        filled(other, calibration=wrong)
    with pytest.raises(
        ValueError, match=r"keys of layer 0 must be calibrated with shape \(2, 32, 32\)"
    ):
        rt.apply(other, CONFIG, wrong)


def test_torch_operations_multiply_each_head_by_its_matrix():
    """Against one head at a time: a matrix that all share would pass with one head alone."""
    chosen = Codec("key", 4, rotation.calibrated(of_layer("klt").of(LAYER)[0]))
    x = torch.from_numpy(vectors(2 * BLOCK)[0]).repeat(2, 1, 1, 1)
    whole = torch_ops.encode(x, chosen)
    for head in range(K):
        alone = Codec("key", 4, rotation.calibrated(chosen.rotation.matrix[head : head + 1]))
        part = torch_ops.encode(x[:, head : head + 1], alone)
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[:, head : head + 1], b)
    assert isinstance(KVView(chosen, x, whole, None).codec, Codec)
