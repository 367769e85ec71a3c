"""BatchRotorKVCache: every row as if it ran by itself, while rows come and go."""

import copy
import importlib
import pickle
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

import rotormlx
from rotormlx.config import RotorConfig
from rotormlx.mlx import hook, hosts
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.cache.view import KVView
from rotormlx.storage import cache_file
from tests.support import models as tiny
from tests.support.mlx_lm_versions import since_0_32

K, H, D, DV = 2, 6, 64, 80
CONFIGS = {
    "cascade": RotorConfig(),
    "k3v2-rotor3": RotorConfig(key_bits=3, value_bits=2, rotation="rotor3"),
    "k2v3-w100": RotorConfig(key_bits=2, value_bits=3, window=100, sink=7, seed=5),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(autouse=True)
def clean():
    with hosts.MLX_LM.in_place():
        yield


def tokens(rows, count, seed=0, dtype=mx.float16):
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(rows, K, count, D)) + 3 * rng.normal(size=(rows, 1, 1, D))
    values = rng.normal(size=(rows, K, count, DV))
    return mx.array(keys.astype(np.float32)).astype(dtype), mx.array(
        values.astype(np.float32)
    ).astype(dtype)


def single(config, keys, values, max_size=None):
    cache = RotorKVCache(config, 3, max_size)
    for start in range(0, keys.shape[2], 500):
        cache.update_and_fetch(keys[:, :, start : start + 500], values[:, :, start : start + 500])
    return cache


def comparable(entry):
    return np.array(entry.astype(mx.float32)) if isinstance(entry, mx.array) else np.array(entry)


def assert_same(a, b):
    assert len(a.state) == len(b.state)
    for x, y in zip(a.state, b.state, strict=True):
        assert np.array_equal(comparable(x), comparable(y))


def padded(rows, length, junk=float("nan")):
    """Rows ``[1, K, n, D]`` as one array, filled up on the right with what must not be seen."""
    parts = [
        mx.concatenate(
            [r, mx.full((1, K, length - r.shape[2], r.shape[3]), junk, dtype=r.dtype)], axis=2
        )
        for r in rows
    ]
    return mx.concatenate(parts)


def prefill(batch, rows, chunk=170, junk=float("nan")):
    """What mlx-lm does with prompts of several lengths; rows are pairs ``[1, K, n, D]``."""
    lengths = [keys.shape[2] for keys, _ in rows]
    longest = max(lengths)
    batch.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    keys, values = (padded(column, longest, junk) for column in zip(*rows, strict=True))
    for start in range(0, longest, chunk):
        part = slice(start, start + chunk)
        batch.update_and_fetch(keys[:, :, part], values[:, :, part])
    batch.finalize()


LENGTHS = (450, 3, 198, 132, 700)


def make_rows(lengths=LENGTHS, seed=0):
    return [tokens(1, n, seed + i) for i, n in enumerate(lengths)]


def filled(config, lengths=LENGTHS, max_size=None, seed=0):
    rows = make_rows(lengths, seed)
    batch = RotorKVCache.merge([RotorKVCache(config, 3, max_size) for _ in rows])
    prefill(batch, rows)
    return batch, [single(config, *row, max_size) for row in rows]


def assert_rows(batch, singles):
    """Every row is, byte for byte, what a cache by itself holds."""
    assert len(batch.rows) == len(singles)
    for index, expected in enumerate(singles):
        assert_same(batch.extract(index), expected)
    assert batch.offset.tolist() == [cache.offset for cache in singles]


def step(batch, singles, count=1, seed=9):
    """The same new tokens to the batch and to the caches by themselves; returns both attentions."""
    keys, values = tokens(len(singles), count, seed)
    q = mx.random.normal((len(singles), H, count, D), key=mx.random.key(seed))
    mask = batch.make_mask(count)
    views = batch.update_and_fetch(keys, values)
    together = attend_view(q, *views, scale=D**-0.5, mask=mask)
    alone = []
    for i, cache in enumerate(singles):
        part = slice(i, i + 1)
        own = cache.make_mask(count)
        own_views = cache.update_and_fetch(keys[part], values[part])
        alone.append(attend_view(q[part], *own_views, scale=D**-0.5, mask=own))
    return np.array(together), np.array(mx.concatenate(alone))


# Both walk the same tokens; where rows are read together, sums may come in another order.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


# ---- rows are as if alone -----------------------------------------------------------------------


