"""Measure how much rounding adds to a divergence: ``python scripts/noise.py``.

SmolLM2-135M-Instruct reads a text with the exact cache in chunks of other lengths, with a rotormlx
cache that packs nothing, and in another dtype. All are correct computations of the same function
and differ only by rounding. The script prints Markdown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import mlx_lm
import typer
from mlx_lm.models.cache import make_prompt_cache

from rotormlx.cli import demo_model
from rotormlx.config import RotorConfig
from rotormlx.measure import schemes, scoring
from rotormlx.measure.cpu_linear import numpy_linear
from rotormlx.measure.intervals import mean_interval
from rotormlx.measure.quality_plan import first_packed
from rotormlx.measure.scoring import CHUNK, Scores
from rotormlx.measure.text import default_text
from rotormlx.mlx import hosts
from rotormlx.mlx.cache.single import RotorKVCache
from rotormlx.mlx.probe import compress

Make = Callable[[int], Any]


def main(tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 1217) -> None:
    """Print the divergence due to rounding alone, next to that of 4 bits."""
    model, tokenizer = mlx_lm.load(str(demo_model.fetch()))[:2]
    ids = tokenizer.encode(default_text()[: 8 * tokens])[:tokens]
    exact = schemes.scheme(schemes.EXACT).make
    four = schemes.scheme("k4v4")
    start = first_packed([four])

    def unpacked(layer: int) -> RotorKVCache:
        return RotorKVCache(RotorConfig(window=tokens), layer)

    def read(make: Make, dtype: str, chunk: int = CHUNK) -> Scores:
        caches = compress(make_prompt_cache(model), make)
        with numpy_linear(), scoring.computing_in(model, dtype):
            return scoring.score(model, ids, caches, chunk=chunk)

    print(
        "| reference: the exact cache in | compared with it | KL | 95 % | top-1 |\n"
        + "| --- " * 5
        + "|"
    )

    def compare(reference: Scores, dtype: str, label: str, other: Scores) -> None:
        distance = scoring.differences(reference, other, start=start)
        low, high = mean_interval(distance.kl)
        kl, top1 = distance.kl.mean(), distance.same.mean()
        print(f"| {dtype} | {label} | {kl:z.5f} | {low:z.5f} to {high:z.5f} | {top1:.1%} |")

    with hosts.MLX_LM.in_place():
        of, coded = (
            {dtype: read(make, dtype) for dtype in ("bfloat16", "float32")}
            for make in (exact, four.make)
        )
        for dtype, reference in of.items():
            for chunk in (32, 128):
                label = f"exact, {dtype}, chunks of {chunk}"
                compare(reference, dtype, label, read(exact, dtype, chunk))
            label = f"rotormlx with nothing packed, {dtype}"
            compare(reference, dtype, label, read(unpacked, dtype))
            compare(reference, dtype, f"rotormlx 4 bits, {dtype}", coded[dtype])
        compare(of["float32"], "float32", "exact, bfloat16", of["bfloat16"])
        compare(of["float32"], "float32", "rotormlx 4 bits, bfloat16", coded["bfloat16"])


if __name__ == "__main__":
    typer.run(main)
