"""Reads the sources of the kernels, and generates the parts that depend on the codec.

A file of ``metal_kernels/`` holds device functions and, after the line ``// kernel body``, the
source argument of ``mx.fast.metal_kernel``. Device code that all platforms share is in
``shared_kernels/``. Both folders are beside the package in the repository, and inside the package
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
        RuntimeError: If the file is missing from the installation.
    """
    return _place(path).read_text(encoding="utf-8")


def folder(name: str) -> Path:
    """Return a folder of kernels, beside the package in the repository and inside it in a wheel.

    Raises:
        RuntimeError: If the folder is missing from the installation.
    """
    return _place(name)


def _place(name: str) -> Path:
    for parent in (_PACKAGE, _PACKAGE.parent):
        if (parent / name).exists():
            return parent / name
    raise RuntimeError(
        f"[kernels] {name} must be in {_PACKAGE} or beside it, but it is missing; "
        "reinstall rotormlx."
    )


def metal_text(name: str, *before: str) -> KernelText:
    """Return a kernel of ``metal_kernels/`` after the vocabulary and the texts ``before``.

    The vocabulary's one-word macros are expanded here, so the text is plain Metal for every tool
    that reads it, such as the tests' check of address spaces.
    """
    vocabulary = read("metal_kernels/vocabulary.h")
    functions, _, body = read(f"metal_kernels/{name}.metal").partition(_BODY)
    header = "\n".join([vocabulary, *before, functions])
    for word, meaning in re.findall(r"^#define (\w+) (\w+)$", vocabulary, re.MULTILINE):
        header = header.replace(f"#define {word} {meaning}\n", "")
        header, body = (re.sub(rf"\b{word}\b", meaning, text) for text in (header, body))
    return KernelText(header + "\n", body)


def boundaries_text(bits: int) -> str:
    """Return the table ``BOUNDARIES``: the boundaries between magnitudes of a codebook."""
    limits = codebook.boundaries(bits).tolist()
    # Nine significant digits represent every float32 exactly.
    listed = ", ".join(f"{limit:.8e}f" for limit in limits)
    return f"CONSTANT float BOUNDARIES[{len(limits)}] = {{{listed}}};\n"


# Cells per unit of |z|. They are narrow enough that none holds two boundaries of 8 bits.
_CELLS_OF_UNIT = 64


def cells_text(bits: int) -> str:
    """Return the table ``CELLS`` of CUDA at 8 bits: two words per cell of |z|.

    The words are the boundary in the cell (infinity if there is none) and the number of boundaries
    below the cell. The cell of a size is ``size * CELLS_OF_UNIT``, rounded; sizes beyond the last
    cell belong to the last cell. At other bits, the table is a placeholder.
    """
    if bits != 8:
        return "constexpr int CELL_COUNT = 0;\nCONSTANT uint2 CELLS[1] = {{0u, 0u}};\n"
    limits = codebook.boundaries(bits)
    # Ties round to even, as in the float32 addition on the GPU.
    cells = np.rint(limits * np.float32(_CELLS_OF_UNIT)).astype(int)
    count = int(cells[-1]) + 2
    table = np.empty((count, 2), np.uint32)
    table[:, 0] = np.float32(np.inf).view(np.uint32)
    table[cells, 0] = limits.view(np.uint32)
    table[:, 1] = np.searchsorted(cells, np.arange(count))
    listed = ", ".join(f"{{0x{limit:X}u, {below}u}}" for limit, below in table.tolist())
    return f"constexpr int CELL_COUNT = {count};\nCONSTANT uint2 CELLS[{count}] = {{{listed}}};\n"


# ---- rotations ----------------------------------------------------------------------------------


# Neighbouring channels per lane in the first stages on CUDA. Every number of lanes divides it, so
# groups that otherwise extend across lanes are within one lane.
NEIGHBOURS = 16


def lanes_of_row(rotation: Rotation) -> int:
    """Return the number of lanes that share a row, at most 16.

    It is the largest number with which each group of each stage has its channels either in
    neighbouring lanes or all in one lane.
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
    """Return the template arguments that assign channels to lanes; see ``LaneRow``."""
    return [
        ("D", rotation.head_dim),
        ("LANES", lanes_of_row(rotation)),
        ("HELD", _held(rotation)),
    ]


def matrices(rotation: Rotation) -> int:
    """Return K if every KV head has its own matrix, else 1."""
    return len(rotation.matrix) if rotation.is_per_head else 1


def rotation_text(rotation: Rotation) -> str:
    """Return the functions ``rotate_rows`` and ``unrotate_rows`` for rows in registers.

    The text depends only on the rotation's name and head_dim; the rest is in the coefficients.
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
    """Return the same rotation as two functions, ``rotate_near`` and ``rotate_far``.

    The first runs the stages whose groups extend across lanes in ``rotate_rows``; each lane holds
    ``NEIGHBOURS`` neighbouring channels there. The second runs the other stages.
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
    """Return the call of rotation.h that runs a stage, up to its last template argument."""
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
    """Return the neighbouring channels per lane: triples must not be split between lanes."""
    return 3 if rotation.name == "rotor3" else 1


def _function(name: str, calls: list[str]) -> str:
    lines = "".join(f"  {call}\n" for call in calls)
    return (
        f"template <int LANES, int ROWS>\nDEVICE_FN void {name}(\n"
        f"    THREAD float* rows, GLOBAL const float* coefficients, uint lane) {{\n{lines}}}\n"
    )


def metal_rotation(name: str, rotation: Rotation) -> str:
    """Return the type ``name`` that metal_kernels/rows.h uses to rotate rows.

    The text depends only on the rotation's name and head_dim.
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
    """Return the header ``key_rotation.h`` or ``value_rotation.h`` of ``cuda_kernels/launch.cu``.

    The text depends only on the codec's role and bits, and on the rotation's name and head_dim.
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

    The result holds the coefficients of all stages, or the matrix that rows are multiplied by:
    ``[D, D]``, or ``[K, D, D]`` with one per KV head. It has at least 8 numbers, because MLX binds
    smaller arrays to another address space.
    """
    if rotation.stages:
        numbers = np.concatenate([stage.coefficients.ravel() for stage in rotation.stages])
    elif rotation.name == "identity":
        numbers = np.zeros(8)
    else:
        numbers = np.swapaxes(rotation.inverse if back else rotation.matrix, -1, -2)
    return np.ascontiguousarray(numbers, np.float32)
