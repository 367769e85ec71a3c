"""Compressed caches in mlx-vlm: its own attention, caches, batches and prefix cache."""

import copy
from types import SimpleNamespace

import mlx.core as mx
import pytest

from rotormlx.config import RotorConfig
from rotormlx.mlx import hosts, integration
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: pip install 'rotormlx[vlm]'")
import mlx_vlm
from mlx_vlm.apc import APCManager
from mlx_vlm.apc_adapters import clone_cache_entry, merge_cache_entries
from mlx_vlm.generate.ar import BatchGenerator, generate_step
from mlx_vlm.models import base, qwen2_vl
from mlx_vlm.models.cache import KVCache, make_prompt_cache
from mlx_vlm.speculative.cache_state import start_speculative_cache

K8V8 = RotorConfig(key_bits=8, value_bits=8)
VOCABULARY = 500
IMAGE = 498


def build(**text) -> mlx_vlm.models.qwen2_vl.Model:
    """A tiny model that reads an image of 28 by 28 points as one token."""
    settings = {
        "model_type": "qwen2_vl",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]},
        "tie_word_embeddings": False,
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 128, "num_heads": 2}
    vision |= {"patch_size": 14, "spatial_merge_size": 1}
    config = qwen2_vl.ModelConfig.from_dict(
        settings
        | text
        | {"text_config": settings | text, "vision_config": {"model_type": "qwen2_vl"} | vision}
        | {"image_token_id": IMAGE, "vision_start_token_id": 497}
    )
    config.text_config = qwen2_vl.TextConfig.from_dict(config.text_config)
    config.vision_config = qwen2_vl.VisionConfig.from_dict(config.vision_config)
    mx.random.seed(0)
    model = qwen2_vl.Model(config)
    mx.eval(model.parameters())
    return model.eval()


def tokens(count: int, seed: int = 1) -> mx.array:
    return mx.random.randint(0, 490, (1, count), key=mx.random.key(seed))


def begin(model) -> None:
    model.language_model._position_ids = model.language_model._rope_deltas = None


def logits(model, ids: mx.array, caches: list) -> mx.array:
    begin(model)
    parts = [ids[:, i : i + 100] for i in range(0, ids.shape[1], 100)]
    return mx.concatenate([model.language_model(p, cache=caches).logits for p in parts], axis=1)


def written(model, ids: mx.array, count: int = 8, **options) -> list[int]:
    """What greedy generation writes."""
    begin(model)
    options = {"pixel_values": None, "mask": None, "temperature": 0.0} | options
    return [int(t) for t, _ in generate_step(ids, model, max_tokens=count, **options)]


@pytest.fixture(autouse=True)
def original_code():
    """mlx-vlm as it came, before and after each test."""
    hosts.MLX_VLM.remove()
    yield base.scaled_dot_product_attention.__code__
    hosts.MLX_VLM.remove()


@pytest.fixture
def model():
    return build()


def test_the_host_is_found_by_the_model(model) -> None:
    assert hosts.of(model) is hosts.of(model.language_model) is hosts.MLX_VLM


def test_apply_compresses_the_language_model_and_remove_restores_all(model, original_code) -> None:
    report = integration.apply(model, K8V8)
    assert [layer.compressed for layer in report.layers] == [True, True]
    caches = make_prompt_cache(model.language_model)
    assert [type(cache) for cache in caches] == [RotorKVCache] * 2
    assert base.scaled_dot_product_attention.__code__ is not original_code
    integration.remove(model)
    assert [type(cache) for cache in make_prompt_cache(model.language_model)] == [KVCache] * 2
    assert base.scaled_dot_product_attention.__code__ is original_code


def test_probing_leaves_the_model_as_it_was(model) -> None:
    begin(model)
    integration.apply(model, K8V8)
    assert model.language_model._position_ids is model.language_model._rope_deltas is None


