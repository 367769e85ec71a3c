"""Models with multi-head latent attention (MLA), and what their compressed caches go through."""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

import rotormlx
from rotormlx.config import RotorConfig
from rotormlx.mlx import hosts
from rotormlx.mlx.cache.latent import DecodedLatentKVCache, LatentKVCache
from rotormlx.mlx.host_caches import leaves

ZOO = json.loads((Path(__file__).parents[1] / "support" / "zoo.json").read_text())
# Exact caches between them are states, or the keys of an indexer.
PACKED, DECODED = "LatentKVCache", "DecodedLatentKVCache"
PAIR = [f"{PACKED} [0]", f"{PACKED} [1]"]
SPARSE = [f"{DECODED} [0]", "KVCache [1]"]
MODELS = {
    "deepseek_v3": [PACKED] * 4,
    "deepseek_v32": SPARSE * 4,
    "kimi_k25": [PACKED] * 4,
    "kimi_k3": ["ArraysCache"] * 3 + [PACKED],
    "kimi_linear": ["ArraysCache"] + [PACKED] * 3,
    "kimi_vl": [PACKED] * 4,
    "glm4_moe_lite": [PACKED] * 4,
    "glm_moe_dsa": SPARSE * 4,
    "longcat_flash": PAIR * 4,
    "longcat_flash_ngram": ["ArraysCache", *PAIR * 4],
    "mistral4": [PACKED] * 4,
    "bailing_moe_v3": ["ArraysCache"] * 3 + [PACKED],
    "bailing_hybrid": ["ArraysCache", PACKED] * 2,
}
# One of each kind: alone, two in a list, beside an indexer.
KINDS = ("deepseek_v3", "longcat_flash", "deepseek_v32")
K8V8 = RotorConfig(8, 8, sink=2, window=8)
COARSE = RotorConfig(2, 2, sink=2, window=8)
PROMPT, STEPS = 200, 10

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(f"mlx_lm.models.{name}") for name in MODELS),
    reason="this mlx-lm lacks some of the models",
)


@pytest.fixture(autouse=True)
def original():
    yield
    hosts.MLX_LM.remove()


def build(model_type, **changes):
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    mx.random.seed(0)
    args = {"model_type": model_type} | ZOO[model_type] | changes
    model = module.Model(module.ModelArgs.from_dict(args))
    mx.eval(model.parameters())
    return model.eval()


def ids(model_type, count, seed=1):
    settings = ZOO[model_type]
    vocabulary = settings.get("vocab_size") or settings["text_config"]["vocab_size"]
    return mx.random.randint(0, vocabulary - 1, (1, count), key=mx.random.key(seed))


def read(model, tokens, caches, chunk=60):
    """The logits of a prompt in chunks."""
    parts = [tokens[:, i : i + chunk] for i in range(0, tokens.shape[1], chunk)]
    logits = [model(part, cache=caches) for part in parts]
    mx.eval(logits)
    return mx.concatenate(logits, axis=1)


def step_through(model, tokens, caches):
    """The logits of a decode step for each token."""
    logits = []
    for place in range(tokens.shape[1]):
        logits.append(model(tokens[:, place : place + 1], cache=caches))
        mx.eval(logits)
    return mx.concatenate(logits, axis=1)


def errors(got, want):
    """Relative error of the logits of each token."""
    return np.array(mx.linalg.norm(got - want, axis=-1) / mx.linalg.norm(want, axis=-1)).ravel()


def latents_of(caches):
    return [cache for _, _, cache in leaves(caches) if isinstance(cache, LatentKVCache)]


