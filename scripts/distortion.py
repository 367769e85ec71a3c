"""What each rotation costs and how well it spreads outliers: ``python scripts/distortion.py``.

Distortion is the mean squared error of coded vectors relative to their mean square, computed with
the float64 reference codec. It depends on no device.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer

from rotormlx import reference
from rotormlx.codebook import BITS
from rotormlx.config import ROTATIONS, RotorConfig
from rotormlx.format import codec
from rotormlx.rotation import rotation

OUTLIERS, OUTLIER_SIZE = 4, 10.0


def distortion(x: np.ndarray, name: str, bits: int, seed: int) -> float:
    """Relative mean squared error of vectors ``[1, 1, S, D]``."""
    chosen = codec(RotorConfig(bits, bits, name, seed=seed), x.shape[-1], layer=0, role="value")
    decoded = reference.decode(reference.encode(x, chosen), chosen)
    return float(((decoded - x) ** 2).sum() / (x**2).sum())


def inputs(kind: str, head_dim: int, seed: int, rows: int = 512) -> np.ndarray:
    """Normal rows, with four channels ten times as large if ``kind`` is ``outliers``."""
    rng = np.random.default_rng([seed, head_dim])
    x = rng.normal(size=(1, 1, rows, head_dim))
    if kind == "outliers":
        x[..., rng.choice(head_dim, OUTLIERS, replace=False)] *= OUTLIER_SIZE
    return x


def main(
    head_dim: int = 128,
    seeds: Annotated[int, typer.Option(help="Rotations and inputs averaged.")] = 16,
) -> None:
    """Print a Markdown table."""
    kinds = ("normal", "outliers")
    heads = [f"{kind}, {bits} bit" for kind in kinds for bits in BITS]
    columns = ["rotation", "numbers", "signs", "multiply-adds", *heads]
    typer.echo("| " + " | ".join(columns) + " |")
    typer.echo("|---" * len(columns) + "|")
    for name in ROTATIONS:
        chosen = rotation(name, head_dim)
        row = [f"`{name}`", chosen.parameters, chosen.sign_bits, chosen.multiply_adds]
        for kind in kinds:
            for bits in BITS:
                errors = [
                    distortion(inputs(kind, head_dim, s), name, bits, s) for s in range(seeds)
                ]
                row.append(f"{np.mean(errors):.3g}")
        typer.echo("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    typer.run(main)
