"""Models with sliding windows and chunked attention, compressed, over several windows."""

import copy
import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

import rotormlx
from rotormlx.cli import usage
from rotormlx.config import RotorConfig
from rotormlx.mlx import integration, prompt_cache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.sliding import SlidingRotorKVCache
from rotormlx.mlx.host_caches import leaves
from rotormlx.mlx.hosts import MLX_LM
from tests.support import models as tiny

W = 512
# The attribute of mlx_lm is the function of that name.
generate = importlib.import_module("mlx_lm.generate")
K8V8 = RotorConfig(key_bits=8, value_bits=8)
ZOO = json.loads((Path(tiny.__file__).with_name("zoo.json")).read_text())


def of_512(model_type, **changes):
    """A model whose windows or chunks have 512 tokens."""
    if model_type == "llama4":
        text = tiny.CONFIGS["llama4"]["text_config"] | {"attention_chunk_size": W}
        return tiny.build("llama4", text_config=text)
    if model_type == "gemma3n":  # whose last layers read what the first of their kind hold
        return tiny.build(
            "gemma3n", text_config=ZOO["gemma3n"]["text_config"] | {"sliding_window": W}
        )
    return tiny.build(model_type, **{"sliding_window": W, **changes})


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setitem(tiny.CONFIGS, "gemma3n", {})
    yield
    MLX_LM.remove()


def classes(caches):
    return [type(cache).__name__ for _, _, cache in leaves(caches)]


def relative_error(got, want):
    return (mx.linalg.norm(got - want) / mx.linalg.norm(want)).item()


def read(model, inputs, caches, prompt, chunk):
    """The logits of a prompt in chunks and of single tokens, ``[1, S, V]``."""
    parts = [inputs[:, i : min(i + chunk, prompt)] for i in range(0, prompt, chunk)]
    parts += [inputs[:, i : i + 1] for i in range(prompt, inputs.shape[1])]
    logits = []
    for part in parts:
        logits.append(model(part, cache=caches).astype(mx.float32))
        mx.eval(logits[-1], [cache.state for cache in caches])  # as mlx-lm does
    return mx.concatenate(logits, axis=1)


# ---- apply --------------------------------------------------------------------------------------

MODELS = {
    "gemma3_text": ["SlidingRotorKVCache", "RotorKVCache"] * 2,
    "gpt_oss": ["SlidingRotorKVCache", "RotorKVCache"],
    "llama4": ["ChunkedRotorKVCache"] * 3 + ["RotorKVCache"],
    "gemma3n": ["SlidingRotorKVCache", "RotorKVCache"],
}


@pytest.mark.parametrize("chunk", [37, 700])
@pytest.mark.parametrize("model_type", MODELS)
def test_logits_over_three_windows_are_close_to_those_of_the_exact_caches(model_type, chunk):
    model = of_512(model_type)
    prompt, inputs = 3 * W + 170, tiny.tokens(3 * W + 200)
    want = read(model, inputs, make_prompt_cache(model), prompt, chunk)
    integration.apply(model, K8V8)
    caches = make_prompt_cache(model)
    assert classes(caches) == MODELS[model_type]
    got = read(model, inputs, caches, prompt, chunk)
    assert all(cache.packed_tokens for _, _, cache in leaves(caches))
    # 8 bits: 0.006 of a row, through two to four layers; in gemma3n also through a division.
    bound = 0.1 if model_type == "gemma3n" else 0.02
    for part in (slice(W), slice(W, 2 * W), slice(2 * W, prompt), slice(prompt, None)):
        assert 0 < relative_error(got[:, part], want[:, part]) < bound


def test_what_is_compressed_is_reported_and_can_be_turned_off():
    model = of_512("gemma3_text")
    plain = classes(make_prompt_cache(model))
    report = integration.apply(model, K8V8)
    assert [layer.is_window for layer in report.layers] == [True, False] * 2
    assert str(report.layers[0]) == (
        "layer 0: RotatingKVCache compressed, 2 KV heads, head_dim 32, 8.625 bits per value, "
        "window of 512 tokens"
    )
    assert "4 of 4 caches compressed" in report.summary
    off = integration.apply(model, K8V8, sliding_windows=False)
    assert "2 of 4 caches compressed" in off.summary
    assert off.layers[0].reason == "its window of 512 tokens stays exact (sliding_windows is off)"
    without = ["RotatingKVCache", "RotorKVCache"] * 2
    assert classes(make_prompt_cache(model)) == without
    # One conversation with the other setting, and one with the model's.
    made = rotormlx.make_prompt_cache(model, sliding_windows=True)
    assert classes(made) == MODELS["gemma3_text"]
    assert made[0].config == K8V8
    assert classes(rotormlx.make_prompt_cache(model)) == without
    assert classes(copy.deepcopy(model).make_cache()) == without
    integration.remove(model)
    assert classes(make_prompt_cache(model)) == plain