# ---- every model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODELS)
def test_latents_are_found_and_reported(model_type):
    model = build(model_type)
    report = rotormlx.apply(model, RotorConfig(4, 3))
    labels = [label for _, label, _ in leaves(make_prompt_cache(model))]
    assert labels == MODELS[model_type]
    for label, layer in zip(labels, report.layers, strict=True):
        is_latent = "Latent" in label
        assert layer.compressed == layer.holds_latents == is_latent
        if is_latent:
            size = f"latent of {layer.head_dim_k} and RoPE part of {layer.head_dim_v}"
            assert size in str(layer)
            # Codes of 4 and of 8 bits, scales and centres.
            dims = layer.head_dim_k, layer.head_dim_v
            packed = sum(d * b / 8 + 2 + d / 32 for d, b in zip(dims, (4, 8), strict=True))
            assert f"{packed:.0f} bytes per token instead of {2 * sum(dims)}" in str(layer)
            assert layer.packed_bits_per_token == 8 * packed
    assert "latents at 4 bits, RoPE at 8, " in report.summary


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_are_near_the_exact_ones(model_type):
    model = build(model_type)
    tokens = ids(model_type, PROMPT + STEPS)
    found = []
    for config in (None, K8V8, COARSE):
        if config is not None:
            rotormlx.apply(model, config)
        caches = make_prompt_cache(model)
        read(model, tokens[:, :PROMPT], caches)
        found.append(step_through(model, tokens[:, PROMPT:], caches))
    assert all(cache.packed_tokens == 192 for cache in latents_of(caches))
    fine, coarse = (errors(got, found[0]) for got in found[1:])
    # The median, since a router may choose other experts for single tokens; 8 bits leave 0.7 %.
    assert 0 < np.median(fine) < 0.01
    assert np.median(coarse) > 4 * np.median(fine)


# ---- what caches go through ----------------------------------------------------------------------


def test_sparse_attention_picks_tokens_out_of_packed_latents():
    model_type = "deepseek_v32"
    model = build(model_type, index_topk=96)
    tokens = ids(model_type, PROMPT + STEPS)
    exact = make_prompt_cache(model)
    read(model, tokens[:, :PROMPT], exact)
    want = step_through(model, tokens[:, PROMPT:], exact)
    rotormlx.apply(model, K8V8)
    caches = make_prompt_cache(model)
    read(model, tokens[:, :PROMPT], caches)
    got = step_through(model, tokens[:, PROMPT:], caches)
    # The error decides between tokens that a random indexer holds for nearly equal; wrong tokens
    # altogether give an error of about 1.
    assert 0 < np.median(errors(got, want)) < 0.05


@pytest.mark.parametrize("model_type", KINDS)
def test_a_step_gives_what_a_chunk_gives(model_type):
    """A step reads packed latents, a chunk decoded ones."""
    model = build(model_type)
    rotormlx.apply(model, K8V8)
    tokens = ids(model_type, PROMPT + 2)
    logits = []
    for read_rest in (step_through, read):
        caches = make_prompt_cache(model)
        read(model, tokens[:, :PROMPT], caches)
        logits.append(read_rest(model, tokens[:, PROMPT:], caches))
    # They differ by the noise that attention over packed keys takes off, 2e-5 of a score.
    assert errors(*logits).max() < 1e-3


@pytest.mark.parametrize("model_type", KINDS)
def test_trimmed_tokens_are_forgotten(model_type):
    model = build(model_type)
    rotormlx.apply(model, K8V8)
    tokens = ids(model_type, PROMPT + STEPS)
    logits = []
    for wrong in (0, 5):
        caches = make_prompt_cache(model)
        read(model, tokens[:, :180], caches)
        if wrong:
            step_through(model, ids(model_type, wrong, seed=9), caches)
            assert trim_prompt_cache(caches, wrong) == wrong
        logits.append(step_through(model, tokens[:, 180:190], caches))
    assert errors(*logits).max() < 1e-4  # rounding: nothing was packed in between


@pytest.mark.parametrize("model_type", KINDS)
def test_saved_caches_go_on(model_type, tmp_path):
    model = build(model_type)
    rotormlx.apply(model, K8V8)
    tokens = ids(model_type, PROMPT + STEPS)
    caches = make_prompt_cache(model)
    read(model, tokens[:, :PROMPT], caches)
    path = tmp_path / "cache.safetensors"
    rotormlx.save_prompt_cache(path, model, caches)
    want = step_through(model, tokens[:, PROMPT:], caches)
    rotormlx.apply(model, COARSE)  # the file says how its caches are coded
    loaded, _ = rotormlx.load_prompt_cache(path, model)
    assert [type(c) for _, _, c in leaves(loaded)] == [type(c) for _, _, c in leaves(caches)]
    got = step_through(model, tokens[:, PROMPT:], loaded)
    assert np.array_equal(np.array(got), np.array(want))


