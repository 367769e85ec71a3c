"""Reads the sources of the kernels, and generates the parts that depend on the codec.

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

import numpy as np
import numpy.typing as npt

from rotormlx.codec import codebook
from rotormlx.codec.derived import derived
from rotormlx.codec.format import Codec
from rotormlx.codec.rotation import Rotation, Stage

Float32s = npt.NDArray[np.float32]

_PACKAGE = Path(__file__).parent.parent
_BODY = "\n// kernel body\n"


class KernelText(NamedTuple):
    """The two texts of ``mx.fast.metal_kernel``: device functions, and the kernel body."""

    header: str
    source: str


@cache
def read(path: str) -> str:
    """Return the text of a file such as ``shared_kernels/rotation.h``.

    Raises:
        RuntimeError: If the installation lacks it.
    """
    return _place(path).read_text(encoding="utf-8")


def folder(name: str) -> Path:
    """A folder of kernels, beside the package in the repository and inside it in a wheel.

    Raises:
        RuntimeError: If the installation lacks it.
    """
    return _place(name)


def _place(name: str) -> Path:
    for parent in (_PACKAGE, _PACKAGE.parent):
        if (parent / name).exists():
            return parent / name
    raise RuntimeError(
        f"[kernels] {name} must lie in {_PACKAGE} or beside it, but it does not; "
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


# Cells of a unit, so narrow that none holds two boundaries of 8 bits.
_CELLS_OF_UNIT = 64


def cells_text(bits: int) -> str:
    """The table ``CELLS`` of CUDA at 8 bits, a pair of words per cell of |z|.

    They are the boundary in the cell, infinite where there is none, and how many lie below the
    cell. A size lies in cell ``size * CELLS_OF_UNIT``, rounded; all behind the last share it.
    """
    if bits != 8:
        return "constexpr int CELL_COUNT = 0;\nCONSTANT uint2 CELLS[1] = {{0u, 0u}};\n"
    limits = codebook.boundaries(bits)
    # To an even number at a tie, as an addition in float32 rounds on the GPU.
    cells = np.rint(limits * np.float32(_CELLS_OF_UNIT)).astype(int)
    count = int(cells[-1]) + 2
    table = np.empty((count, 2), np.uint32)
    table[:, 0] = np.float32(np.inf).view(np.uint32)
    table[cells, 0] = limits.view(np.uint32)
    table[:, 1] = np.searchsorted(cells, np.arange(count))
    listed = ", ".join(f"{{0x{limit:X}u, {below}u}}" for limit, below in table.tolist())
    return f"constexpr int CELL_COUNT = {count};\nCONSTANT uint2 CELLS[{count}] = {{{listed}}};\n"


# ---- rotations ----------------------------------------------------------------------------------


# Neighbouring channels of a lane where CUDA does the first stages. Any number of lanes divides it,
# so groups that lie across lanes elsewhere lie in one lane there.
NEIGHBOURS = 16


def lanes_of_row(rotation: Rotation) -> int:
    """Lanes that share a row, at most 16.

    As many as leave each group of each stage either within these lanes or within one of them.
    """
    if _held(rotation) > 1:
        return 16
    return next(
        lanes
        for lanes in (16, 8, 4)
        if rotation.head_dim % lanes == 0
        and all(
            lanes % (stage.radix * stage.stride) == 0 or stage.stride % lanes == 0
            for stage in rotation.stages
        )
    )


def row_template(rotation: Rotation) -> list[tuple[str, int]]:
    """The template arguments that say which lane has which channels; see ``LaneRow``."""
    return [
        ("D", rotation.head_dim),
        ("LANES", lanes_of_row(rotation)),
        ("HELD", _held(rotation)),
    ]


def matrices(rotation: Rotation) -> int:
    """Return K if every KV head has its own matrix, else 1."""
    return len(rotation.matrix) if rotation.is_per_head else 1


def rotation_text(rotation: Rotation) -> str:
    """The functions ``rotate_rows`` and ``unrotate_rows`` of rows in registers.

    It depends on the rotation's name and head_dim only; the rest is in the coefficients.
    """
    rotations, unrotations, offset = [], [], 0
    for stage in rotation.stages:
        call = _stage_call(rotation, stage)
        arguments = f"(rows, coefficients + {offset}, lane);"
        rotations.append(f"{call}, false>{arguments}")
        unrotations.append(f"{call}, true>{arguments}")
        offset += stage.coefficients.size
    if not rotation.has_stages:
        rotations = unrotations = [_product_call(rotation)]
    return _function("rotate_rows", rotations) + _function("unrotate_rows", unrotations[::-1])


def split_rotation_text(rotation: Rotation) -> str:
    """The same rotation in two functions, ``rotate_near`` and ``rotate_far``.

    The first does the stages that lie across lanes in ``rotate_rows``, for lanes with
    ``NEIGHBOURS`` neighbouring channels each; the second does the others.
    """
    lanes, offset = lanes_of_row(rotation), 0
    near, far = [], []
    for stage in rotation.stages:
        arguments = f"false>(rows, coefficients + {offset}, lane);"
        offset += stage.coefficients.size
        if _held(rotation) == 1 and stage.stride < lanes:
            near.append(
                f"rotate_neighbours<{stage.kind}, {rotation.head_dim}, LANES, {NEIGHBOURS}, ROWS, "
                f"{stage.stride}, {arguments}"
            )
        else:
            far.append(f"{_stage_call(rotation, stage)}, {arguments}")
    if not rotation.has_stages:
        far = [_product_call(rotation)]
    return _function("rotate_near", near) + _function("rotate_far", far)


def _product_call(rotation: Rotation) -> str:
    return f"rotate_by_matrix<{rotation.head_dim}, LANES, ROWS>(rows, coefficients, lane);"


def _stage_call(rotation: Rotation, stage: Stage) -> str:
    """The function of rotation.h that does a stage, up to its last template argument."""
    if (held := _held(rotation)) > 1:
        lanes = lanes_of_row(rotation)
        channels = held * -(-rotation.head_dim // (lanes * held))
        return (
            f"rotate_held<{stage.kind}, {channels}, LANES, {held}, ROWS, "
            f"{stage.start // held}, {stage.outer}"
        )
    where = "across_lanes" if stage.stride < lanes_of_row(rotation) else "in_lanes"
    return f"rotate_{where}<{stage.kind}, {rotation.head_dim}, LANES, ROWS, {stage.stride}"


def _held(rotation: Rotation) -> int:
    """Neighbouring channels of a lane: threes must not be split, powers of two may be."""
    return 3 if rotation.name == "rotor3" else 1


def _function(name: str, calls: list[str]) -> str:
    lines = "".join(f"  {call}\n" for call in calls)
    return (
        f"template <int LANES, int ROWS>\nDEVICE_FN void {name}(\n"
        f"    THREAD float* rows, GLOBAL const float* coefficients, uint lane) {{\n{lines}}}\n"
    )


def metal_rotation(name: str, rotation: Rotation) -> str:
    """The type of this name that metal_kernels/rows.h asks to rotate rows.

    It depends on the rotation's name and head_dim only.
    """
    methods = "".join(
        f"  template <int ROWS>\n  static DEVICE_FN void {method}(\n"
        "      THREAD float* rows, GLOBAL const float* coefficients, uint lane) {\n"
        f"    in_{name}::{method}_rows<LANES, ROWS>(rows, coefficients, lane);\n  }}\n"
        for method in ("rotate", "unrotate")
    )
    return (
        f"namespace in_{name} {{\n{rotation_text(rotation)}}}\nstruct {name} {{\n"
        f"  enum {{\n    D = {rotation.head_dim}, LANES = {lanes_of_row(rotation)}, "
        f"HELD = {_held(rotation)}, HAS_STAGES = {int(rotation.has_stages)}\n  }};\n{methods}}};\n"
    )


def cuda_header(codec: Codec) -> str:
    """The header ``key_rotation.h`` or ``value_rotation.h`` of ``cuda_kernels/launch.cu``.

    It depends on the codec's role and bits and on the rotation's name and head_dim.
    """
    lanes, held = lanes_of_row(codec.rotation), _held(codec.rotation)
    return (
        f"namespace {codec.role}_rotation {{\nconstexpr int LANES = {lanes}, HELD = {held};\n"
        f"constexpr int NEIGHBOURS = {NEIGHBOURS}, CELLS_OF_UNIT = {_CELLS_OF_UNIT};\n"
        f"constexpr bool HAS_STAGES = {str(codec.rotation.has_stages).lower()};\n"
        f"{boundaries_text(codec.bits)}{cells_text(codec.bits)}{rotation_text(codec.rotation)}"
        f"{split_rotation_text(codec.rotation)}}}\n"
    )


@derived
def coefficients(rotation: Rotation, *, back: bool = False) -> Float32s:
    """Return the coefficients of ``rotate_rows``, or of ``unrotate_rows`` if ``back``.

    The coefficients of all stages, or the matrix ``[D, D]`` that rows are multiplied by, or one for
    each KV head, ``[K, D, D]``. At least 8 numbers, because MLX binds fewer to another address
    space.
    """
    if rotation.stages:
        numbers = np.concatenate([stage.coefficients.ravel() for stage in rotation.stages])
    elif rotation.name == "identity":
        numbers = np.zeros(8)
    else:
        numbers = np.swapaxes(rotation.inverse if back else rotation.matrix, -1, -2)
    return np.ascontiguousarray(numbers, np.float32)
