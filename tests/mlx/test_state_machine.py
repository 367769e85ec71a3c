"""Caches under random sequences of operations, against a plain list of exact vectors.

The model of a sequence is that of tests/support/sequences.py. After every step, each cache that
the step touched, and each that shares buffers with it by descent, must hold just that:

- counts and positions are the model's;
- sink and tail are its vectors, bit for bit;
- every packed row has the codes that the float64 reference gives its vector with the centre of its
  block, and every block that was never cut and filled up again has its own mean as its centre;
- attention over the cache is attention over those decoded and exact vectors;
- bytes are those of the format plus the room for growth.

With ROTORMLX_EXAMPLES=n there are n times as many sequences, chosen at random.
"""

import copy
import itertools
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from rotormlx.codec.format import BLOCK, ROLES, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.mlx import hosts
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.cache.batch import BatchRotorKVCache
from rotormlx.mlx.cache.single import RotorKVCache
from tests.support.bounds import examples
from tests.support.sequences import (
    DIMS,
    LONGEST,
    Held,
    K,
    Sequence,
    check_attention,
    check_held,
    queries,
)

SEQUENCES = 40  # alive at once


class Seen:
    """The views that a cache hands out now: what comes later must not show in them."""

    def __init__(self, cache):
        self.arrays = []
        for view in () if cache.empty() else cache.keys_and_values():
            self.arrays += [view.exact, *(a for a in view.packed or () if a is not None)]
        self.content = [np.array(a.view(mx.uint8)) for a in self.arrays]

    def check(self):
        for array, content in zip(self.arrays, self.content, strict=True):
            assert np.array_equal(np.array(array.view(mx.uint8)), content)