def test_a_file_of_keys_and_values_is_not_taken_for_latents(tmp_path):
    model = build("deepseek_v3")
    rotormlx.apply(model, K8V8)
    caches = [rotormlx.RotorKVCache(K8V8, i) for i in range(4)]
    for cache in caches:
        cache.update_and_fetch(mx.ones((1, 1, 3, 32)), mx.ones((1, 1, 3, 32)))
    path = tmp_path / "cache.safetensors"
    rotormlx.save_prompt_cache(path, model, caches)
    with pytest.raises(ValueError, match=r"requires KVCache in layer 0, but .* has RotorKVCache"):
        rotormlx.load_prompt_cache(path, model)


@pytest.mark.parametrize("model_type", KINDS)
def test_rows_of_a_batch_are_as_by_themselves(model_type):
    model = build(model_type)
    rotormlx.apply(model, K8V8)
    lengths = (PROMPT, 90)
    rows = [ids(model_type, n + STEPS, seed=n) for n in lengths]
    alone, want = [], []
    for row, n in zip(rows, lengths, strict=True):
        caches = make_prompt_cache(model)
        read(model, row[:, :n], caches)
        alone.append(caches)
    merged = [type(layer[0]).merge(list(layer)) for layer in zip(*alone, strict=True)]
    for row, n, caches in zip(rows, lengths, alone, strict=True):
        want.append(step_through(model, row[:, n:], caches))
    steps = mx.concatenate([row[:, -STEPS:] for row in rows])
    got = step_through(model, steps[:, :6], merged)
    got = mx.concatenate([got, read(model, steps[:, 6:], merged)], axis=1)
    for i in range(2):
        assert np.median(errors(got[i : i + 1], want[i])) < 1e-4
        for cache, own in zip(latents_of_row(merged, i), latents_of(alone[i]), strict=True):
            assert cache.packed_tokens == own.packed_tokens


def latents_of_row(caches, row):
    batches = (cache for _, _, cache in leaves(caches) if hasattr(cache, "hands_out_views"))
    return [batch.extract(row) for batch in batches]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "longcat_flash"])
def test_a_limit_holds_and_both_ways_of_reading_agree(model_type):
    model = build(model_type)
    rotormlx.apply(model, K8V8)
    tokens = ids(model_type, 400 + STEPS)
    logits = []
    for kind in (LatentKVCache, DecodedLatentKVCache):
        caches = make_prompt_cache(model, max_kv_size=256)
        for cache in latents_of(caches):
            cache.__class__ = kind
        read(model, tokens[:, :400], caches)
        logits.append(step_through(model, tokens[:, 400:], caches))
        assert all(c.size() <= 256 and c.offset == 400 + STEPS for c in latents_of(caches))
    assert errors(*logits).max() < 1e-3


def test_a_draft_model_changes_no_token():
    model, draft = build("deepseek_v3"), build("deepseek_v3", num_hidden_layers=1)
    for m in (model, draft):
        rotormlx.apply(m, K8V8)
    prompt = ids("deepseek_v3", PROMPT)[0]
    want = [token for token, _ in generate_step(prompt, model, max_tokens=STEPS)]
    steps = speculative_generate_step(prompt, model, draft, num_draft_tokens=3, max_tokens=STEPS)
    assert [token for token, _, _ in steps] == want


def test_a_calibration_of_latents_is_refused():
    model = build("deepseek_v3")
    with pytest.raises(ValueError, match="deepseek_v3 keeps latents; leave the calibration out"):
        rotormlx.apply(model, RotorConfig(rotation="calibrated"))
    assert "make_cache" not in vars(model)
