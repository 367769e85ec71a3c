"""Instructions of the loop over words of Metal's attention, as clang compiles it for another GPU.

Apple's compiler is not here. Clang's for AMD counts the same work: loads, shifts, selects.
"""

import re
import shutil
import subprocess

import pytest

from rotormlx.codec.rotation import rotation
from rotormlx.kernels.source import metal_rotation
from rotormlx.mlx.backends import metal_attend
from rotormlx.mlx.backends.metal_attend import WAYS
from tests.emulator import toolchain
from tests.emulator.lint import COMPILER, LANGUAGE

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="clang-19 is not installed")

HEAD_DIM, ROWS, PLACES = 128, 4, 4
# Codes that a word counts for, by bits.
CODES = {2: 16, 3: 16, 4: 8, 8: 4}
# Of a code for all query rows, besides the multiply-adds of its sums.
BUDGETS = {
    **{(2, "quad"): 5.1, (2, "arithmetic"): 8.1, (2, "table"): 4.6},
    **{(3, "quad"): 9.4, (3, "arithmetic"): 11.3, (3, "table"): 5.2},
    **{(4, "quad"): 8.5, (4, "arithmetic"): 11.8, (4, "table"): 3.55},
    (8, "table"): 2.9,
}

# What lint.h only declares.
MEANINGS = """
namespace metal {
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// One instruction, as on Apple's GPUs.
template <> inline uint quad_shuffle(uint x, ushort lane) {
  return __builtin_amdgcn_ds_bpermute(lane, x);
}
}  // namespace metal
template <> inline float as_type<float, uint>(uint x) { return __builtin_astype(x, float); }
template <> inline uint as_type<uint, float>(float x) { return __builtin_astype(x, uint); }
"""

KERNEL = """
__kernel void words_loop(__global const uint* words, __global float* numbers, uint first) {
  using Rows = typename Neighbours<float, ROWS>::type;
  using Way = Lookup<BITS, WAY>;
  __local float memory[Way::FLOATS];
  __local float factors[DIM * ROWS];
  const uint id = __builtin_amdgcn_workitem_id_x();
  float sums[PLACES * ROWS];
  for (uint i = 0; i < PLACES * ROWS; ++i) sums[i] = numbers[i];
  for (uint i = id; i < DIM * ROWS; i += 64) factors[i] = numbers[i + 99];
  const Way levels = Way::make(memory, id, 64);
  __builtin_amdgcn_s_barrier();
  add_levels<BITS, DIM, 64, ROWS, ROWS, PLACES>(
      words, first + id * PLACES, levels, (__local const Rows*)factors, sums);
  for (uint i = 0; i < PLACES * ROWS; ++i) numbers[id * PLACES * ROWS + i] = sums[i];
}
"""


def compiled(bits, way):
    """Lines of assembly of a kernel that is the loop over the words of a block of keys."""
    turned = rotation("cascade", HEAD_DIM)
    types = (metal_rotation(name, turned) for name in ("KeyRotation", "ValueRotation"))
    functions = metal_attend._text("attend", *types, lookup=True).header
    kernel = KERNEL
    numbers = {"BITS": bits, "WAY": WAYS.index(way), "DIM": HEAD_DIM}
    for name, number in {**numbers, "ROWS": ROWS, "PLACES": PLACES}.items():
        kernel = re.sub(rf"\b{name}\b", str(number), kernel)
    target = ["-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1030", "-nogpulib", "-O2", "-S", "-w"]
    done = subprocess.run(
        [COMPILER, *LANGUAGE, *target, f"-I{toolchain.HERE / 'msl'}", "-o", "-", "-"],
        input=f'#include "lint.h"\n{MEANINGS}{functions}{kernel}',
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def longest_loop(lines):
    """The instructions of the longest run of lines that ends with a jump to its begin."""
    labels = {line.split(":")[0]: n for n, line in enumerate(lines) if line.startswith(".LBB")}
    loops = [[]]
    for n, line in enumerate(lines):
        jump = re.match(r"\ts_c?branch\w* (\.LBB\w+)", line)
        if jump and labels[jump[1]] < n:
            loops.append(lines[labels[jump[1]] : n + 1])
    (_, loop) = max((len(loop), loop) for loop in loops)
    found = re.findall(r"^\t([a-z]\w+)", "\n".join(loop), re.MULTILINE)
    return [name for name in found if not name.startswith(("s_waitcnt", "s_clause", "s_nop"))]


@pytest.mark.parametrize(("bits", "way"), BUDGETS)
def test_a_code_costs_no_more_than_its_budget(bits, way):
    instructions = longest_loop(compiled(bits, way))
    codes = CODES[bits] * PLACES
    multiply_adds = sum(name.startswith("v_fma") for name in instructions)
    assert multiply_adds >= codes * ROWS
    assert (len(instructions) - codes * ROWS) / codes <= BUDGETS[bits, way]