def test_windows_below_512_are_left_alone_for_a_reason():
    model = tiny.build("gemma3_text", sliding_window=511)
    report = integration.apply(model, K8V8)
    assert report.layers[0].reason == "its window of 511 tokens is below 512"
    assert classes(make_prompt_cache(model)) == ["RotatingKVCache", "RotorKVCache"] * 2


def test_a_window_with_first_tokens_kept_is_a_limit_and_left_alone():
    model = of_512("gemma3_text")
    model.make_cache = lambda: [RotatingKVCache(W, keep=4) for _ in model.layers]
    with pytest.raises(ValueError, match="it keeps no more than the last 512 tokens"):
        integration.apply(model, K8V8)


def test_a_model_that_has_windows_only_is_compressed():
    model = of_512("gemma3_text")
    model.make_cache = lambda: [RotatingKVCache(W) for _ in model.layers]
    assert all(layer.is_window for layer in integration.apply(model, K8V8).layers)


def test_windows_are_left_alone_where_only_they_go_another_way(monkeypatch):
    model = of_512("gemma3_text")

    def by_hand(self, x, mask=None, cache=None):
        cache.update_and_fetch(x[:, None, :, :32], x[:, None, :, :32])
        return x

    attention = type(model.layers[0].self_attn)
    other = type("OtherAttention", (attention,), {"__call__": by_hand})
    for layer in model.layers[::2]:
        layer.self_attn.__class__ = other
    report = integration.apply(model, K8V8)
    assert [layer.compressed for layer in report.layers] == [False, True] * 2


def test_a_limit_below_the_window_takes_its_place():
    model = of_512("gemma3_text")
    integration.apply(model, K8V8)
    caches = make_prompt_cache(model, 400)
    assert classes(caches) == ["RotorKVCache"] * 4
    assert {cache.max_size for cache in caches} == {400}
    assert classes(make_prompt_cache(model, 600)) == MODELS["gemma3_text"]


@pytest.mark.parametrize("tokens", [100, 300, 700, 1530])
@pytest.mark.parametrize("model_type", ["gemma3_text", "llama4"])
def test_the_report_foresees_the_bytes(model_type, tokens):
    model = of_512(model_type)
    report = integration.apply(model, RotorConfig())
    caches = make_prompt_cache(model)
    for start in range(0, tokens, 90):
        model(tiny.tokens(tokens)[:, start : start + 90], cache=caches)
    measured = usage.measure(report, caches)
    if model_type == "gemma3_text" or tokens <= W:
        assert measured.cache_bytes == report.compressed_bytes(tokens)
    else:  # foreseen is a full chunk
        assert measured.cache_bytes < report.compressed_bytes(tokens)


def test_what_is_calibrated_is_for_the_other_layers(tmp_path):
    model = of_512("gemma3_text")
    calibration = rotormlx.calibrate(model, tiny.Bytes(), text="abcdefgh " * 90, tokens=600)
    assert calibration.layers == [1, 3]
    report = integration.apply(model, calibration=calibration)
    caches = make_prompt_cache(model)
    assert classes(caches) == MODELS["gemma3_text"]
    assert [cache.config.is_calibrated for cache in caches] == [False, True] * 2
    read(model, tiny.tokens(1100), caches, 1100, 300)
    assert usage.measure(report, caches).cache_bytes == report.compressed_bytes(1100)


# ---- generation ---------------------------------------------------------------------------------


def test_batches_read_and_write_what_single_runs_do(tmp_path):
    model, tokenizer = mlx_lm.load(
        tiny.save(tmp_path / "gemma3", "gemma3_text", 5, sliding_window=W)
    )
    rotormlx.apply(model, K8V8)
    prompts = [tiny.tokens(n, seed=n)[0].tolist() for n in (30, 700, 1200)]
    response = mlx_lm.batch_generate(
        model, tokenizer, prompts, max_tokens=70, return_token_ids=True, return_prompt_caches=True
    )
    for prompt, ids, caches in zip(prompts, response.token_ids, response.caches, strict=True):
        alone = make_prompt_cache(model)
        want = [
            r.token
            for r in mlx_lm.stream_generate(
                model, tokenizer, prompt, max_tokens=70, prompt_cache=alone
            )
        ]
        assert ids == want
        assert classes(caches) == classes(alone) == MODELS["gemma3_text"]
        assert [c.offset for c in caches] == [len(prompt) + 70] * 4