def test_prefill_of_several_lengths_gives_the_bytes_of_single_runs(config):
    assert_rows(*filled(config))


@pytest.mark.parametrize("max_size", [None, 420], ids=["unlimited", "limited"])
def test_decode_gives_bytes_and_attention_of_single_runs(config, max_size):
    """Over more than a block, so that each row packs, at its own step."""
    batch, singles = filled(config, max_size=max_size)
    for n in range(70):
        together, alone = step(batch, singles, seed=n)
        assert np.allclose(together, alone, **TOLERANCE), n
    assert_rows(batch, singles)
    assert bool(max_size) == any(cache.counts.evicted for cache in singles)


def test_a_chunk_of_queries_sees_what_it_would_alone(config):
    batch, singles = filled(config)
    together, alone = step(batch, singles, count=17)
    assert np.allclose(together, alone, **TOLERANCE)


def test_right_padding_is_never_seen():
    """Junk behind a short row changes neither what its own queries see nor what is kept."""
    rows = make_rows((90, 3, 250))
    outputs = []
    for junk in (0.0, 1e4):
        batch = BatchRotorKVCache([0, 0, 0], RotorConfig(), 3)
        prefill(batch, rows, 100, junk)
        views = batch.keys_and_values()
        q = mx.ones((3, H, 1, D))
        outputs.append(np.array(attend_view(q, *views, scale=0.1)))
    assert np.array_equal(*outputs)


def test_left_padding_never_enters(config):
    rows = make_rows((300, 7, 140))
    keys, values = (
        mx.concatenate(
            [
                mx.concatenate(
                    [mx.full((1, K, 300 - r.shape[2], r.shape[3]), 99.0, r.dtype), r], axis=2
                )
                for r in column
            ]
        )
        for column in zip(*rows, strict=True)
    )
    batch = BatchRotorKVCache([0, 0, 0], config, 3)
    batch.prepare(left_padding=[0, 293, 160])
    assert batch.offset.tolist() == [0, -293, -160]
    for start in range(0, 300, 77):
        part = slice(start, start + 77)
        mask = batch.make_mask(min(77, 300 - start))
        views = batch.update_and_fetch(keys[:, :, part], values[:, :, part])
        q = mx.ones((3, H, min(77, 300 - start), D))
        assert mx.all(mx.isfinite(attend_view(q, *views, scale=0.1, mask=mask)))
    singles = [single(config, *row) for row in rows]
    assert_rows(batch, singles)
    together, alone = step(batch, singles)
    assert np.allclose(together, alone, **TOLERANCE)
    with pytest.raises(ValueError, match="Left padding requires an empty cache"):
        batch.prepare(left_padding=[1, 0, 0])


def test_keys_and_values_after_a_padded_chunk_are_those_of_the_step():
    """Layers that share keys ask again, with the padding still in the queries."""
    rows = make_rows((90, 30))
    batch = BatchRotorKVCache([0, 0], RotorConfig(), 3)
    batch.prepare(lengths=[90, 30], right_padding=[0, 60])
    keys, values = (padded(column, 90, 5.0) for column in zip(*rows, strict=True))
    q = mx.random.normal((2, H, 90, D), key=mx.random.key(0))
    first = attend_view(q, *batch.update_and_fetch(keys, values), scale=0.1, mask="causal")
    again = attend_view(q, *batch.keys_and_values(), scale=0.1, mask="causal")
    # Nothing is packed yet, so both read the same exact tokens.
    assert mx.array_equal(first, again)
    assert batch.offset.tolist() == [90, 90]
    batch.finalize()
    assert batch.offset.tolist() == [90, 30]


# ---- rows come and go ---------------------------------------------------------------------------


def test_merge_extend_filter_and_extract_keep_rows_as_they_are(config):
    batch, singles = filled(config)
    other, more = filled(config, (260, 90), seed=50)
    batch.extend(other)
    singles += more
    assert_rows(batch, singles)
    for n in range(40):
        step(batch, singles, seed=n)
    keep = [5, 0, 3]
    batch.filter(keep)
    singles = [singles[i] for i in keep]
    assert_rows(batch, singles)
    for n in range(40):
        together, alone = step(batch, singles, seed=100 + n)
        assert np.allclose(together, alone, **TOLERANCE)
    assert_rows(batch, singles)
    again = RotorKVCache.merge([batch.extract(i) for i in range(3)])
    assert_rows(again, singles)
    together, alone = step(again, singles)
    assert np.allclose(together, alone, **TOLERANCE)


