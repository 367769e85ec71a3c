"""nvcc compiles the kernels as torch has them compiled, within budgets of registers and of
instructions: in the loop that reads the cache, and all the way through ``encode``.
"""

import re
import shutil
import subprocess
from typing import NamedTuple

import pytest

from rotormlx.kernels import cuda_plan
from rotormlx.torch.build import TORCH_FLAGS, Configuration
from tests.support.cuda_calls import KERNELS
from tests.support.sass import disassembler, hot_loop, kernel_blocks, loops_of, way_through

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

WIDTHS = (2, 3, 4, 8)
# Registers of a thread at head_dim 128; none is spilled. A multiprocessor has
# 65,536: with 128 threads in a block, 168 let three blocks of attend run at once, and 255 two.
# Blocks of 256 threads: 128 let two run, 80 three.
BUDGETS = {
    "attend<1>": 168,
    "attend<2>": 255,
    "attend_float": 168,
    # Of a matrix, 32 loads of 16 bytes are under way at once where a row is done by itself.
    "attend_query<1>": 168,
    "attend_query<8>": 96,
    "attend_merge<1>": 168,
    "attend_merge<8>": 96,
    "encode<KeyCodec>": 80,
    "encode<ValueCodec>": 80,
    "decode<KeyCodec>": 80,
    "decode<ValueCodec>": 80,
    "rotor3": 64,
    # Few thread blocks a step, of which one in 64 packs.
    "store_step": 128,
}
# Instructions of a thread for one code, where attend<1> reads a block of 64 tokens that all query
# rows see: on sm_90a, at head_dim 128.
INSTRUCTIONS = {2: 2.6, 3: 3.36, 4: 2.7, 8: 4.5}
CODES_OF_LANE = 64 * 128 * 2 // 32


class EncodeBudget(NamedTuple):
    """Instructions of a thread of ``encode`` on sm_90a, at head_dim 128.

    Attributes:
        per_code: For one of its 32 codes, the path of a trellis apart.
        shuffles, global_loads, shared_loads: Of these kinds, there too.
        step: In the loop forward along a path, for one position; a thread has half a sequence.
    """

    per_code: float
    shuffles: int
    global_loads: int
    shared_loads: int
    step: float = 0


# Keys have 35 shuffles more than values, for the mean.
ENCODE = {
    ("Key", 2): EncodeBudget(55.5, 67, 52, 130, 58),
    ("Value", 2): EncodeBudget(46, 32, 52, 128, 61),
    ("Key", 3): EncodeBudget(59, 67, 52, 162, 77),
    ("Value", 3): EncodeBudget(49, 32, 52, 160, 81),
    ("Key", 4): EncodeBudget(66.5, 67, 52, 98),
    ("Value", 4): EncodeBudget(56.5, 32, 52, 96),
    ("Key", 8): EncodeBudget(64.5, 67, 54, 130),
    ("Value", 8): EncodeBudget(54, 32, 54, 128),
}


