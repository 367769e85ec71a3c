"""Make the test vectors that every backend must reproduce: ``python scripts/make_vectors.py``.

The inputs are multiples of 1/32 below 4. They are exact in float16 and bfloat16, so block means are
exact in any order of summation. Rows are redrawn until every coordinate is far enough from every
decision boundary, and every scale far enough from every rounding tie. Then words, scales and
centres must agree bit for bit, in whatever order a backend adds.

Source: docs/FORMAT.md, section 9.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from safetensors.numpy import save_file

from rotormlx.codec import codebook, reference, trellis
from rotormlx.codec.format import BLOCK, FORMAT_VERSION, KEY, ROLES, Codec, Packed, codec
from rotormlx.config import RotorConfig

DIRECTORY = Path(__file__).parent.parent / "tests" / "vectors"

GRID = 32
# Smallest distance of a coordinate z from a boundary, and smallest difference of the sums of two
# paths; float32 errors are a tenth of it.
BOUNDARY_MARGIN = 1e-5
# Smallest distance of a scale from a tie, in units of its last place; float32 errors are 4e-4.
TIE_MARGIN = 0.01

SINK, TAIL, LENGTH, REPEATS = 3, 9, 2, 3
# The last block is not full, so lanes after the last token must be ignored.
MISSING = 7
SHOWN_TOKENS, SHOWN_ROWS = 3, 4


class Case(NamedTuple):
    """One file: one rotation at one head_dim, at all code widths, with or without channel scale."""

    rotation: str
    head_dim: int
    scaled: bool
    batch: int
    kv_heads: int
    blocks: int
    layer: int
    seed: int

    @property
    def file_name(self) -> str:
        """Name of the file in ``tests/vectors``."""
        return f"{self.rotation}-d{self.head_dim}.safetensors"


CASES = (
    Case("cascade", 64, False, batch=1, kv_heads=1, blocks=2, layer=0, seed=0),
    Case("cascade", 80, True, batch=2, kv_heads=1, blocks=1, layer=5, seed=0),
    Case("cascade", 112, False, batch=1, kv_heads=1, blocks=1, layer=1, seed=7),
    Case("cascade", 128, True, batch=1, kv_heads=1, blocks=1, layer=31, seed=0),
    Case("cascade", 96, True, batch=1, kv_heads=1, blocks=1, layer=2, seed=2**40),
    Case("rotor3", 128, True, batch=1, kv_heads=1, blocks=1, layer=4, seed=1),
    Case("dense", 64, False, batch=1, kv_heads=2, blocks=1, layer=6, seed=0),
)


def make(case: Case) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays and the metadata of one file."""
    rng = np.random.default_rng([CASES.index(case)])
    arrays: dict[str, np.ndarray] = {}
    exact: dict[str, np.ndarray] = {}
    coded: dict[tuple[str, int], tuple[Packed, Codec, np.ndarray | None]] = {}
    decoded: dict[tuple[str, int], np.ndarray] = {}
    batch, heads, head_dim = case.batch, case.kv_heads, case.head_dim

    for role in ROLES:
        codecs = [_codec(case, bits, role) for bits in codebook.BITS]
        x = _grid(rng, (batch, heads, case.blocks * BLOCK, head_dim), offset=role == KEY)
        # Fixed before rows are redrawn, so it is an input; it is close to the scale of `prefill`.
        scale = _channel_scale(case, x, codecs[0])
        _keep_margins(x, codecs, scale, rng)
        arrays |= {f"{role}.prefill": reference.prefill_scale(x[:1, :, :BLOCK], codecs[0])}
        exact[role] = _grid(rng, (batch, heads, SINK + TAIL, head_dim), offset=role == KEY)
        arrays |= {f"{role}.input": x.astype(np.float16)}
        arrays |= {f"{role}.exact": exact[role].astype(np.float16)}
        arrays |= {f"{role}.rotation": codecs[0].rotation.matrix[:SHOWN_ROWS].astype(np.float32)}
        if scale is not None:
            arrays |= {f"{role}.channel_scale": scale}
        for bits, chosen in zip(codebook.BITS, codecs, strict=True):
            packed = reference.encode(x, chosen, channel_scale=scale)
            coded[role, bits] = packed, chosen, scale
            decoded[role, bits] = reference.decode(packed, chosen, channel_scale=scale)
            codes = reference.unpack(packed.words, chosen)[:, :, 0, :SHOWN_TOKENS]
            shown = decoded[role, bits][:, :, :SHOWN_TOKENS].astype(np.float32)
            arrays |= {
                f"{role}.words.{bits}": packed.words,
                f"{role}.scales.{bits}": packed.scales,
                f"{role}.codes.{bits}": codes.astype(np.uint8),
                f"{role}.decoded.{bits}": shown,
            }
            if role == KEY:
                arrays["key.centres"] = packed.centres

    query = rng.normal(size=(batch, heads * REPEATS, LENGTH, head_dim)).astype(np.float32)
    arrays["query"] = query
    for bits in codebook.BITS:
        keys, values = (
            np.concatenate(
                [exact[r][:, :, :SINK], decoded[r, bits][:, :, :-MISSING], exact[r][:, :, SINK:]], 2
            )
            for r in ROLES
        )
        factor = head_dim**-0.5
        packed, chosen, scale = coded[KEY, bits]
        noise = reference.score_noise(query, packed, chosen, scale=factor, channel_scale=scale)
        around = ((0, 0), (0, 0), (0, 0), (SINK, TAIL))
        noise = np.pad(noise[..., :-MISSING], around)
        output = reference.attend(query, keys, values, scale=factor, noise=noise, mask="causal")
        arrays[f"output.{bits}"] = output.astype(np.float32)

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    facts = {**case._asdict(), "format_version": FORMAT_VERSION, "missing": MISSING, "sink": SINK}
    return arrays, {"rotormlx": json.dumps(facts, sort_keys=True)}