def test_limited_rows_of_different_turns_merge():
    """Rings stand at different places; rows keep theirs."""
    config = RotorConfig()
    batch, singles = filled(config, (900, 250, 500, 1200), max_size=330)
    assert [cache.counts.evicted for cache in singles] == [640, 0, 192, 896]
    assert all(cache.size() <= 330 for cache in singles)
    batch = RotorKVCache.merge([batch.extract(i) for i in (2, 0, 1)])
    singles = [singles[i] for i in (2, 0, 1)]
    for n in range(70):
        together, alone = step(batch, singles, seed=n)
        assert np.allclose(together, alone, **TOLERANCE)
    assert_rows(batch, singles)


@pytest.mark.parametrize("empty_first", [True, False])
def test_empty_rows_merge_and_extend(config, empty_first):
    full = single(config, *tokens(1, 300))
    caches = [RotorKVCache(config, 3), full]
    caches = caches if empty_first else caches[::-1]
    merged = RotorKVCache.merge(caches)
    extended = RotorKVCache.merge(caches[:1])
    extended.extend(RotorKVCache.merge(caches[1:]))
    for batch in (merged, extended):
        assert_rows(batch, caches)
        singles = copy.deepcopy(caches)
        together, alone = step(batch, singles)
        assert np.allclose(together, alone, **TOLERANCE)
        assert_rows(batch, singles)


def test_an_all_empty_batch_is_empty():
    batch = RotorKVCache.merge([RotorKVCache(), RotorKVCache()])
    assert batch.empty()
    assert (batch.size(), batch.nbytes, batch.offset.tolist()) == (0, 0, [0, 0])
    batch.extend(RotorKVCache.merge([RotorKVCache()]))
    batch.filter([0, 2])
    assert len(batch.rows) == 2
    assert batch.extract(1).empty()


def test_extracted_and_copied_rows_are_independent():
    batch, singles = filled(RotorConfig())
    twin, row = copy.deepcopy(batch), batch.extract(0)
    step(batch, copy.deepcopy(singles), count=100)
    batch.filter([1])
    assert_rows(twin, singles)
    assert_same(row, singles[0])


@pytest.mark.parametrize("n", [1, 60, 190, 10**4])
def test_trim_is_that_of_single_runs(config, n):
    """Into the packed part too: the block is filled up again with its own centre."""
    batch, singles = filled(config)
    assert batch.trim(n) == max(cache.trim(n) for cache in singles)
    for i in range(3):
        together, alone = step(batch, singles, count=100, seed=i)
        assert np.allclose(together, alone, **TOLERANCE)
    assert_rows(batch, singles)


def test_a_view_does_not_change_later():
    batch, _ = filled(RotorConfig())
    views = batch.keys_and_values()
    q = mx.ones((5, H, 1, D))
    later = attend_view(q, *views, scale=0.1)
    now = np.array(attend_view(q, *copy.deepcopy(views), scale=0.1))
    batch.trim(70)
    for n in range(2):
        batch.update_and_fetch(*tokens(5, 80, seed=n))
    assert np.array_equal(now, np.array(attend_view(q, *views, scale=0.1)))
    assert np.array_equal(now, np.array(later))


