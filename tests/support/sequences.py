"""What a sequence of tokens must hold, for state machines: a plain list of exact vectors.

The model of a sequence is the list of all vectors that were ever appended and not trimmed, and four
numbers that follow from the rules of docs/FORMAT.md, section 8. What a cache holds is compared with
it as numpy arrays, whoever holds them.
"""

import copy
import functools
from typing import NamedTuple

import numpy as np

from rotormlx.codec import reference
from rotormlx.codec.format import BLOCK, Codec, Packed
from tests.support import noise
from tests.support.bounds import check_encoded

K, REPEATS, DIMS = 2, 2, (16, 24)
LONGEST = 420  # tokens of a sequence: six blocks, and what stays exact


class Sequence:
    """What a sequence must hold: all its vectors, and how many of them lie where."""

    def __init__(self, config, max_blocks=None):
        self.config, self.max_blocks = config, max_blocks
        self.vectors = [np.zeros((K, 0, d), np.float32) for d in DIMS]
        self.tokens = self.packed = self.evicted = 0
        # By number of a block that was cut: where. It keeps the centre that it has.
        self.cut = {}
        self.first = None  # the rows that a channel scale was taken from

    def copy(self):
        twin = copy.copy(self)
        twin.vectors, twin.cut = list(self.vectors), dict(self.cut)
        return twin

    @property
    def offset(self):
        return self.tokens + self.evicted

    def append(self, new):
        self.take(new)
        self.pack()

    def take(self, new):
        """New tokens come; they are exact until the next step."""
        self.vectors = [np.concatenate(pair, 1) for pair in zip(self.vectors, new, strict=True)]
        self.tokens += new[0].shape[1]

    def pack(self):
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
        place = self.packed % BLOCK
        before = tuple(cut for cut in self.cut.get(number, ()) if cut < place)
        self.cut = {b: cuts for b, cuts in self.cut.items() if b < number}
        if place:
            self.cut[number] = (*before, place)
        if not self.packed:
            self.cut, self.first = {}, None
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


class Held(NamedTuple):
    """The keys or the values that a cache holds, in numpy.

    codec: What its blocks must be coded with.
    sink: Exact tokens before the packed ones.
    exact: Sink and tail, float32 ``[B, K, capacity, D]``.
    packed: Blocks, ``[B, K, N, ...]``, or None.
    channel_scale: ``[K, D]``, ``[B, K, D]``, or None.
    lengths: (Packed tokens, all tokens) of every batch row.
    """

    codec: Codec
    sink: int
    exact: np.ndarray
    packed: Packed | None
    channel_scale: np.ndarray | None
    lengths: list[tuple[int, int]]

    def noise(self, b, q, scale):
        """What is taken off the scores of queries ``[1, H, L, D]`` of batch row b."""
        packed_tokens, tokens = self.lengths[b]
        own = self.channel_scale
        return noise.of_sequence(
            q,
            self.packed,
            self.codec,
            scale=scale,
            channel_scale=own[b] if own is not None and own.ndim == 3 else own,
            sink=self.sink,
            packed_tokens=packed_tokens,
            tokens=tokens,
            row=b,
        )


def check_held(held, place, rows):
    """Sink and tail are the vectors of each row, bit for bit, and blocks are coded from them.

    Returns:
        What that stands for, ``[K, tokens, D]`` of each row, in the order held.
    """
    found = []
    for b, row in enumerate(rows):
        assert tuple(held.lengths[b]) == (row.packed, row.tokens)
        sink, middle, tail = row.positions()
        vectors = row.vectors[place]
        wanted = np.concatenate([vectors[:, sink], vectors[:, tail]], 1)
        assert np.array_equal(held.exact[b, :, : wanted.shape[1]], wanted)
        parts = [vectors[:, sink]]
        scale = check_scale(held, b, place, row) if middle else None
        for block in range(-(-len(middle) // BLOCK)):
            tokens = middle[block * BLOCK : (block + 1) * BLOCK]
            cuts = row.cut.get((tokens[0] - row.config.sink) // BLOCK, ())
            here = (a if a is None else a[b, :, block] for a in held.packed)
            arrays = [*here, scale, vectors[:, tokens]]
            heads = ((a if a is None else a[h].tobytes() for a in arrays) for h in range(K))
            parts.append(np.stack([decoded(held.codec, cuts, *head) for head in heads]))
        found.append(np.concatenate([*parts, vectors[:, tail]], 1))
    return found


def check_scale(held, b, place, row):
    """The channel scale of a batch row is that of its first block; float32 ``[K, D]``, or None."""
    if not row.config.scales_channels:
        return None
    scale = held.channel_scale if held.channel_scale.ndim == 2 else held.channel_scale[b]
    want = reference.prefill_scale(row.first[place][None].astype(np.float64), held.codec)
    assert np.allclose(scale, want, rtol=1e-5)  # float32 sums of 64 squares
    return scale


@functools.lru_cache(4096)
def decoded(chosen, cuts, words, scales, centre, scale, x):
    """The rows ``[n, D]`` that a block of one head stands for, which must be coded from rows x.

    Arrays come as their bytes. Only where no rows were cut from it is its centre their mean.
    """
    dim = chosen.head_dim
    rows = np.frombuffer(x, np.float32).reshape(-1, dim)
    n = len(rows)
    whole = np.concatenate([rows, np.zeros((BLOCK - n, dim), np.float32)])[None, None]
    packed = Packed(
        np.frombuffer(words, np.uint32).reshape(1, 1, 1, *chosen.words_shape),
        np.frombuffer(scales, np.float16).reshape(1, 1, 1, BLOCK),
        None if centre is None else np.frombuffer(centre, np.float16).reshape(1, 1, 1, dim),
    )
    given = {"channel_scale": None if scale is None else np.frombuffer(scale, np.float32)[None]}
    assert n == BLOCK or n in cuts
    centres = packed.centres if cuts else None
    check_encoded(whole.astype(np.float64), packed, chosen, *given.values(), centres, cuts, n)
    return reference.decode(packed, chosen, **given)[0, 0, :n]


def queries(batch):
    """One query of each head, always the same, float32 ``[B, H, 1, D]``."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, K * REPEATS, 1, DIMS[0])).astype(np.float32)


def check_attention(found, held, rows, scale):
    """Attention of :func:`queries` is that over held keys and values, which :func:`check_held`."""
    decoded = [check_held(of_role, place, rows) for place, of_role in enumerate(held)]
    q = queries(len(rows))
    for b, pair in enumerate(zip(*decoded, strict=True)):
        row = q[b : b + 1]
        given = {"scale": scale, "noise": held[0].noise(b, row, scale)}
        wanted = reference.attend(row, *(x[None] for x in pair), **given)
        # Sums in float32 of up to 420 terms about 2 in size.
        assert np.allclose(found[b], wanted[0], atol=1e-4)