def test_logits_are_close_to_the_float_cache(model) -> None:
    ids = tokens(300)
    want = logits(model, ids, make_prompt_cache(model.language_model))
    integration.apply(model, K8V8)
    caches = make_prompt_cache(model.language_model)
    got = logits(model, ids, caches)
    assert caches[0].packed_tokens == 192
    # An error of one part in 256 per code, spread by rotations: 1e-3 of the logits.
    assert (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item() < 3e-3


def test_a_limit_reaches_the_caches(model) -> None:
    integration.apply(model, K8V8)
    caches = make_prompt_cache(model.language_model, max_kv_size=300)
    assert [cache.max_size for cache in caches] == [300, 300]
    logits(model, tokens(600), caches)
    assert caches[0].size() <= 300
    assert caches[0].offset == 600


def test_generation_writes_what_it_writes_with_exact_caches(model) -> None:
    ids = tokens(200)
    want = written(model, ids)
    integration.apply(model, K8V8)
    caches = make_prompt_cache(model.language_model)
    assert written(model, ids, prompt_cache=caches) == want
    assert caches[0].packed_tokens == 128


def test_an_image_in_a_prompt(model) -> None:
    pixels = mx.random.normal((4, 3 * 2 * 14 * 14), key=mx.random.key(5))
    ids = mx.concatenate([tokens(100), mx.array([[497, IMAGE]]), tokens(90, seed=3)], axis=1)
    image = {"pixel_values": pixels, "image_grid_thw": mx.array([[1, 2, 2]])}
    want = written(model, ids, **image)
    assert want != written(model, ids.at[0, 101].add(-IMAGE))  # the image counts
    integration.apply(model, K8V8)
    caches = make_prompt_cache(model.language_model)
    assert written(model, ids, prompt_cache=caches, **image) == want
    assert caches[0].packed_tokens == 128


class Never:
    """A tokenizer's criterion of where a text ends: nowhere."""

    def __call__(self, token: int) -> bool:
        return False

    def add_eos_token_ids(self, ids: list[int] | None) -> None:
        pass


def batch(model, prompts: list[list[int]], count: int = 8, **options) -> list[list[int]]:
    """What a batch writes for each prompt, whatever order they end in."""
    begin(model)
    tokenizer = SimpleNamespace(stopping_criteria=Never())
    generator = BatchGenerator(
        model.language_model, tokenizer, max_tokens=count, prefill_step_size=64, **options
    )
    read = [model.get_input_embeddings(mx.array([p]), None).to_dict() for p in prompts]
    given = [{k: v for k, v in kwargs.items() if v is not None} for kwargs in read]
    uids = generator.insert(prompts, prompt_kwargs=given)
    seen: dict[int, list[int]] = {uid: [] for uid in uids}
    while any(len(row) < count for row in seen.values()):
        _, responses = generator.next()
        for response in responses:
            seen[response.uid].append(int(response.token))
    generator.close()
    return [seen[uid] for uid in uids]


PROMPTS = [tokens(n, seed=n)[0].tolist() for n in (200, 131, 260)]


def test_a_batch_writes_what_each_prompt_gets_alone_with_exact_caches(model, monkeypatch) -> None:
    want = [written(model, mx.array([prompt])) for prompt in PROMPTS]
    integration.apply(model, K8V8)
    made = []
    make = BatchRotorKVCache.__init__

    def noting(self, *args, **options) -> None:
        made.append(self)
        make(self, *args, **options)

    monkeypatch.setattr(BatchRotorKVCache, "__init__", noting)
    assert batch(model, PROMPTS) == want
    assert made


def test_the_prefix_cache_keeps_compressed_caches(model) -> None:
    shared = tokens(200)[0].tolist()
    prompts = [shared + tokens(20, seed=s)[0].tolist() for s in (11, 12)]
    integration.apply(model, K8V8)
    want = [batch(model, [p])[0] for p in prompts]
    manager = APCManager()
    got = [batch(model, [p], apc_manager=manager)[0] for p in prompts * 2]
    assert got == want * 2
    assert manager.stats.hits > 0


def test_two_hosts_in_one_process() -> None:
    pytest.importorskip("mlx_lm")
    from mlx_lm.models import base as mlx_lm_base
    from mlx_lm.models.cache import make_prompt_cache as mlx_lm_caches

    from tests.support import models as tiny

    text, seeing = tiny.build("llama"), build()
    code = mlx_lm_base.scaled_dot_product_attention.__code__
    ids = tokens(200)
    want_text = tiny.logits(text, tiny.tokens(200), mlx_lm_caches(text))
    want = logits(seeing, ids, make_prompt_cache(seeing.language_model))
    integration.apply(seeing, K8V8)
    assert mlx_lm_base.scaled_dot_product_attention.__code__ is code
    assert mx.array_equal(tiny.logits(text, tiny.tokens(200), mlx_lm_caches(text)), want_text)
    integration.apply(text, K8V8)
    assert type(mlx_lm_caches(text)[0]) is RotorKVCache
    integration.remove(seeing)
    assert mx.array_equal(logits(seeing, ids, make_prompt_cache(seeing.language_model)), want)
    got = tiny.logits(text, tiny.tokens(200), mlx_lm_caches(text))
    assert (mx.linalg.norm(got - want_text) / mx.linalg.norm(want_text)).item() < 3e-3
    integration.remove(text)
    assert mlx_lm_base.scaled_dot_product_attention.__code__ is code


def filled(*counts: int, config: RotorConfig = K8V8) -> BatchRotorKVCache:
    """A batch of rows with so many tokens."""
    singles = [RotorKVCache(config) for _ in counts]
    for row, (single, count) in enumerate(zip(singles, counts, strict=True)):
        single.update_and_fetch(*random(1, count, seed=row))
    return BatchRotorKVCache.merge(singles)


def random(batch: int, count: int, seed: int) -> tuple[mx.array, mx.array]:
    return tuple(
        mx.random.normal((batch, 2, count, 32), key=mx.random.key(10 * seed + part))
        for part in (1, 2)
    )


def test_a_draft_is_taken_back_from_one_sequence() -> None:
    cache, alone = RotorKVCache(K8V8), RotorKVCache(K8V8)
    for one in (cache, alone):
        one.update_and_fetch(*random(1, 200, seed=0))
    keys, values = random(1, 5, seed=1)
    transaction = start_speculative_cache([cache], 5)
    cache.update_and_fetch(keys, values)
    transaction.commit([2])
    alone.update_and_fetch(keys[:, :, :2], values[:, :, :2])
    assert cache.offset == alone.offset == 202
    assert_same(cache, alone)


def test_a_draft_is_taken_back_from_each_row_of_a_batch() -> None:
    """Rows accept different numbers of tokens; the longest decides what all have in common."""
    cache = filled(200, 90, 150)
    keys, values = random(3, 5, seed=7)
    transaction = start_speculative_cache([cache], 5)
    cache.update_and_fetch(keys, values)
    transaction.commit([3, 1, 5])
    for row, (count, accepted) in enumerate([(200, 3), (90, 1), (150, 5)]):
        alone = RotorKVCache(K8V8)
        alone.update_and_fetch(*random(1, count, seed=row))
        place = slice(row, row + 1), slice(None), slice(accepted)
        alone.update_and_fetch(keys[place], values[place])
        assert_same(cache.extract(row), alone)


def assert_same(a: RotorKVCache, b: RotorKVCache) -> None:
    for x, y in zip(a.state, b.state, strict=True):
        assert mx.array_equal(x, y) if isinstance(x, mx.array) else x == y


def test_a_prefix_cache_copies_what_it_keeps() -> None:
    cache = RotorKVCache(K8V8)
    cache.update_and_fetch(*random(1, 200, seed=0))
    kept = copy.deepcopy(cache)
    entry = clone_cache_entry(cache, min_capacity_tokens=None, eval_targets=[])
    cache.update_and_fetch(*random(1, 100, seed=1))
    assert_same(entry, kept)
    merged = merge_cache_entries([entry, entry], [200, 200])
    assert_same(merged.extract(1), kept)