def compiled(folder, architecture, *, head_dim, bits, rotation="cascade", more=()):
    """Registers and bytes of stack of each kernel, as ptxas reports them; ``more`` are flags."""
    configuration = Configuration(rotation, head_dim, head_dim, *bits, architecture)
    for name, text in configuration.headers().items():
        (folder / name).write_text(text)
    command = ["nvcc", "-std=c++17", "-Xptxas", "-v", "-cubin"]
    command += [*TORCH_FLAGS, *configuration.cuda_flags(), *more]
    command += [f"-I{folder}", str(KERNELS / "launch.cu"), "-o", str(folder / "launch.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Nothing is said but what ptxas was asked for.
    said = [line for line in done.stderr.splitlines() if line and "ptxas info" not in line]
    assert [line for line in said if "bytes stack frame" not in line] == []
    # An array that is not in registers lies in the stack frame, as do registers that are spilled.
    reports = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return {readable(name): (int(used), int(stack)) for name, stack, used in reports}


def readable(mangled):
    """``attend<1>`` or ``encode<KeyCodec>`` for the mangled name of a kernel in the unnamed
    namespace.
    """
    names = ("attend_float", "attend_query", "attend_merge", "attend", "encode", "decode")
    for name in (*names, "store_step"):
        if found := re.search(
            rf"{len(name)}{name}(?:ILi(\d+)E|IN\w*?\d((?:Key|Value)Codec)E)?E", mangled
        ):
            argument = found[1] or found[2]
            return f"{name}<{argument}>" if argument else name
    return "rotor3"


def budgets(architecture, bits):
    """Registers of each kernel on a kind of GPU."""
    allowed = dict(BUDGETS)
    if architecture == "sm_80" and bits == (8, 8):
        allowed["attend<1>"] = 255  # two blocks: shared memory has no room for a third
    if architecture == "sm_80" and bits[1] == 3:
        allowed["encode<ValueCodec>"] = 128  # two blocks: three would spill
    return allowed


@pytest.mark.parametrize(
    ("architecture", "bits"),
    [
        *(("sm_90a", (bits, bits)) for bits in WIDTHS),
        # A build takes half a minute: keys of 4 bits and values of 3 share one.
        *(("sm_80", (4, 3)), ("sm_80", (8, 8)), ("sm_100a", (4, 3))),
    ],
    ids=str,
)
def test_registers_are_within_their_budget(architecture, bits, tmp_path, figure):
    found = compiled(tmp_path, architecture, head_dim=128, bits=bits)
    allowed = budgets(architecture, bits)
    assert found.keys() == allowed.keys()
    over = {
        name: (used, stack)
        for name, (used, stack) in found.items()
        if stack or used > allowed[name]
    }
    assert over == {}
    used = ", ".join(f"{name} {found[name][0]}" for name in ("attend<1>", "attend<2>"))
    figure(
        f"CUDA registers of a thread on {architecture}, keys of {bits[0]} and values of "
        f"{bits[1]} bits, head_dim 128: {used}; none spilled"
    )
    if architecture == "sm_90a":
        check_instructions(tmp_path / "launch.cubin", bits[0], figure)
        for role in ("Key", "Value"):
            check_encode_instructions(tmp_path / "launch.cubin", role, bits[0], figure)


def check_instructions(cubin, bits, figure):
    """The loop of attend<1> that reads the cache is within its budget of instructions."""
    if disassembler() is None:
        pytest.skip("nvdisasm is not installed: the package nvidia-cuda-nvdisasm")
    loop = hot_loop(kernel_blocks(cubin, "attendILi1E"))
    # Keys and values, 64 tokens x 128, by products of 16 x 16.
    assert sum(name.startswith("HMMA") for name in loop) == 2 * 64 * 128 // 16**2
    per_code = len(loop) / CODES_OF_LANE
    figure(
        f"CUDA instructions of a thread for one code on sm_90a, {bits} bits, head_dim 128: "
        f"{per_code:.2f}"
    )
    assert per_code <= INSTRUCTIONS[bits]


def check_encode_instructions(cubin, role, bits, figure):
    """All that a warp does in ``encode``, the path of a trellis apart, is within its budget: rows
    of 16 bits, without a channel scale, and none of what only some warps do.
    """
    blocks = kernel_blocks(cubin, f"encodeINS_{len(role) + 5}{role}Codec")
    way = way_through(
        blocks,
        must=lambda block: block.count("BAR.SYNC") > 0,
        # Rows of float32 take eight loads of 16 bytes; slow divisions are for subnormal numbers.
        may=lambda block: block.count("LDG.E.128") < 8 and block.count("CALL") == 0,
    )
    kinds = [sum(name.startswith(kind) for name in way) for kind in ("SHFL", "LDG", "LDS")]
    per_code = len(way) / (64 * 128 / 256)
    steps = [
        # Four positions at once, with two shuffles each and one for two.
        len(loop) / 4
        for loop in loops_of(blocks)
        if sum(name.startswith("SHFL") for name in loop) == 10
    ]
    found = EncodeBudget(per_code, *kinds, *steps)
    path = f", and {found.step:.1f} for a step of a path" if steps else ""
    figure(
        f"CUDA instructions of a thread of encode for one code of a {role.lower()} on sm_90a, "
        f"{bits} bits, head_dim 128: {per_code:.1f}{path}"
    )
    over = [
        name
        for name, count, most in zip(found._fields, found, ENCODE[role, bits], strict=True)
        if count > most
    ]
    assert over == [], found
    assert bool(steps) == (bits < 4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_three_thread_blocks_fit_a_multiprocessor(bits):
    """Of an H100, with 227 KiB of shared memory, as calls are planned."""
    assert cuda_plan.part_shared_bytes(128, 128, bits, bits, 1) <= 75 * 1024


@pytest.mark.parametrize(
    ("head_dim", "bits", "rotation"),
    [(80, (2, 3), "rotor3"), (256, (8, 3), "hadamard"), (64, (4, 4), "dense")],
    ids=str,
)
def test_other_configurations_compile(head_dim, bits, rotation, tmp_path):
    choices = {"head_dim": head_dim, "bits": bits, "rotation": rotation}
    # Optimising is most of the time of a build, and registers are not counted here.
    found = compiled(tmp_path, "sm_90a", **choices, more=["-Xcicc", "-O0", "-Xptxas", "-O0"])
    assert found.keys() == BUDGETS.keys()