def test_speculation_ends_where_a_chunk_does():
    model, draft = of_512("llama4"), tiny.build("llama")
    integration.apply(model, K8V8)
    integration.apply(draft, K8V8)
    options = {"num_draft_tokens": 2, "max_tokens": 5}
    step = generate.speculative_generate_step(tiny.tokens(W - 7)[0], model, draft, **options)
    assert next(step)
    with pytest.raises(ValueError, match=f"only for {W} more tokens"):
        generate.speculative_generate_step(tiny.tokens(W - 6)[0], model, draft, **options)


def test_speculation_goes_on_beyond_a_sliding_window():
    """Rejected tokens are in the exact tail, whatever the window has dropped."""
    model, draft = of_512("gemma3_text"), tiny.build("llama")
    integration.apply(model, K8V8)
    integration.apply(draft, K8V8)
    prompt = tiny.tokens(2 * W)[0]
    want = [int(token) for token, _ in generate.generate_step(prompt, model, max_tokens=12)]
    steps = generate.speculative_generate_step(
        prompt, model, draft, num_draft_tokens=3, max_tokens=12
    )
    assert [token for token, _, _ in steps] == want


# ---- files --------------------------------------------------------------------------------------


def saved(path, model, caches, count):
    for start in range(0, count, 300):
        model(tiny.tokens(count)[:, start : start + 300], cache=caches)
    prompt_cache.save_prompt_cache(str(path), model, caches)
    return str(path)


@pytest.mark.parametrize("turned_off", [False, True])
@pytest.mark.parametrize("model_type", ["gemma3_text", "llama4"])
def test_a_file_goes_on_as_it_was_written(tmp_path, model_type, turned_off):
    model = of_512(model_type)
    report = integration.apply(model, RotorConfig())
    caches = make_prompt_cache(model)
    path = saved(tmp_path / "cache.safetensors", model, caches, 1300)
    integration.apply(model, RotorConfig(), sliding_windows=not turned_off)
    loaded, _ = prompt_cache.load_prompt_cache(path, model)
    assert classes(loaded) == classes(caches) == MODELS[model_type]
    shown = prompt_cache.report_of(model, loaded)
    assert [layer.compressed for layer in shown.layers] == [True] * 4
    assert shown.compressed_bytes(1300) == report.compressed_bytes(1300)
    more = tiny.tokens(70, seed=2)
    assert mx.array_equal(model(more, cache=loaded), model(more, cache=caches))


@pytest.mark.parametrize(
    ("model_type", "count", "converted"),
    [("gemma3_text", 200, 4), ("gemma3_text", 1300, 2), ("llama4", 200, 4), ("llama4", 1300, 4)],
)
def test_a_plain_window_is_compressed_while_all_of_it_is_there(
    tmp_path, model_type, count, converted
):
    model = of_512(model_type)
    plain = make_prompt_cache(model)
    path = saved(tmp_path / "cache.safetensors", model, plain, count)
    integration.apply(model, K8V8)
    caches, _ = prompt_cache.read_prompt_cache(path, model)
    assert prompt_cache.adopt_prompt_cache(path, model, caches) == converted
    shown = prompt_cache.report_of(model, caches)
    assert sum(layer.compressed for layer in shown.layers) == converted
    more = tiny.tokens(600, seed=2)
    # As above; what was in the file is packed, a token of the plain cache saw it exact.
    error = relative_error(*(model(more, cache=c).astype(mx.float32) for c in (caches, plain)))
    assert 0 < error < 0.02


def test_a_window_of_another_size_is_refused(tmp_path):
    model, other = of_512("gemma3_text"), of_512("gemma3_text", sliding_window=600)
    integration.apply(model, K8V8)
    integration.apply(other, K8V8)
    with pytest.raises(ValueError, match=r"a window of 600 tokens in layer 0, but .* 512"):
        prompt_cache.adopt_prompt_cache("c", other, make_prompt_cache(model))


def test_a_limited_cache_below_the_window_is_taken_back(tmp_path):
    model = of_512("gemma3_text")
    integration.apply(model, K8V8)
    path = saved(tmp_path / "cache.safetensors", model, make_prompt_cache(model, 400), 600)
    loaded, _ = prompt_cache.load_prompt_cache(path, model)
    assert classes(loaded) == ["RotorKVCache"] * 4
    assert isinstance(loaded[0], RotorKVCache)
    assert not isinstance(loaded[0], SlidingRotorKVCache)
