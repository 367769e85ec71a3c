"""Measure the error of a prefix that was trimmed from a longer prompt.

    python scripts/trimmed_prefix.py

SmolLM2-135M-Instruct in float32 reads a text and 300 more tokens, trims these, and predicts the
next tokens. The predictions are compared with those of the exact cache. The script prints Markdown.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import mlx.core as mx
import mlx_lm
import numpy as np
import numpy.typing as npt
import typer
from mlx_lm.models.cache import KVCache, trim_prompt_cache

import rotormlx
from rotormlx.cli import demo_model
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.scoring import computing_in
from rotormlx.measure.text import default_text

KEPT = (300, 400, 520, 650, 777)
MORE = 300
PREDICTED = 32
CHUNK = 512  # the length in which mlx-lm reads a prompt


class Reader:
    """A model that reads a text through caches."""

    def __init__(self, tokens: int) -> None:
        self.model, tokenizer = mlx_lm.load(str(demo_model.fetch()))[:2]
        self.ids = mx.array(tokenizer.encode(default_text()[: 8 * tokens])[:tokens])[None]

    def read(self, caches: list[Any], start: int, stop: int) -> list[Any]:
        """Read tokens ``start`` to ``stop``, and return the caches."""
        for first in range(start, stop, CHUNK):
            part = slice(first, min(first + CHUNK, stop))
            mx.eval(self.model(self.ids[:, part], cache=caches), [c.state for c in caches])
        return caches

    def predict(self, caches: list[Any], start: int) -> npt.NDArray[np.float32]:
        """Return the log probabilities after each of the next tokens, ``[N, V]``."""
        logits = self.model(self.ids[:, start : start + PREDICTED], cache=caches)[0]
        logits = logits.astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def divergences(reader: Reader, bits: int, kept: int) -> tuple[float, float, float]:
    """Return the KL of a prefix alone, trimmed by mlx-lm, and trimmed by ours and read again."""
    exact = reader.predict(reader.read([KVCache() for _ in reader.model.layers], 0, kept), kept)
    config = rotormlx.RotorConfig(bits, bits)
    alone = reader.read(rotormlx.make_prompt_cache(reader.model, config), 0, kept)
    longer = reader.read(copy.deepcopy(alone), kept, kept + MORE)
    trimmed, again = copy.deepcopy(longer), longer
    trim_prompt_cache(trimmed, MORE)
    count = rotormlx.trim_prompt_cache(again, MORE)
    reader.read(again, kept + MORE - count, kept)
    found = (reader.predict(caches, kept) for caches in (alone, trimmed, again))
    first, second, third = (float((np.exp(exact) * (exact - x)).sum(-1).mean()) for x in found)
    return first, second, third


def main(
    bits: Annotated[list[int] | None, typer.Option(help="Bits of keys and values.")] = None,
) -> None:
    """Print the divergence of each prefix and their mean."""
    reader = Reader(KEPT[-1] + MORE)
    print("| bits | tokens kept | alone | trimmed | trimmed and read again |\n" + "|---" * 5 + "|")
    with numpy_linear(), computing_in(reader.model, "float32"):
        for width in bits or (4, 3):
            rows = [divergences(reader, width, kept) for kept in KEPT]
            for kept, row in zip((*KEPT, "mean"), (*rows, np.mean(rows, 0)), strict=True):
                print(f"| {width} | {kept} | {row[0]:.4f} | {row[1]:.4f} | {row[2]:.4f} |")


if __name__ == "__main__":
    typer.run(main)
