"""Caches under random sequences of operations, against a plain list of exact vectors.

The model of a sequence is the list of all vectors that were ever appended and not trimmed, and four
numbers that follow from the rules of docs/FORMAT.md, section 8. After every step, each cache that
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
import functools
import itertools
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from bounds import examples
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

from rotormlx import hook, reference
from rotormlx.attention import attend_view
from rotormlx.batch_cache import BatchRotorKVCache
from rotormlx.cache import RotorKVCache
from rotormlx.config import RotorConfig
from rotormlx.format import BLOCK, KEY, ROLES, Packed, codec

K, REPEATS, DIMS = 2, 2, (16, 24)
LONGEST = 420  # tokens of a sequence: six blocks, and what stays exact
SEQUENCES = 40  # alive at once


class Sequence:
    """What a sequence must hold: all its vectors, and how many of them lie where."""

    def __init__(self, config, max_blocks):
        self.config, self.max_blocks = config, max_blocks
        self.vectors = [np.zeros((K, 0, d), np.float32) for d in DIMS]
        self.tokens = self.packed = self.evicted = 0
        self.cut = set()  # numbers of blocks that were cut: they keep the centre that they have
        self.first = None  # the rows that a channel scale was taken from

    def copy(self):
        twin = copy.copy(self)
        twin.vectors, twin.cut = list(self.vectors), set(self.cut)
        return twin

    @property
    def offset(self):
        return self.tokens + self.evicted

    def append(self, new):
        self.vectors = [np.concatenate(pair, 1) for pair in zip(self.vectors, new, strict=True)]
        self.tokens += new[0].shape[1]
        sink, window = self.config.sink, self.config.window
        while True:
            count = BLOCK - self.packed % BLOCK
            if self.tokens - self.packed - sink - window < count:
                return
            if not self.packed and not self.evicted:
                self.first = [x[:, sink : sink + BLOCK] for x in self.vectors]
            self.packed += count
            if self.max_blocks and self.packed > self.max_blocks * BLOCK:
                self.packed, self.tokens = self.packed - BLOCK, self.tokens - BLOCK
                self.evicted += BLOCK

    def trim(self, n):
        tail = max(0, self.tokens - self.packed - self.config.sink)
        n = min(n, tail if self.evicted else self.tokens)
        self.packed -= min(max(0, n - tail), self.packed)
        self.tokens -= n
        self.vectors = [x[:, : self.offset] for x in self.vectors]
        number = (self.packed + self.evicted) // BLOCK
        self.cut = {b for b in self.cut if b < number}
        if self.packed % BLOCK:
            self.cut.add(number)
        if not self.packed:
            self.cut, self.first = set(), None
        return n

    def positions(self):
        """Of all tokens held, in the order in which attention reads them."""
        sink = self.config.sink if self.packed else 0
        blocks = -(-self.packed // BLOCK)
        first = self.evicted // BLOCK
        numbers = range(first, first + blocks)
        if self.max_blocks:
            numbers = sorted(numbers, key=lambda b: b % self.max_blocks)
        packed = [self.config.sink + b * BLOCK + i for b in numbers for i in range(BLOCK)]
        packed = packed[: self.packed]
        tail = range(self.offset - (self.tokens - self.packed - sink), self.offset)
        return [*range(sink)], packed, [*tail]


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


@functools.lru_cache(4096)
def expected(chosen, x, centres, scale):
    """Codes and scales of one block, from the bytes of its rows, centre and channel scale."""
    d = chosen.head_dim
    rows = np.frombuffer(x, np.float32).reshape(1, 1, BLOCK, d)
    means = None if centres is None else np.frombuffer(centres, np.float16).reshape(1, 1, 1, d)
    factors = None if scale is None else np.frombuffer(scale, np.float32).reshape(1, d)
    packed = reference.encode(rows, chosen, channel_scale=factors, centres=means)
    own = (
        reference.block_means(rows[:, :, None].astype(np.float64))[0, 0, 0]
        if chosen.role == KEY
        else None
    )
    return reference.unpack(packed.words, chosen)[0, 0, 0], packed.scales[0, 0, 0], own


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
        hook.install()

    def teardown(self):
        for cache, rows in getattr(self, "alive", ()):
            self.check(cache, rows)
        hook.remove()

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
        is_batch = isinstance(cache, BatchRotorKVCache)
        offsets = np.array(cache.offset).reshape(-1).tolist()
        assert offsets == [row.offset for row in rows]
        assert cache.size() == max((row.tokens for row in rows), default=0)
        assert cache.is_trimmable() == (not any(row.evicted for row in rows))
        if cache.empty():
            assert not any(row.tokens for row in rows)
            return
        views = cache.keys_and_values()
        decoded = [self.check_view(view, place, rows) for place, view in enumerate(views)]
        if not is_batch:
            self.check_bytes(cache, rows[0])
        self.check_attention(views, decoded, rows)

    def check_view(self, view, place, rows):
        """Exact and packed tokens of every row; what they stand for, by row, in the order held."""
        chosen = codec(self.config, DIMS[place], layer=3, role=ROLES[place])
        exact = np.array(view.exact.astype(mx.float32))
        packed = (
            None
            if view.packed is None
            else Packed(*(a if a is None else np.array(a) for a in view.packed))
        )
        scales = None if view.channel_scale is None else np.array(view.channel_scale)
        held = []
        for b, row in enumerate(rows):
            assert view.lengths[b] == (row.packed, row.tokens)
            sink, middle, tail = row.positions()
            vectors = row.vectors[place]
            parts = [vectors[:, sink], vectors[:, tail]]
            wanted = np.concatenate(parts, 1)
            assert np.array_equal(exact[b, :, : wanted.shape[1]], wanted)
            rest = np.zeros((K, 0, DIMS[place]))
            if middle:
                scale = None
                if self.config.scales_channels:
                    scale = scales if scales.ndim == 2 else scales[b]
                    want = reference.prefill_scale(
                        row.first[place][None].astype(np.float64), chosen
                    )
                    assert np.allclose(scale, want, rtol=1e-5)  # float32 sums of 64 squares
                own = Packed(*(a if a is None else a[b : b + 1] for a in packed))
                self.check_blocks(own, chosen, scale, vectors, middle, row)
                rest = reference.decode(own, chosen, channel_scale=scale)[0, :, : len(middle)]
            held.append(np.concatenate([parts[0], rest, parts[1]], 1))
        return held

    def check_blocks(self, packed, chosen, scale, vectors, positions, row):
        codes = reference.unpack(packed.words[0], chosen)
        for block in range(-(-len(positions) // BLOCK)):
            tokens = positions[block * BLOCK : (block + 1) * BLOCK]
            number = (tokens[0] - self.config.sink) // BLOCK
            x = np.zeros((K, BLOCK, chosen.head_dim), np.float32)
            x[:, : len(tokens)] = vectors[:, tokens]
            for head in range(K):
                centre = None if packed.centres is None else packed.centres[0, head, block]
                want, want_scales, mean = expected(
                    chosen,
                    x[head].tobytes(),
                    None if centre is None else centre.tobytes(),
                    None if scale is None else scale[head].astype(np.float32).tobytes(),
                )
                n = len(tokens)
                # A coordinate within float32 errors of a boundary may have the code beside it.
                assert (codes[head, block, :n] != want[:n]).sum() <= 2
                # Another code has another scale.
                same = (codes[head, block, :n] == want[:n]).all(-1)
                found = packed.scales[0, head, block, :n]
                assert np.allclose(found[same], want_scales[:n][same], rtol=2**-9)
                if centre is not None and number not in row.cut and n == BLOCK:
                    assert np.allclose(centre, mean, rtol=2**-9, atol=1e-4)

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

    def check_attention(self, views, decoded, rows):
        rng = np.random.default_rng(0)
        q = rng.normal(size=(len(rows), K * REPEATS, 1, DIMS[0])).astype(np.float32)
        if not all(row.tokens for row in rows):
            return
        found = np.array(attend_view(mx.array(q), *views, scale=0.25))
        for b in range(len(rows)):
            keys, values = (d[b][None] for d in decoded)
            wanted = reference.attend(q[b : b + 1], keys, values, scale=0.25)
            # Sums in float32 of up to 420 terms about 2 in size.
            assert np.allclose(found[b], wanted[0], atol=1e-4)


def test_any_sequence_of_operations_leaves_what_the_model_foresees(figure):
    Caches.steps = Caches.states = 0
    run_state_machine_as_test(Caches, settings=examples(200, stateful_step_count=60))
    assert Caches.steps > 2000
    steps, states = f"{Caches.steps:,}", f"{Caches.states:,}"
    figure(f"state machine: {steps} changes of {states} caches, each checked against exact vectors")
