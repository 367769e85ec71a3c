"""Finds the kernels' text, and writes the parts that follow from a rotation or a codebook.

A file of ``metal_kernels/`` holds device functions and then, behind the line ``// kernel body``,
what ``mx.fast.metal_kernel`` takes as the source. Device code that every platform has in common
lies in ``shared_kernels/``. Both folders stand beside the package in the repository and inside it
in a wheel.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from rotormlx import codebook
from rotormlx.generator import Floats
from rotormlx.rotation import Rotation, Stage

_PACKAGE = Path(__file__).parent.parent
_BODY = "\n// kernel body\n"


class KernelText(NamedTuple):
    """What ``mx.fast.metal_kernel`` takes: functions, and the body of the kernel."""

    header: str
    source: str


@cache
def read(path: str) -> str:
    """The text of a file such as ``shared_kernels/rotation.h``.

    Raises:
        RuntimeError: If the installation lacks it.
    """
    for folder in (_PACKAGE, _PACKAGE.parent):
        if (folder / path).is_file():
            return (folder / path).read_text(encoding="utf-8")
    raise RuntimeError(
        f"[kernels] {path} must lie in {_PACKAGE} or beside it, but it does not; "
        "install rotormlx anew."
    )


def metal_text(name: str, *before: str) -> KernelText:
    """A kernel of ``metal_kernels/`` behind the vocabulary and the texts ``before`` it.

    The vocabulary's one-word macros are put in place here, so that the text is plain Metal to every
    reader, checkers of address spaces among them.
    """
    vocabulary = read("metal_kernels/vocabulary.h")
    functions, _, body = read(f"metal_kernels/{name}.metal").partition(_BODY)
    header = "\n".join([vocabulary, *before, functions])
    for word, meaning in re.findall(r"^#define (\w+) (\w+)$", vocabulary, re.MULTILINE):
        header = header.replace(f"#define {word} {meaning}\n", "")
        header, body = (re.sub(rf"\b{word}\b", meaning, text) for text in (header, body))
    return KernelText(header + "\n", body)


def boundaries_text(bits: int) -> str:
    """The table ``BOUNDARIES``: where the nearest magnitude of a codebook changes."""
    limits = codebook.boundaries(bits).tolist()
    # Nine digits give back every float32.
    listed = ", ".join(f"{limit:.8e}f" for limit in limits)
    return f"CONSTANT float BOUNDARIES[{len(limits)}] = {{{listed}}};\n"


# ---- rotations ----------------------------------------------------------------------------------


class _Step(NamedTuple):
    """One call of ``turn_stage``: a block type of rotation.h; coefficients, one row a group."""

    block: str
    start: int
    stride: int
    outer: int
    coefficients: Floats


def rotation_text(rotation: Rotation) -> str:
    """The functions ``rotate_row`` and ``unrotate_row`` of a row in threadgroup memory.

    It depends on the rotation's name and head_dim only; the rest is in the coefficients.
    """
    turns, turns_back, offset = [], [], 0
    for step in _steps(rotation):
        arguments = f"{step.block}, LANES, {step.start}, {step.stride}, {step.outer}"
        row = f"(row, coefficients + {offset}, lane);"
        turns.append(f"turn_stage<{arguments}, false>{row}")
        turns_back.append(f"turn_stage<{arguments}, true>{row}")
        offset += step.coefficients.size
    if not rotation.stages and rotation.name != "identity":
        turns = turns_back = [
            f"turn_by_matrix<LANES, {rotation.head_dim}>(row, coefficients, lane);"
        ]
    return _function("rotate_row", turns) + _function("unrotate_row", turns_back[::-1])


def _function(name: str, calls: list[str]) -> str:
    lines = "".join(f"  {call}\n" for call in calls)
    return (
        f"template <int LANES>\nDEVICE_FN void {name}(\n"
        f"    THREADGROUP float* row, GLOBAL const float* coefficients, uint lane) {{\n{lines}}}\n"
    )


@cache
def coefficients(rotation: Rotation, *, back: bool = False) -> mx.array:
    """What ``rotate_row``, or with ``back`` ``unrotate_row``, reads: float32.

    The coefficients of all stages, or a matrix ``[D, D]`` that rows are multiplied by. At least 8
    numbers, because MLX binds fewer to another address space.
    """
    if rotation.stages:
        flat = np.concatenate([step.coefficients.ravel() for step in _steps(rotation)])
    elif rotation.name == "identity":
        flat = np.zeros(8)
    else:
        matrix = np.linalg.inv(rotation.matrix) if back else rotation.matrix
        flat = matrix.T.ravel()
    return mx.array(flat.astype(np.float32))


def _steps(rotation: Rotation) -> list[_Step]:
    steps = []
    for index, stage in enumerate(rotation.stages):
        blocks = stage.blocks.reshape(-1, stage.radix, stage.radix)
        if rotation.name == "hadamard":
            signs = _signs_before(blocks)
            if index == 0:
                steps.append(_Step("Signs", 0, 1, rotation.head_dim, signs.ravel()))
            if stage.radix in (2, 4):
                block, numbers = f"Walsh{stage.radix}", np.zeros(0)
            else:
                block, numbers = f"Odd{stage.radix}", np.ones(signs.shape)
        else:
            block, numbers = _block(rotation, stage, blocks)
        steps.append(_Step(block, stage.start, stage.stride, stage.outer, numbers))
    return steps


def _block(rotation: Rotation, stage: Stage, blocks: Floats) -> tuple[str, Floats]:
    """The block type of a stage and its coefficients, read off its matrices ``[groups, r, r]``."""
    if stage.radix == 4:
        return "Left", blocks[:, :, 0]
    if stage.radix == 2:
        return "Plane", blocks[:, :, 0]
    if rotation.name == "rotor3":
        return "Sandwich", _rotors_of_sandwiches(blocks)
    return f"Odd{stage.radix}", _mirror_signs(blocks)


def _mirror_signs(blocks: Floats) -> Floats:
    """The signs t of blocks ``diag(t) E diag(t)``, up to a common one, which cancels."""
    return np.sign(blocks[:, 0, :] * _plain_row(blocks.shape[-1]))


def _signs_before(blocks: Floats) -> Floats:
    """The signs s of blocks ``E diag(s)`` of the rotation ``hadamard``."""
    radix = blocks.shape[-1]
    return np.sign(blocks[:, 0, :] * (1.0 if radix in (2, 4) else _plain_row(radix)))


def _plain_row(radix: int) -> Floats:
    """The signs of the first row of an odd block E."""
    return {
        3: np.array([-1.0, 1, 1]),
        5: np.array([1.0, -1, -1, -1, -1]),
        7: np.array([1.0, -1, -1, 1, -1, 1, 1]),
    }[radix]


def _rotors_of_sandwiches(m: Floats) -> Floats:
    """The rotors (a, b, c, d), up to sign, of sandwich matrices ``[groups, 3, 3]``.

    The products of two coefficients are sums of entries; the row of the largest square gives them.
    """
    aa = 1 + m[:, 0, 0] + m[:, 1, 1] + m[:, 2, 2]
    bb = 1 - m[:, 0, 0] - m[:, 1, 1] + m[:, 2, 2]
    cc = 1 - m[:, 0, 0] + m[:, 1, 1] - m[:, 2, 2]
    dd = 1 + m[:, 0, 0] - m[:, 1, 1] - m[:, 2, 2]
    ab, cd = m[:, 0, 1] - m[:, 1, 0], -m[:, 0, 1] - m[:, 1, 0]
    ac, bd = m[:, 0, 2] - m[:, 2, 0], m[:, 0, 2] + m[:, 2, 0]
    ad, bc = m[:, 1, 2] - m[:, 2, 1], -m[:, 1, 2] - m[:, 2, 1]
    rows = [[aa, ab, ac, ad], [ab, bb, bc, bd], [ac, bc, cc, cd], [ad, bd, cd, dd]]
    products = np.array(rows).transpose(2, 0, 1)  # [groups, 4, 4], 4 times each product
    largest = np.argmax(np.stack([aa, bb, cc, dd], -1), -1)
    chosen = products[np.arange(len(m)), largest]
    return chosen / np.linalg.norm(chosen, axis=-1, keepdims=True)