def test_rows_of_another_configuration_or_layer_are_refused():
    batch, _ = filled(RotorConfig(), (200, 70))
    for other, says in (
        (RotorKVCache(RotorConfig(3), 3), "share their key_bits, but it is 4 in one and 3 in"),
        (RotorKVCache(RotorConfig(), 4), "share their layer, but it is 3 in one and 4 in another"),
        (
            RotorKVCache(RotorConfig(), 3, 400),
            "share their max_kv_size, but it is None in one and 400",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            RotorKVCache.merge([batch.extract(0), other])
        with pytest.raises(ValueError, match=says):
            batch.extend(RotorKVCache.merge([other]))
    same = RotorKVCache(RotorConfig(channel_scale="prefill"), 3)
    RotorKVCache.merge([batch.extract(0), same])
    strange = RotorKVCache(RotorConfig(), 3)
    strange.update_and_fetch(mx.zeros((1, 3, 5, D)), mx.zeros((1, 3, 5, DV)))
    with pytest.raises(ValueError, match="must have 2 KV heads and head_dim"):
        batch.extend(RotorKVCache.merge([strange]))
    with pytest.raises(ValueError, match="This cache has 2 rows"):
        RotorKVCache.merge([RotorKVCache()] * 2).update_and_fetch(*tokens(3, 1))


# ---- mlx-lm's contract --------------------------------------------------------------------------


def test_contract_has_every_member_of_mlx_lms_batch():
    own = {name for name in vars(BatchKVCache) if not name.startswith("_")} - {"step"}
    assert {name for name in own if not hasattr(BatchRotorKVCache, name)} == set()
    assert not hasattr(BatchRotorKVCache([0]), "bits"), "mlx-lm's attention dispatches on it"


@pytest.mark.parametrize("window_size", [None, 20, 1000])
@pytest.mark.parametrize("length", [1, 9])
def test_masks_of_rows_are_those_of_their_own_caches(window_size, length):
    batch, singles = filled(RotorConfig())
    masks = batch.make_mask(length, window_size, return_array=True)
    longest = max(c.offset for c in singles) + length
    assert masks.shape == (5, 1, length, longest)
    for mask, cache in zip(masks, singles, strict=True):
        held = cache.offset + length
        expected = create_causal_mask(length, cache.offset, window_size=window_size)
        assert mx.array_equal(mask[0, :, :held], expected)
        assert not mx.any(mask[0, :, held:])


def test_masks_of_limited_rows_follow_positions():
    """A window over a ring: the visible tokens are the latest, wherever they lie."""
    cache = single(RotorConfig(), *tokens(1, 900), max_size=420)
    assert cache.counts.evicted
    for window in (30, 150, 10**4):
        mask = cache.make_mask(3, window)
        assert mask.shape == (3, cache.size() + 3)
        held = cache.counts.positions(cache.config)
        assert sorted(held) == [*range(4), *range(4 + cache.counts.evicted, 900)]
        for i in range(3):
            seen = set(held[np.array(mask[i, :-3])])
            want = {p for p in held if p > 900 + i - window}
            assert seen == want


def test_rows_that_are_alike_are_read_together():
    """Then the view has no lengths by row, and a backend reads all rows at once."""
    batch, _ = filled(RotorConfig(), (200, 200))
    assert batch.keys_and_values()[0].rows is None
    ragged, _ = filled(RotorConfig(), (200, 201))
    assert ragged.keys_and_values()[0].rows == ((128, 200), (128, 201))


def test_sinks_and_array_masks_reach_every_row():
    batch, singles = filled(RotorConfig())
    q = mx.random.normal((5, H, 2, D), key=mx.random.key(1))
    sink_logits = mx.random.normal((H,), key=mx.random.key(2))
    additive = mx.random.normal((5, 1, 2, 700), key=mx.random.key(3))
    together = attend_view(
        q, *batch.keys_and_values(), scale=0.1, mask=additive, sink_logits=sink_logits
    )
    for i, cache in enumerate(singles):
        own = additive[i : i + 1, :, :, : cache.offset]
        if cache.offset < 2:
            continue
        alone = attend_view(
            q[i : i + 1], *cache.keys_and_values(), scale=0.1, mask=own, sink_logits=sink_logits
        )
        assert mx.allclose(together[i : i + 1], alone, **TOLERANCE)
        without = attend_view(q[i : i + 1], *cache.keys_and_values(), scale=0.1, mask=own)
        assert not mx.allclose(without, alone, atol=1e-3)


def test_saved_batch_continues_bit_for_bit(config, tmp_path):
    batch, singles = filled(config, max_size=420)
    empty = RotorKVCache.merge([RotorKVCache(config, 4)] * 2)
    save_prompt_cache(str(tmp_path / "batch.safetensors"), [batch, empty])
    loaded, loaded_empty = load_prompt_cache(str(tmp_path / "batch.safetensors"))
    assert type(loaded) is BatchRotorKVCache
    assert (len(loaded_empty.rows), loaded_empty.layer) == (2, 4)
    assert_rows(loaded, singles)
    together, alone = step(loaded, singles, count=100)
    assert np.allclose(together, alone, **TOLERANCE)
    assert_rows(loaded, singles)


# ---- generation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return mlx_lm.load(tiny.save(tmp_path_factory.mktemp("models") / "llama"))


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 255, n).tolist() for n in lengths]


def generate_alone(model, tokenizer, prompt, count):
    cache = rotormlx.make_prompt_cache(model)
    out = [
        r.token
        for r in mlx_lm.stream_generate(
            model, tokenizer, prompt, max_tokens=count, prompt_cache=cache
        )
    ]
    return out, cache


