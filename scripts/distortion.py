"""Measure the cost and distortion of each rotation: ``python scripts/distortion.py``.

Distortion is the mean squared error of coded vectors relative to their mean square, computed with
the float64 reference codec. It does not depend on the device.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

from rotormlx.codec import reference
from rotormlx.codec.format import VALUE, Codec
from rotormlx.codec.rotation import Rotation, rotation
from rotormlx.config import ROTATIONS

OUTLIERS, OUTLIER_SIZE = 4, 10.0


def named(name: str, head_dim: int, seed: int) -> Rotation:
    """Return a rotation by name."""
    return rotation(name, head_dim, seed=seed, role=VALUE)


def with_random_rotors(head_dim: int, seed: int) -> Rotation:
    """Return the cascade with evenly distributed rotors in place of those with entries ±1/2."""
    rng = np.random.default_rng(seed)
    cascade = named("cascade", head_dim, seed)
    stages, columns, drawn = [], np.eye(head_dim), 0
    for stage in cascade.stages:
        coefficients = stage.coefficients
        if stage.kind == "Left":
            q = rng.normal(size=coefficients.shape)
            coefficients = q / np.linalg.norm(q, axis=-1, keepdims=True)
            drawn += q.size
        stages.append(replace(stage, coefficients=coefficients))
        columns = stages[-1].apply(columns)
    return replace(
        cascade,
        stages=tuple(stages),
        matrix=columns.T,
        parameters=drawn,
        sign_bits=cascade.sign_bits - drawn,
        # 16 multiply-adds per group of four in place of 12 additions.
        multiply_adds=cascade.multiply_adds + drawn,
    )


def inputs(kind: str, head_dim: int, seed: int, rows: int = 512) -> np.ndarray:
    """Return normal rows, with four channels ten times as large if ``kind`` is ``outliers``."""
    rng = np.random.default_rng([seed, head_dim])
    x = rng.normal(size=(1, 1, rows, head_dim))
    if kind == "outliers":
        x[..., rng.choice(head_dim, OUTLIERS, replace=False)] *= OUTLIER_SIZE
    return x


def distortion(x: np.ndarray, chosen: Rotation, bits: int) -> float:
    """Return the relative mean squared error of vectors ``[1, 1, S, D]``."""
    codec = Codec(VALUE, bits, chosen)
    decoded = reference.decode(reference.encode(x, codec), codec)
    return float(((decoded - x) ** 2).sum() / (x**2).sum())


def main(
    head_dim: int = 128,
    seeds: Annotated[int, typer.Option(help="Number of rotations and inputs to average over.")] = 8,
) -> None:
    """Print a Markdown table."""
    cases = [(kind, bits) for kind in ("normal", "outliers") for bits in (2, 3, 4, 8)]
    makers = {f"`{name}`": partial(named, name, head_dim) for name in ROTATIONS}
    makers["cascade of random rotors"] = partial(with_random_rotors, head_dim)
    header = ["rotation", "numbers", "signs", "multiply-adds"]
    table = [[*header, *(f"{kind}, {bits} bit" for kind, bits in cases)], ["---"] * 12]
    for name, make in track(makers.items(), "Coding", total=len(makers)):
        made = [make(seed) for seed in range(seeds)]
        row = [name, str(made[0].parameters), str(made[0].sign_bits), str(made[0].multiply_adds)]
        for kind, bits in cases:
            errors = [distortion(inputs(kind, head_dim, s), made[s], bits) for s in range(seeds)]
            row.append(f"{np.mean(errors):.3g}")
        table.append(row)
    for row in table:
        typer.echo("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    typer.run(main)