class Caches(RuleBasedStateMachine):
    """Single caches and batches that come from each other."""

    singles, batches = Bundle("singles"), Bundle("batches")
    steps = states = 0

    @initialize(
        bits=st.sampled_from([(4, 4), (3, 8), (8, 2), (2, 3)]),
        rotation=st.sampled_from(["cascade", "rotor3"]),
        sink=st.sampled_from([0, 4]),
        window=st.sampled_from([0, 0, 16, 64]),
        ring=st.sampled_from([None, None, 1, 3]),
        dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    )
    def setup(self, bits, rotation, sink, window, ring, dtype):
        self.config = RotorConfig(*bits, rotation, sink=sink, window=window)
        self.max_size = ring and sink + window + 63 + ring * BLOCK
        self.ring = ring
        self.dtype = getattr(mx, dtype)
        self.seeds = itertools.count()
        self.alive = []
        hosts.MLX_LM.install()

    def teardown(self):
        for cache, rows in getattr(self, "alive", ()):
            self.check(cache, rows)
        hosts.MLX_LM.remove()

    # ---- vectors --------------------------------------------------------------------------------

    def rows(self, batch, tokens):
        """Keys and values of the cache's dtype, and the same as float32."""
        rng = np.random.default_rng(next(self.seeds))
        made = [
            mx.array((rng.normal(size=(batch, K, tokens, d)) + 2).astype(np.float32)).astype(
                self.dtype
            )
            for d in DIMS
        ]
        return made, [np.array(a.astype(mx.float32)) for a in made]

    def added(self, cache, rows):
        type(self).states += 1
        self.check(cache, rows)
        self.alive.append((cache, rows))
        return cache, rows

    def touched(self, cache, rows):
        type(self).steps += 1
        self.check(cache, rows)
        # Whoever came from the same buffers must not have noticed.
        for other, its_rows in self.alive[-4:]:
            self.check(other, its_rows)

    # ---- single caches --------------------------------------------------------------------------

    @rule(target=singles)
    def new(self):
        return self.added(
            RotorKVCache(self.config, 3, self.max_size), [Sequence(self.config, self.ring)]
        )

    @rule(held=singles, tokens=st.integers(1, 150))
    def append(self, held, tokens):
        cache, rows = held
        if rows[0].tokens + tokens > LONGEST:
            tokens = 1
        new, vectors = self.rows(1, tokens)
        before = rows[0].tokens
        seen = Seen(cache)
        keys, values = cache.update_and_fetch(*new)
        seen.check()
        # In the view the new tokens are still exact.
        assert keys.tokens == values.tokens == before + tokens
        rows[0].append([v[0] for v in vectors])
        self.touched(cache, rows)

    @rule(held=singles, n=st.one_of(st.integers(0, 80), st.integers(0, LONGEST)))
    def trim(self, held, n):
        cache, rows = held
        assert cache.trim(n) == rows[0].trim(n)
        self.touched(cache, rows)

    @precondition(lambda self: len(self.alive) < SEQUENCES)
    @rule(target=singles, held=singles)
    def copied(self, held):
        cache, rows = held
        return self.added(copy.deepcopy(cache), [r.copy() for r in rows])

    @precondition(lambda self: len(self.alive) < SEQUENCES)
    @rule(target=singles, held=singles, by_file=st.booleans())
    def saved_and_loaded(self, held, by_file):
        cache, rows = held
        if by_file:
            with tempfile.TemporaryDirectory() as directory:
                path = str(Path(directory) / "cache.safetensors")
                save_prompt_cache(path, [cache])
                (loaded,) = load_prompt_cache(path)
                mx.eval(loaded.state)
        else:
            loaded = RotorKVCache.from_state(cache.state)
        return self.added(loaded, [r.copy() for r in rows])

    # ---- batches --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.alive) < SEQUENCES)
    @rule(target=batches, held=st.lists(singles, min_size=2, max_size=4))
    def merged(self, held):
        rows = [r.copy() for _, rs in held for r in rs]
        return self.added(RotorKVCache.merge([cache for cache, _ in held]), rows)

    @precondition(lambda self: len(self.alive) < SEQUENCES)
    @rule(
        target=batches,
        left=st.lists(st.integers(0, 30), min_size=1, max_size=3),
        tokens=st.integers(30, 120),
    )
    def new_batch(self, left, tokens):
        cache = BatchRotorKVCache(left, self.config, 3, self.max_size)
        rows = [Sequence(self.config, self.ring) for _ in left]
        new, vectors = self.rows(len(left), tokens)
        cache.update_and_fetch(*new)
        for b, (row, n) in enumerate(zip(rows, left, strict=True)):
            row.append([v[b, :, n:] for v in vectors])
        return self.added(cache, rows)

    @rule(held=batches, tokens=st.integers(1, 120), data=st.data())
    def append_to_batch(self, held, tokens, data):
        cache, rows = held
        if not rows:
            return
        if max(r.tokens for r in rows) + tokens > LONGEST:
            tokens = 1
        real = (
            [data.draw(st.integers(1, tokens)) for _ in rows]
            if data.draw(st.booleans())
            else [tokens] * len(rows)
        )
        cache.prepare(lengths=real, right_padding=[tokens - n for n in real])
        new, vectors = self.rows(len(rows), tokens)
        seen = Seen(cache)
        cache.update_and_fetch(*new)
        seen.check()
        cache.finalize()
        for b, (row, n) in enumerate(zip(rows, real, strict=True)):
            row.append([v[b, :, :n] for v in vectors])
        self.touched(cache, rows)

    @rule(held=batches, n=st.integers(0, 150))
    def trim_batch(self, held, n):
        cache, rows = held
        if not rows or cache.empty():
            return
        assert cache.trim(n) == max(row.trim(n) for row in rows)
        self.touched(cache, rows)

    @rule(held=batches, data=st.data())
    def filtered(self, held, data):
        cache, rows = held
        if not rows:
            return
        kept = data.draw(
            st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=len(rows), unique=True)
        )
        cache.filter(kept)
        rows[:] = [rows[i] for i in kept]
        self.touched(cache, rows)

    @rule(held=batches, other=batches)
    def extended(self, held, other):
        (cache, rows), (more, others) = held, other
        if cache is more or len(rows) + len(others) > 4:
            return
        cache.extend(more)
        rows += [r.copy() for r in others]
        self.touched(cache, rows)
        self.check(more, others)

    @precondition(lambda self: len(self.alive) < SEQUENCES)
    @rule(target=singles, held=batches, data=st.data())
    def extracted(self, held, data):
        cache, rows = held
        if not rows:
            return multiple()
        b = data.draw(st.integers(0, len(rows) - 1))
        return self.added(cache.extract(b), [rows[b].copy()])

    @precondition(lambda self: len(self.alive) < SEQUENCES)
    @rule(target=batches, held=batches)
    def batch_saved_and_loaded(self, held):
        cache, rows = held
        loaded = BatchRotorKVCache.from_state(cache.state)
        return self.added(loaded, [r.copy() for r in rows])

    # ---- what must hold -------------------------------------------------------------------------

    def check(self, cache, rows):
        mx.eval(cache.state)  # as hosts do: the step is over
        is_batch = isinstance(cache, BatchRotorKVCache)
        offsets = np.array(cache.offset).reshape(-1).tolist()
        assert offsets == [row.offset for row in rows]
        assert cache.size() == max((row.tokens for row in rows), default=0)
        assert cache.is_trimmable() == (not any(row.evicted for row in rows))
        if cache.empty():
            assert not any(row.tokens for row in rows)
            return
        views = cache.keys_and_values()
        held = [self.held(view, place) for place, view in enumerate(views)]
        if not is_batch:
            self.check_bytes(cache, rows[0])
        if all(row.tokens for row in rows):
            found = attend_view(mx.array(queries(len(rows))), *views, scale=0.25)
            check_attention(np.array(found), held, rows, scale=0.25)
        else:
            for place, of_role in enumerate(held):
                check_held(of_role, place, rows)

    def held(self, view, place):
        packed = view.packed
        return Held(
            codec(self.config, DIMS[place], layer=3, role=ROLES[place]),
            self.config.sink,
            np.array(view.exact.astype(mx.float32)),
            None if packed is None else Packed(*(a if a is None else np.array(a) for a in packed)),
            None if view.channel_scale is None else np.array(view.channel_scale),
            view.lengths,
        )

    def check_bytes(self, cache, row):
        room = self.config.sink + self.config.window + BLOCK
        for place, store in enumerate(cache._stores):
            blocks = -(-row.packed // BLOCK)
            assert store.exact.shape[2] >= row.tokens - row.packed
            if row.packed == 0 and store.packed is None:
                continue
            have = store.packed.scales.shape[2]
            most = max(4, LONGEST // BLOCK // 32) + LONGEST // BLOCK
            assert blocks <= have <= (self.ring or most)
            assert store.exact.shape[2] <= max(room, row.tokens - row.packed + 150)
            bytes_of_blocks = K * have * store.codec.block_bytes
            own_scale = 0 if store.channel_scale is None else store.channel_scale.nbytes
            assert store.nbytes == store.exact.nbytes + bytes_of_blocks + own_scale, ROLES[place]


@pytest.mark.slow
def test_any_sequence_of_operations_leaves_what_the_model_foresees(figure):
    Caches.steps = Caches.states = 0
    run_state_machine_as_test(Caches, settings=examples(200, stateful_step_count=60))
    assert Caches.steps > 2000
    steps, states = f"{Caches.steps:,}", f"{Caches.states:,}"
    figure(f"state machine: {steps} changes of {states} caches, each checked against exact vectors")
