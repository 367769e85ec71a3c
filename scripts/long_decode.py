"""Measure memory and time per token of a long decode.

    python scripts/long_decode.py [--tokens 20000] [--key-bits 4] [--value-bits 4]

A tiny random model decodes token by token. Every 2,000 tokens, a row shows the time per token (the
10th percentile, which other work on the machine disturbs little), the bytes of the cache's arrays,
and the bytes that the report predicts. Attention reads the whole history, so the time must grow
linearly with it; the last column is the deviation from a straight line. The exit status is 1 if the
bytes differ from the prediction.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import rotormlx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support import models as tiny_models

EVERY = 2000


def main() -> int:
    """Decode, print the table, and return 1 if memory differs from the prediction."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--key-bits", type=int, default=4)
    parser.add_argument("--value-bits", type=int, default=4)
    args = parser.parse_args()

    model = tiny_models.build("llama")
    report = rotormlx.apply(model, rotormlx.RotorConfig(args.key_bits, args.value_bits))
    caches = make_prompt_cache(model)
    steps = generate_step(mx.array([1, 2, 3]), model, max_tokens=-1, prompt_cache=caches)
    times, rows, before = [], [], time.perf_counter()
    for number, _ in enumerate(steps, 1):
        now = time.perf_counter()
        times.append(now - before)
        before = now
        if number % EVERY == 0:
            tokens = caches[0].offset
            arrays = [a for c in caches for a in c.state if isinstance(a, mx.array)]
            size = sum(a.nbytes for a in arrays)
            typical = 1e3 * float(np.percentile(times[-EVERY:], 10))
            rows.append((tokens, typical, size, report.compressed_bytes(tokens)))
        if number >= args.tokens:
            break
    counts, typical_ms = (np.array(column) for column in list(zip(*rows, strict=True))[:2])
    line = np.polynomial.Polynomial.fit(counts, typical_ms, 1)
    print("tokens      ms per token bytes        predicted    off the line")
    for tokens, typical, size, foreseen in rows:
        off = 100 * (typical / line(tokens) - 1)
        print(f"{tokens:<11,} {typical:<12.3f} {size:<12,} {foreseen:<12,} {off:+.1f} %")
    return int(any(size != foreseen for _, _, size, foreseen in rows))


if __name__ == "__main__":
    sys.exit(main())