# The packed bytes are the same. But tokens of a chunk are read exact within it, and padding moves
# the chunks of a batch: at 8 bits no token may change by that; at 4 bits a prompt is one chunk.
@pytest.mark.slow
@pytest.mark.parametrize(("bits", "chunk", "least_share"), [(8, 64, 1.0), (4, 512, 0.95)])
def test_batch_of_eight_prompts_is_eight_single_runs(llama, bits, chunk, least_share, figure):
    """Greedy, prompts of 3 to 400 tokens, over more than a block of new tokens."""
    model, tokenizer = llama
    rotormlx.apply(model, RotorConfig(bits, bits))
    given = prompts((3, 400, 70, 131, 132, 200, 17, 333))
    counts = [90, 20, 90, 70, 90, 5, 90, 40]
    response = mlx_lm.batch_generate(
        model,
        tokenizer,
        given,
        max_tokens=counts,
        return_token_ids=True,
        return_prompt_caches=True,
        prefill_step_size=chunk,
        prefill_batch_size=3,
        completion_batch_size=5,
    )
    equal = 0
    for prompt, count, ids, caches in zip(
        given, counts, response.token_ids, response.caches, strict=True
    ):
        alone, _ = generate_alone(model, tokenizer, prompt, count)
        assert len(ids) == count
        equal += sum(a == b for a, b in zip(ids, alone, strict=True))
        assert {type(cache) for cache in caches} == {RotorKVCache}
        expected = len(prompt) + count
        assert all(cache.offset == expected for cache in caches)
        want = max(0, (expected - 4 - 64) // 64 * 64)
        assert all(cache.packed_tokens == want for cache in caches)
    figure(f"batch of 8 against single runs, K{bits}V{bits}: {equal} of {sum(counts)} tokens equal")
    assert equal >= least_share * sum(counts)
    rotormlx.remove(model)


def test_rows_removed_and_inserted_while_others_run(llama):
    """As a server does: the others go on as if nothing happened, and read packed bytes."""
    model, tokenizer = llama
    rotormlx.apply(model, RotorConfig(8, 8))
    a, b, c = prompts((210, 150, 300), seed=3)
    generator = BatchGenerator(model, max_tokens=60, prefill_step_size=64)
    seen = {}
    (first, second) = generator.insert([a, b])
    inserted = None
    with hook.record_attention() as attended:
        for n in range(400):
            _, responses = generator.next()
            for r in responses:
                seen.setdefault(r.uid, []).append(r.token)
            if n == 20:
                removed = generator.remove([second], return_prompt_caches=True)
            if n == 25:
                (inserted,) = generator.insert([c])
            if inserted is not None and len(seen.get(inserted, [])) == 60:
                break
    generator.close()
    assert seen[first] == generate_alone(model, tokenizer, a, 60)[0]
    assert seen[inserted] == generate_alone(model, tokenizer, c, 60)[0]
    assert seen[second] == generate_alone(model, tokenizer, b, 60)[0][: len(seen[second])]
    assert 0 < len(seen[second]) < 60
    (cache, tokens_so_far) = removed[second]
    # The row goes on by itself from where it was taken out.
    assert cache[0].offset == len(tokens_so_far)
    assert any(isinstance(k, KVView) and k.rows and k.packed_tokens for _, k, _ in attended)
    rotormlx.remove(model)


@since_0_32("does not return the tokens")
def test_prompt_caches_go_into_a_batch_and_are_left_alone(llama):
    model, tokenizer = llama
    rotormlx.apply(model, RotorConfig(8, 8))
    before, after = prompts((300, 120), seed=5), prompts((20, 9), seed=6)
    caches = [generate_alone(model, tokenizer, p, 1)[1] for p in before]
    for cache, p in zip(caches, before, strict=True):
        for layer in cache:
            layer.trim(layer.offset - len(p))
    copies = copy.deepcopy(caches)
    response = mlx_lm.batch_generate(
        model, tokenizer, after, prompt_caches=caches, max_tokens=30, return_token_ids=True
    )
    for cache, own, prompt, ids in zip(caches, copies, after, response.token_ids, strict=True):
        assert_same(cache[0], own[0])
        alone = [
            r.token
            for r in mlx_lm.stream_generate(
                model, tokenizer, prompt, max_tokens=30, prompt_cache=own
            )
        ]
        assert ids == alone
    rotormlx.remove(model)


@pytest.mark.parametrize("model_type", ["gemma3_text", "falcon_h1", "gpt_oss"])
def test_hybrid_models_batch(model_type):
    """Sliding windows and states stay mlx-lm's own; K8V8 gives the tokens of the float cache."""
    generate = importlib.import_module("mlx_lm.generate")
    model = tiny.build(model_type)
    given = prompts((200, 75, 140))

    def run():
        generator = BatchGenerator(model, max_tokens=12, prefill_step_size=64)
        uids = generator.insert(given)
        seen = {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for r in responses:
                seen[r.uid].append(r.token)
        kinds = {type(c) for c in generate._merge_caches([make_prompt_cache(model)])}
        generator.close()
        return [seen[uid] for uid in uids], kinds

    want, kinds = run()
    assert BatchRotorKVCache not in kinds
    rotormlx.apply(model, RotorConfig(8, 8))
    assert run()[0] == want
    rotormlx.remove(model)


def test_plain_caches_are_left_to_mlx_lm():
    assert type(KVCache.merge([KVCache()])) is BatchKVCache


# ---- what is made of what ------------------------------------------------------------------------

# A program of its own, so that nothing else was imported; it ends with a list of single caches.
MERGED = {
    "only-single": "from rotormlx.mlx.cache.single import RotorKVCache as C; caches = [C(), C()]",
    "public": "import rotormlx; caches = [rotormlx.RotorKVCache()] * 2",
    "copied": "import copy, rotormlx; caches = copy.deepcopy([rotormlx.RotorKVCache()] * 2)",
    "unpickled": "import pickle; caches = pickle.loads(bytes.fromhex({pickled!r}))",
    "subclass": "from rotormlx import RotorKVCache as R; caches = [type('C', (R,), {{}})()] * 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGED)
def test_single_caches_can_be_merged_however_they_came(name):
    made = MERGED[name].format(pickled=pickle.dumps([RotorKVCache(), RotorKVCache()]).hex())
    code = f"{made}\nbatch = type(caches[0]).merge(caches)\n"
    code += "print(type(batch).__name__, len(batch.rows), type(batch.extract(1)).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["BatchRotorKVCache", "2", "RotorKVCache"], done.stderr


def test_a_batch_that_was_cut_to_its_tails_is_saved_and_goes_on(config, tmp_path):
    """Nothing packed is left, so a channel scale of its first block is not saved either."""
    batch = BatchRotorKVCache.merge([single(config, *tokens(1, n, n)) for n in (300, 250)])
    batch.trim(297)
    assert [(row.counts.tokens, row.counts.packed) for row in batch.rows] == [(3, 0), (0, 0)]
    path = str(tmp_path / "batch.safetensors")
    save_prompt_cache(path, [batch])
    with cache_file.opened(path) as saved:
        assert [shape.dims for _, shape in saved.shapes] == [(K, D, DV)]
    loaded = BatchRotorKVCache.from_state(batch.state)
    for cache in (batch, loaded):
        cache.update_and_fetch(*tokens(2, 300, 9))
    assert_same(batch.extract(1), loaded.extract(1))


BATCH_FAULTS = {
    "version": (0, 1, "reads format version 2, but the saved cache has version 1"),
    "limit": (3, 1, "a limit with room for a block"),
    "counts": (4, mx.array([[300, 192, 64], [250, 128, 0]]), "counts that add up"),
    "counts-shape": (4, mx.zeros((2, 2), mx.int32), "three counts per row"),
    "rows": (4, mx.array([[300, 192, 0]]), "exact keys of dtype and shape"),
    "words": (6, None, "key words of dtype and shape"),
    "values": (10, mx.zeros((1, K, 122, DV)), "exact values of dtype and shape"),
}


@pytest.mark.parametrize("fault", BATCH_FAULTS)
def test_damaged_state_of_a_batch_is_refused(fault):
    entry, value, message = BATCH_FAULTS[fault]
    batch = BatchRotorKVCache.merge([single(RotorConfig(), *tokens(1, n)) for n in (300, 250)])
    state = list(batch.state)
    BatchRotorKVCache.from_state(state)
    state[entry] = value
    with pytest.raises(ValueError, match=rf"^\[BatchRotorKVCache\] .*{message}"):
        BatchRotorKVCache.from_state(state)
    with pytest.raises(ValueError, match="must hold 5 or 15 entries, but it holds 14"):
        BatchRotorKVCache.from_state(state[:-1])
