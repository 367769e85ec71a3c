"""Decodes a fixed text while Ctrl-C comes again and again; run in a process of its own.

    python -m tests.support.interrupted INTERRUPTS

After every interrupt the layers' caches are checked, brought back to the same length, and the text
goes on. The last line is JSON: where it was interrupted, and how the logits of the last tokens, and
the bytes of the first layer, compare with those of a run that nobody disturbed.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time

import mlx.core as mx
import numpy as np

import rotormlx
from rotormlx.mlx import integration
from tests.support import models as tiny_models

CONFIG = rotormlx.RotorConfig(8, 8, sink=2, window=16)
TOKENS, LAST = 700, 20


def read(model, ids, caches, start, stop):
    """Feed tokens one by one; gives the logits of each."""
    for i in range(start, stop):
        logits = model(ids[:, i : i + 1], cache=caches)
        mx.eval(logits)
        yield logits[0, -1]


def check(caches):
    """Keys and values of every layer agree with each other and with the counts."""
    for cache in caches:
        counts, stores = cache.counts, cache._stores
        assert len(stores) == (2 if counts.tokens else 0)
        for store in stores:
            exact, words, *_ = store.saved(counts)
            assert exact.shape[2] == counts.exact
            assert (0 if words is None else words.shape[2]) == -(-counts.packed // 64)
            mx.eval(store.arrays)
        assert len({s.packed and tuple(s.packed.scales.shape) for s in stores}) <= 1
    offsets = [cache.offset for cache in caches]
    assert max(offsets) - min(offsets) <= 1, offsets
    return offsets


def contents(cache):
    """All bytes that count of a cache."""
    arrays = [np.array(a) for a in cache.state if isinstance(a, mx.array)]
    return [a.tobytes() for a in arrays]


def main():
    """Decode, be interrupted, and compare."""
    chance = random.Random(1)
    model, ids = tiny_models.build("llama"), tiny_models.tokens(TOKENS + LAST)
    caches = integration.make_prompt_cache(model, CONFIG)
    undisturbed = list(read(model, ids, caches, 0, TOKENS + LAST))[-LAST:]
    first_layer = contents(caches[0])

    # What Ctrl-C does, by another signal: a shell may have started this with SIGINT ignored.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    caches = integration.make_prompt_cache(model, CONFIG)
    position, seen = 0, []
    for _ in range(int(sys.argv[1])):
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0005, 0.04))
            for _ in read(model, ids, caches, position, TOKENS):
                pass
            # Short sleeps: one that begins as the signal comes may not be woken by it.
            for _ in range(100):
                time.sleep(0.1)
            raise RuntimeError("the interrupt came, and nothing was interrupted")
        except KeyboardInterrupt:
            pass
        seen.append(check(caches))
        position = min(seen[-1])
        for cache in caches:
            cache.trim(cache.offset - position)
    list(read(model, ids, caches, position, TOKENS))
    after = list(read(model, ids, caches, TOKENS, TOKENS + LAST))
    found, expected = (np.array(mx.stack(x)) for x in (after, undisturbed))
    print(
        json.dumps(
            {
                "offsets_when_interrupted": seen,
                "offsets": [cache.offset for cache in caches],
                "first_layer_is_the_same": first_layer == contents(caches[0]),
                "packed": [cache.packed_tokens for cache in caches],
                "difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
            }
        )
    )


if __name__ == "__main__":
    main()