def _codec(case: Case, bits: int, role: str) -> Codec:
    config = RotorConfig(bits, bits, case.rotation, seed=case.seed)
    return codec(config, case.head_dim, layer=case.layer, role=role)


def _grid(rng: np.random.Generator, shape: tuple[int, ...], *, offset: bool) -> np.ndarray:
    """Return normal numbers on the grid, with unequal sizes and offsets per channel."""
    spread = rng.uniform(0.2, 1.2, shape[-1])
    middle = rng.uniform(-1.5, 1.5, shape[-1]) if offset else 0.0
    steps = np.round((rng.normal(size=shape) * spread + middle) * GRID)
    return np.clip(steps, -127, 127) / GRID


def _channel_scale(case: Case, x: np.ndarray, chosen: Codec) -> np.ndarray | None:
    if not case.scaled:
        return None
    return reference.prefill_scale(x[:1, :, :BLOCK], chosen)


def _keep_margins(
    x: np.ndarray, codecs: list[Codec], scale: np.ndarray | None, rng: np.random.Generator
) -> None:
    """Redraw rows in place until all keep the margins.

    A step added to one row is subtracted from another of its block, so the centre does not change.
    """
    blocks = x.reshape(*x.shape[:2], -1, BLOCK, x.shape[-1])
    while (bad := _too_close(x, codecs, scale)).any():
        for b, h, n, row in np.argwhere(bad):
            partner = (row + rng.integers(1, BLOCK)) % BLOCK
            step = rng.integers(-1, 2, x.shape[-1]) / GRID
            moved = blocks[b, h, n, [row, partner]] + np.stack([step, -step])
            if np.abs(moved).max() * GRID <= 127:
                blocks[b, h, n, [row, partner]] = moved


def _too_close(x: np.ndarray, codecs: list[Codec], scale: np.ndarray | None) -> np.ndarray:
    """Return which rows ``[B, K, N, 64]`` are too close to a boundary or a tie at any width."""
    bad = np.zeros((*x.shape[:2], x.shape[2] // BLOCK, BLOCK), bool)
    for chosen in codecs:
        packed = reference.encode(x, chosen, channel_scale=scale)
        y = x.reshape(*bad.shape, -1)
        if packed.centres is not None:
            y = y - packed.centres.astype(np.float64)[..., None, :]
        if scale is not None:
            y = y / scale[None, :, None, None, :]
        rotated, norm = reference.rotate(y, chosen)
        z = rotated * np.sqrt(chosen.head_dim) / norm
        margin = _path_margin if chosen.has_trellis else _boundary_distance
        bad |= (margin(z, chosen) < BOUNDARY_MARGIN).any(-1)
        bad |= _tie_distance(packed, z, norm, chosen) < TIE_MARGIN
    return bad


def _boundary_distance(z: np.ndarray, chosen: Codec) -> np.ndarray:
    """Return the distance of each number from the nearest boundary."""
    size = np.abs(z)
    limits = np.concatenate([[0], codebook.boundaries(chosen.bits).astype(np.float64)])
    right = np.clip(np.searchsorted(limits, size), 0, len(limits) - 1)
    return np.minimum(np.abs(size - limits[right]), np.abs(size - limits[np.maximum(right, 1) - 1]))


def _path_margin(z: np.ndarray, chosen: Codec) -> np.ndarray:
    """Return how much more the cheapest path with another choice at each number costs."""
    if chosen.role == KEY:
        z = np.swapaxes(z, -1, -2)
    _, margins = trellis.encode_with_margins(z, chosen.bits)
    return np.swapaxes(margins, -1, -2) if chosen.role == KEY else margins


def _tie_distance(packed: Packed, z: np.ndarray, norm: np.ndarray, chosen: Codec) -> np.ndarray:
    """Return the distance of each scale from a rounding tie, in units of the last place."""
    level = reference.levels(reference.unpack(packed.words, chosen), chosen)
    along = np.maximum((level * z).sum(-1), chosen.head_dim / 2)
    scale = chosen.shrink * norm[..., 0] * np.sqrt(chosen.head_dim) / along
    error = np.abs(scale - packed.scales.astype(np.float64))
    return 0.5 - error / np.spacing(packed.scales).astype(np.float64)


def main(
    directory: Annotated[Path, typer.Argument(help="Folder for the test vectors.")] = DIRECTORY,
) -> None:
    """Write all test vectors."""
    directory.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        arrays, metadata = make(case)
        save_file(arrays, directory / case.file_name, metadata)
        typer.echo(f"{case.file_name}: {sum(a.nbytes for a in arrays.values()) / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
