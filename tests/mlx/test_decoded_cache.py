"""Decoded caches: the bytes of the others, served as the arrays that an exact cache would give."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from rich.console import Console

import rotormlx
from rotormlx.cli.report_tables import layer_table
from rotormlx.config import RotorConfig
from rotormlx.measure.schemes import scheme
from rotormlx.mlx import prompt_cache
from rotormlx.mlx.cache.decoded import BatchDecodedRotorKVCache, DecodedRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.hosts import MLX_LM
from tests.support import models as tiny

K, D, DV = 2, 64, 80
K8V8 = RotorConfig(8, 8, sink=3, window=5)
# A code of 8 bits is off by about 0.006 of a vector's size; a token in a wrong place by 1.4.
CLOSE = 0.02


@pytest.fixture(autouse=True)
def original_code():
    MLX_LM.remove()
    yield
    MLX_LM.remove()


def tokens(rows: int, count: int, seed: int = 0, dtype: mx.Dtype = mx.float32):
    keys = mx.random.normal((rows, K, count, D), key=mx.random.key(seed))
    values = mx.random.normal((rows, K, count, DV), key=mx.random.key(seed + 1000))
    return keys.astype(dtype), values.astype(dtype)


def fill(cache, keys, values, chunk: int = 70):
    for start in range(0, keys.shape[2], chunk):
        part = slice(start, start + chunk)
        served = cache.update_and_fetch(keys[:, :, part], values[:, :, part])
    return served


def largest_error(got: mx.array, want: mx.array) -> float:
    """Of a vector, relative to its size."""
    assert got.shape == want.shape
    error = mx.linalg.norm(got - want, axis=-1) / mx.linalg.norm(want, axis=-1)
    return mx.max(error).item()


# ---- one sequence -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_served_arrays_are_the_tokens_in_their_order(dtype):
    keys, values = tokens(1, 300, dtype=dtype)
    cache = DecodedRotorKVCache(K8V8, 2)
    last = fill(cache, keys, values)
    assert cache.packed_tokens == 256
    for got, again, want in zip(last, cache.keys_and_values(), (keys, values), strict=True):
        assert got.dtype == again.dtype == dtype
        assert largest_error(again.astype(mx.float32), want.astype(mx.float32)) < CLOSE
        # Sink and tail as they came; of the last chunk, what is packed now was exact then.
        for exact in (slice(0, 3), slice(259, 300)):
            assert mx.array_equal(again[:, :, exact], want[:, :, exact])
        assert mx.array_equal(got[:, :, 280:], want[:, :, 280:])
        assert not mx.array_equal(again[:, :, 3:259], want[:, :, 3:259])


def test_bytes_are_those_of_the_other_class():
    keys, values = tokens(1, 300)
    decoded, plain = DecodedRotorKVCache(K8V8, 2), RotorKVCache(K8V8, 2)
    fill(decoded, keys, values)
    fill(plain, keys, values)
    for a, b in zip(decoded.state, plain.state, strict=True):
        assert mx.array_equal(a, b) if isinstance(a, mx.array) else a == b
    assert decoded.nbytes == plain.nbytes


def test_after_a_trim_and_beyond_a_limit_the_tokens_held_are_served():
    keys, values = tokens(1, 300)
    cache = DecodedRotorKVCache(K8V8, 2)
    fill(cache, keys, values)
    cache.trim(100)
    assert cache.packed_tokens % 64
    assert largest_error(cache.keys_and_values()[1], values[:, :, :200]) < CLOSE
    limited = DecodedRotorKVCache(K8V8, 2, max_size=200)
    fill(limited, keys, values)
    assert limited.counts.evicted
    held = mx.array(limited.counts.positions(K8V8))
    assert largest_error(limited.keys_and_values()[0], keys[:, :, held]) < CLOSE


def test_only_one_layer_is_decoded_at_a_time():
    """Keys of a later layer depend on the earlier one, and decoding waits for them."""
    layers, count = 24, 4096
    keys, values = tokens(1, count, dtype=mx.float16)
    caches = [DecodedRotorKVCache(RotorConfig(4, 4), i) for i in range(layers)]
    for cache in caches:
        fill(cache, keys, values, count)
        mx.eval(cache.state)
    x = mx.ones((1, K, 1, D), mx.float16)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for cache in caches:
        k, v = cache.update_and_fetch(x, mx.ones((1, K, 1, DV), mx.float16))
        x = mx.softmax(x @ k.swapaxes(-1, -2), axis=-1) @ v[..., :D]
    mx.eval(x)
    # Float32 on the way to float16, and both of a layer: far below the float16 of all layers.
    a_layer = K * count * (D + DV) * 4
    assert mx.get_peak_memory() - before < 6 * a_layer < layers * a_layer / 2


# ---- several sequences --------------------------------------------------------------------------

LENGTHS = (200, 3, 131, 75)


def prefilled(batch, lengths=LENGTHS, chunk: int = 70):
    """What mlx-lm does with prompts of several lengths; the rows, and what came out last."""
    rows = [tokens(1, n, seed) for seed, n in enumerate(lengths)]
    longest = max(lengths)
    batch.prepare(lengths=list(lengths), right_padding=[longest - n for n in lengths])
    whole = [
        mx.concatenate([mx.pad(a, [(0, 0), (0, 0), (0, longest - a.shape[2]), (0, 0)]) for a in x])
        for x in zip(*rows, strict=True)
    ]
    fill(batch, *whole, chunk)
    batch.finalize()
    return rows


def batches():
    merged = DecodedRotorKVCache.merge([DecodedRotorKVCache(K8V8, 2) for _ in LENGTHS])
    assert type(merged) is BatchDecodedRotorKVCache
    return merged, BatchKVCache([0] * len(LENGTHS))


def visible(mask, arrays):
    """The arrays with zeros where no query may look: ``[B, K, S, D]``."""
    seen = mx.any(mask, axis=2)[..., None]
    return [mx.where(seen, a, mx.array(0.0)) for a in arrays]


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("window", [None, 50])
def test_rows_stand_where_mlx_lms_own_batch_has_them(length, window):
    own, exact = batches()
    for batch in (own, exact):
        prefilled(batch)
    new = tokens(len(LENGTHS), length, seed=50)
    assert own.offset.tolist() == exact.offset.tolist() == list(LENGTHS)
    masks = [batch.make_mask(length, window_size=window) for batch in (own, exact)]
    assert mx.array_equal(*masks)
    served = [batch.update_and_fetch(*new) for batch in (own, exact)]
    for got, want in zip(*(visible(masks[0], s) for s in served), strict=True):
        assert got.shape == want.shape
        assert mx.linalg.norm(got - want).item() < CLOSE * mx.linalg.norm(want).item()
    for got, want in zip(own.keys_and_values(), served[0], strict=True):
        assert got.shape == want.shape


def test_nothing_but_zeros_stands_before_a_row():
    """Weights of 0 times what is there must be 0."""
    own, _ = batches()
    prefilled(own)
    keys, values = own.update_and_fetch(*tokens(len(LENGTHS), 1))
    for row, count in enumerate(LENGTHS):
        assert not mx.any(keys[row, :, : 200 - count]).item()
        assert not mx.any(values[row, :, : 200 - count]).item()


def test_left_padding_of_all_rows_leaves_room_for_the_queries():
    left = [3, 5]
    own, exact = BatchDecodedRotorKVCache(left, K8V8), BatchKVCache(left)
    x = tokens(2, 7)
    for count in (4, 3):
        masks = [batch.make_mask(count) for batch in (own, exact)]
        served = [b.update_and_fetch(*(a[:, :, :count] for a in x)) for b in (own, exact)]
        columns = served[0][0].shape[2]
        assert columns >= count
        assert masks[0].shape == (2, 1, count, columns)
        assert own.keys_and_values()[0].shape[2] == columns
        assert mx.array_equal(masks[0], masks[1][..., -columns:])
        seen = [visible(m, arrays)[0] for m, arrays in zip(masks, served, strict=True)]
        assert mx.allclose(seen[0], seen[1][:, :, -columns:])


def test_rows_come_and_go_with_their_bytes():
    own, _ = batches()
    rows = prefilled(own)
    singles = [DecodedRotorKVCache(K8V8, 2) for _ in rows]
    for single, row in zip(singles, rows, strict=True):
        fill(single, *row)
    own.filter([2, 0])
    own.extend(DecodedRotorKVCache.merge([singles[3]]))
    for index, single in enumerate((singles[2], singles[0], singles[3])):
        row = own.extract(index)
        assert type(row) is DecodedRotorKVCache
        for a, b in zip(row.state, single.state, strict=True):
            assert mx.array_equal(a, b) if isinstance(a, mx.array) else a == b


# ---- models -------------------------------------------------------------------------------------


def greedy(model, prompt, count, **options):
    return [token for token, _ in generate_step(prompt, model, max_tokens=count, **options)]


def test_no_change_of_mlx_lm_is_needed():
    model = tiny.build("stablelm")
    caches = [DecodedRotorKVCache(K8V8, i) for i in range(len(model.layers))]
    inputs = tiny.tokens(200)
    want = tiny.logits(model, inputs, make_prompt_cache(model))
    got = tiny.logits(model, inputs, caches)
    assert not MLX_LM.installed()
    assert 0 < largest_error(got, want) < 0.05


def test_batch_generation_is_that_of_exact_caches():
    model = tiny.build("stablelm")
    prompts = [tiny.tokens(n, n)[0].tolist() for n in (200, 75, 140, 5)]

    def run():
        generator = BatchGenerator(model, max_tokens=40, prefill_step_size=64)
        uids = generator.insert(prompts)
        seen = {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for r in responses:
                seen[r.uid].append(r.token)
        generator.close()
        return [seen[uid] for uid in uids]

    want = run()
    assert len(set(map(tuple, want))) == len(prompts)
    rotormlx.apply(model, RotorConfig(8, 8))
    assert run() == want


@pytest.mark.parametrize("accepts", [True, False], ids=["good draft", "bad draft"])
def test_a_draft_model_changes_no_token(accepts):
    model, draft = tiny.build("stablelm"), tiny.build("stablelm", seed=0 if accepts else 1)
    for m in (model, draft):
        rotormlx.apply(m, RotorConfig(8, 8, window=0))
    prompt = tiny.tokens(200)[0]
    want = greedy(model, prompt, 60)
    caches = make_prompt_cache(model) + make_prompt_cache(draft)
    steps = speculative_generate_step(
        prompt, model, draft, num_draft_tokens=4, max_tokens=60, prompt_cache=caches
    )
    assert [token for token, _, _ in steps] == want
    assert all(cache.packed_tokens >= 192 for cache in caches)


def filled_model():
    model = tiny.build("stablelm")
    rotormlx.apply(model, K8V8)
    caches = make_prompt_cache(model)
    tiny.logits(model, tiny.tokens(150), caches)
    assert {type(cache) for cache in caches} == {DecodedRotorKVCache}
    return model, caches


def test_saved_caches_go_on_token_for_token(tmp_path):
    model, caches = filled_model()
    ours, theirs = str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs.safetensors")
    rotormlx.save_prompt_cache(ours, model, caches)
    save_prompt_cache(theirs, caches)
    prompt = tiny.tokens(5, seed=5)[0]
    want = greedy(model, prompt, 20, prompt_cache=copy.deepcopy(caches))
    for loaded in (
        rotormlx.load_prompt_cache(ours, model)[0],
        rotormlx.load_prompt_cache(theirs, model)[0],
        load_prompt_cache(ours),
    ):
        assert {type(cache) for cache in loaded} == {DecodedRotorKVCache}
        assert greedy(model, prompt, 20, prompt_cache=loaded) == want


def test_a_file_of_the_other_class_or_of_plain_caches_is_taken(tmp_path):
    model, caches = filled_model()
    path = str(tmp_path / "other.safetensors")
    prompt = tiny.tokens(5, seed=5)[0]
    want = greedy(model, prompt, 20, prompt_cache=copy.deepcopy(caches))
    save_prompt_cache(path, [RotorKVCache.of(cache) for cache in caches])
    loaded, _ = rotormlx.load_prompt_cache(path, model)
    assert {type(cache) for cache in loaded} == {DecodedRotorKVCache}
    assert greedy(model, prompt, 20, prompt_cache=loaded) == want
    plain = [KVCache() for _ in model.layers]
    tiny.logits(model, tiny.tokens(150), plain)
    assert prompt_cache.adopt_prompt_cache(path, model, plain) == len(plain)
    assert {type(cache) for cache in plain} == {DecodedRotorKVCache}
    assert [cache.packed_tokens for cache in plain] == [128] * len(plain)


def test_a_limit_is_kept():
    model = tiny.build("stablelm")
    rotormlx.apply(model, K8V8)
    caches = rotormlx.make_prompt_cache(model, max_kv_size=200)
    assert len(greedy(model, tiny.tokens(350)[0], 20, prompt_cache=caches)) == 20
    assert all(cache.counts.evicted and cache.size() <= 200 for cache in caches)
    assert np.isfinite(np.array(caches[0].keys_and_values()[0])).all()


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) % tiny.VOCABULARY for letter in text]


def test_a_calibration_is_refused_in_a_sentence():
    """Its queries never meet the attention that would listen."""
    model = tiny.build("stablelm")
    with pytest.raises(
        ValueError, match=r"^\[calibration\] .*layer 0 is decoded for .*, since the"
    ):
        rotormlx.calibrate(model, Letters(), tokens=200, text="a text " * 100)
    assert not MLX_LM.installed()


def test_measurements_read_decoded_caches():
    model = tiny.build("stablelm")
    caches = scheme("k8v8").caches(model)
    assert {type(cache) for cache in caches} == {DecodedRotorKVCache}
    exact = scheme("exact").caches(model)
    inputs = tiny.tokens(200)
    got, want = (tiny.logits(model, inputs, held) for held in (caches, exact))
    assert 0 < largest_error(got, want) < 0.05


def test_info_says_how_a_layer_is_read():
    report = rotormlx.apply(tiny.build("phi3small"))
    console = Console(width=300)
    with console.capture() as shown:
        console.print(layer_table(report))
    decoded, fused = (line for line in shown.get().splitlines() if "KVCache" in line)
    assert "decoded for the model's own attention, since the model computes with" in decoded
    assert "decoded" not in fused
