"""Caches in files: written by torch and read by MLX, and the other way round, bit for bit."""

import itertools
import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.cache import RotatingKVCache
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rotormlx.torch as rt
from rotormlx.config import RotorConfig
from rotormlx.mlx import hosts
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.sliding import SlidingRotorKVCache
from rotormlx.storage.fingerprint import MODEL
from rotormlx.torch.fingerprint import fingerprint
from rotormlx.torch.prompt_cache import state_of
from tests.support import torch_zoo
from tests.support.torch_models import CACHE, build, padded, tokens

CONFIGS = [RotorConfig(), RotorConfig(3, 2, "rotor3", window=10)]
IDS = ["default", "rotor3"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module", autouse=True)
def mlx_knows_the_class():
    with hosts.MLX_LM.in_place():
        yield


def model_of(name="llama"):
    model = build(name)
    rt.apply(model)
    return model


def filled(model, config, count=230, dtype=torch.float32):
    cache = rt.RotorCache(model.config, config)
    with torch.inference_mode():
        model.to(dtype)(tokens(count), **{CACHE: cache})
    return cache


def content(path):
    with safe_open(path, "pt") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return arrays, file.metadata()


def assert_same_file(a, b):
    (arrays, facts), (others, other_facts) = content(a), content(b)
    # mlx-lm leaves the place of our checksum empty.
    assert facts | {"2.0": ""} == other_facts | {"2.0": ""}
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype, name
        assert torch.equal(array, others[name]), name


def test_layers_may_have_a_head_dim_of_their_own(tmp_path):
    model = torch_zoo.build("gemma4_text")
    rt.apply(model)
    cache = filled(model, RotorConfig(8, 8, window=10))
    rt.save_prompt_cache(tmp_path / "a.safetensors", model, cache)
    again, _ = rt.load_prompt_cache(tmp_path / "a.safetensors", model)
    assert again.packed_tokens == 192
    with torch.inference_mode():
        found, expected = (model(tokens(1), **{CACHE: each}).logits for each in (again, cache))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_torch_to_mlx_and_back(tmp_path, config, dtype):
    model = model_of()
    rt.save_prompt_cache(
        tmp_path / "a.safetensors", model, filled(model, config, dtype=dtype), {"x": "y"}
    )
    caches, facts = mlx_cache.load_prompt_cache(
        str(tmp_path / "a.safetensors"), return_metadata=True
    )
    assert facts == {"x": "y", MODEL: fingerprint(model).text}
    assert [type(cache) for cache in caches] == [RotorKVCache] * 2
    assert caches[1].packed_tokens >= 128
    mlx_cache.save_prompt_cache(str(tmp_path / "b.safetensors"), caches, facts)
    assert_same_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    again, facts = rt.load_prompt_cache(tmp_path / "b.safetensors", model)
    assert (facts["x"], again.rotor_config) == ("y", config)
    rt.save_prompt_cache(tmp_path / "c.safetensors", model, again, facts)
    assert_same_file(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_keys_and_values_of_different_dtypes_keep_theirs(tmp_path, dtypes):
    model = model_of()
    cache = rt.RotorCache(model.config, RotorConfig(window=10))
    rng = np.random.default_rng(0)
    for index in range(2):
        pair = (torch.from_numpy(rng.normal(size=(1, 2, 200, 32))).to(dtype) for dtype in dtypes)
        handle, _ = cache.update(*pair, index)
        handle.step.read(None)
    rt.save_prompt_cache(tmp_path / "a.safetensors", model, cache)
    caches, facts = mlx_cache.load_prompt_cache(
        str(tmp_path / "a.safetensors"), return_metadata=True
    )
    mlx_cache.save_prompt_cache(str(tmp_path / "b.safetensors"), caches, facts)
    assert_same_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    again, _ = rt.load_prompt_cache(tmp_path / "b.safetensors", model)
    for layer in again.layers:
        assert [store.exact.dtype for store in layer.stores] == list(dtypes)
    rt.save_prompt_cache(tmp_path / "c.safetensors", model, again)
    assert_same_file(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_conversation_goes_on_on_the_other_side(tmp_path, config):
    """MLX reads a prompt, torch loads it, and both go on with the same tokens: the same bytes."""
    rng = np.random.default_rng(0)
    first, more = (rng.normal(size=(2, 1, 2, n, 32)).astype(np.float16) for n in (230, 90))
    caches = [RotorKVCache(config, layer) for layer in range(2)]
    for cache in caches:
        cache.update_and_fetch(*map(mx.array, first))
        cache.trim(50)
    mlx_cache.save_prompt_cache(str(tmp_path / "a.safetensors"), caches)
    loaded, _ = rt.load_prompt_cache(tmp_path / "a.safetensors", model_of())
    for index, cache in enumerate(caches):
        cache.update_and_fetch(*map(mx.array, more))
        handle, _ = loaded.update(*map(torch.from_numpy, more), index)
        handle.step.read(None)
        for a, b in zip(state_of(loaded.layers[index]), cache.state, strict=True):
            if isinstance(a, torch.Tensor):
                assert a.numpy().tobytes() == np.array(b).tobytes()
            else:
                assert a == b


@pytest.mark.parametrize(
    "make",
    [lambda layer: SlidingRotorKVCache(32, None, layer), lambda layer: RotatingKVCache(32)],
    ids=["compressed", "exact"],
)
def test_compressed_windows_of_mlx_are_refused_with_what_to_do(tmp_path, make):
    """The same file with exact windows is read."""
    path = str(tmp_path / "a.safetensors")
    caches = [RotorKVCache(None, layer) if layer % 2 else make(layer) for layer in range(4)]
    for cache in caches:
        cache.update_and_fetch(*(mx.ones((1, 2, 9, 32)) for _ in range(2)))
    mlx_cache.save_prompt_cache(path, caches)
    model = model_of("gemma3")
    if isinstance(caches[0], RotatingKVCache):
        assert rt.load_prompt_cache(path, model)[0].get_seq_length() == 9
        return
    with pytest.raises(ValueError, match=r"compressed windows \(Sliding.*sliding_windows=False"):
        rt.load_prompt_cache(path, model)


@pytest.mark.parametrize("count", [20, 31, 32, 230])
def test_sliding_windows_go_to_mlx_and_back(tmp_path, count):
    """Windows that are not full, just full, and long full."""
    model = model_of("gemma3")
    cache = filled(model, RotorConfig(window=10), count)
    path = str(tmp_path / "a.safetensors")
    rt.save_prompt_cache(path, model, cache)
    caches = mlx_cache.load_prompt_cache(path)
    kinds = [type(c).__name__ for c in caches]
    assert kinds == ["RotatingKVCache", "RotorKVCache"] * 2
    more = np.random.default_rng(0).normal(size=(2, 1, 2, 3, 32)).astype(np.float32)
    for index in (0, 2):
        ring, layer = caches[index], cache.layers[index]
        for step in range(3):
            one = more[:, :, :, step : step + 1]
            layer.update(*map(torch.from_numpy, one))
            ring.update_and_fetch(*map(mx.array, one))
        assert ring.offset == layer.cumulative_length == count + 3
    mlx_cache.save_prompt_cache(path, caches)
    for index in (1, 3):
        handle, _ = cache.update(*map(torch.from_numpy, more), index)
        handle.step.read(None)
        caches[index].update_and_fetch(*map(mx.array, more))
    mlx_cache.save_prompt_cache(path, caches)
    again, _ = rt.load_prompt_cache(path, model)
    for index in (0, 2):
        for name in ("keys", "values"):
            found, expected = (getattr(c.layers[index], name) for c in (again, cache))
            assert torch.equal(found, expected)
    with torch.inference_mode():
        ids = tokens(4, 9)
        a, b = (model(ids, **{CACHE: c}).logits for c in (again, cache))
    assert torch.equal(a, b)


def test_generation_goes_on_from_a_file(tmp_path):
    model, config = model_of(), RotorConfig(8, 8)
    ids = tokens(230)
    rt.save_prompt_cache(tmp_path / "a.safetensors", model, filled(model, config, 200))
    saved, _ = rt.load_prompt_cache(tmp_path / "a.safetensors", model)
    whole = filled(model, config, 200)
    found, expected = (model.generate(ids, **{CACHE: c}, max_new_tokens=10) for c in (saved, whole))
    assert torch.equal(found, expected)


def test_an_empty_cache_is_saved(tmp_path):
    model = model_of("gemma3")
    rt.save_prompt_cache(tmp_path / "a.safetensors", model, rt.RotorCache(model.config))
    assert mlx_cache.load_prompt_cache(str(tmp_path / "a.safetensors"))[1].empty()
    loaded, _ = rt.load_prompt_cache(tmp_path / "a.safetensors", model)
    assert loaded.get_seq_length() == 0
    assert torch.equal(
        filled(model, RotorConfig()).layers[1].stores[0].exact,
        (getattr(model(tokens(230), **{CACHE: loaded}), CACHE).layers[1].stores[0].exact),
    )


# ---- what is refused ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = model_of()
    path = tmp_path_factory.mktemp("saved") / "a.safetensors"
    rt.save_prompt_cache(path, model, filled(model, RotorConfig(window=10)))
    return model, path


def text(string):
    return torch.tensor([ord(c) for c in string], dtype=torch.int32)


DAMAGE = {
    "version": ("0.0", lambda a: a + 1, "format version 2, .* has version 3"),
    "config": ("0.1", lambda a: text("{}"), "must have exactly the fields"),
    "layer": ("1.2", lambda a: a * 0, "layer 1 at position 1, but it holds 'layer 0'"),
    "tokens": ("1.3", lambda a: a - 1, r"exact keys of dtype and shape"),
    "packed": ("1.4", lambda a: a - 64, r"exact keys of dtype and shape"),
    "counts": ("1.4", lambda a: a + 64, "counts that add up"),
    "negative": ("1.4", lambda a: a * 0 - 1, "integers from 0"),
    "exact": ("1.5", lambda a: a[0], "floating array of 4 dimensions"),
    "words": ("1.6", lambda a: a[:, :, :1], "key words of dtype and shape"),
    "dtype": ("1.12", lambda a: a.float(), "value scales of dtype and shape"),
    "centres": ("1.8", lambda a: a[..., :8].contiguous(), "key centres of dtype and shape"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(saved, tmp_path, name):
    model, path = saved
    entry, change, message = DAMAGE[name]
    arrays, facts = content(path)
    arrays[entry] = change(arrays[entry]).contiguous()
    save_file(arrays, tmp_path / "b.safetensors", facts)
    with pytest.raises(ValueError, match=message):
        rt.load_prompt_cache(tmp_path / "b.safetensors", model)


def test_files_that_are_none_are_refused(saved, tmp_path):
    model, path = saved
    with pytest.raises(ValueError, match="An existing file is required"):
        rt.load_prompt_cache(tmp_path / "none.safetensors", model)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="bytes of tensors, but it has"):
        rt.load_prompt_cache(tmp_path / "cut.safetensors", model)
    save_file(load_file(path), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="must be a file of save_prompt_cache"):
        rt.load_prompt_cache(tmp_path / "bare.safetensors", model)
    mlx_cache.save_prompt_cache(str(tmp_path / "k.safetensors"), [mlx_cache.KVCache()])
    with pytest.raises(ValueError, match=r"requires 2 layers, but .*k\.safetensors has 1"):
        rt.load_prompt_cache(tmp_path / "k.safetensors", model)


def test_caches_of_others_are_refused(saved, tmp_path):
    model, path = saved
    with pytest.raises(ValueError, match=r"requires 4 layers, but .*a\.safetensors has 2"):
        rt.load_prompt_cache(path, model_of("gemma3"))
    deeper = build("llama", num_hidden_layers=4)
    rt.apply(deeper)
    rt.save_prompt_cache(tmp_path / "d.safetensors", deeper, filled(deeper, RotorConfig()))
    with pytest.raises(ValueError, match="requires a DynamicSlidingWindowLayer in layer 0, but"):
        rt.load_prompt_cache(tmp_path / "d.safetensors", model_of("gemma3"))
    mlx_cache.save_prompt_cache(
        str(tmp_path / "l.safetensors"), [RotorKVCache(max_size=400), RotorKVCache(layer=1)]
    )
    with pytest.raises(
        ValueError, match=r"l\.safetensors was made with max_kv_size, .* use it with"
    ):
        rt.load_prompt_cache(tmp_path / "l.safetensors", model)


def test_rows_of_other_lengths_are_not_saved(tmp_path):
    model = model_of()
    _, batch = padded([100, 60])
    cache = rt.RotorCache(model.config)
    with torch.inference_mode():
        model(**batch, **{CACHE: cache})
    with pytest.raises(ValueError, match=r"must have one length to be saved, but layer 0 has rows"):
        rt.save_prompt_cache(tmp_path / "a.safetensors", model, cache)
    cache.batch_select_indices(torch.tensor([1]))
    rt.save_prompt_cache(tmp_path / "a.safetensors", model, cache)
    loaded, _ = rt.load_prompt_cache(tmp_path / "a.safetensors", model)
    assert loaded.get_seq_length() == 60
    assert json.loads(RotorConfig().to_json()) == json.loads(loaded.rotor_config.to_json())
