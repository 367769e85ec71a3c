"""A model of the machine: instructions of a Metal kernel, counted on a GPU that stands for Apple's.

Nobody outside Apple's compiler sees its instructions, so clang compiles the text that MLX would
hand to it for AMD's RDNA 2: like Apple's GPU it runs 32 lanes at once, has instructions of one lane
for everything here, loads of 1 to 16 bytes, and 32-bit registers. It may use as many of them as a
thread has on Apple's GPU, 128 (dougallj.github.io/applegpu). What Apple's GPU has instructions of
its own for (``simd_sum``, shuffles, ``exp``) counts as one. What is spilled, and the instructions
that it needs for 64-bit numbers, are estimates for Apple's.
"""

import re
import subprocess
from collections import Counter
from typing import NamedTuple

from tests.emulator import msl_text, toolchain
from tests.emulator.lint import COMPILER

# Of a thread, 32 bits each.
REGISTERS = 128
_FLAGS = (
    *("-xclcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-O3", "-ffast-math", "-S", "-o", "-"),
    *("-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_int64,+__opencl_c_generic_address_space"),
    *("-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1030", "-nogpulib", "-w"),
    *("-mllvm", "-amdgpu-early-inline-all=true", "-mllvm", "-amdgpu-function-calls=false"),
)
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w+)\s*(.*?)\s*(?:;.*)?$")
_METAL = re.compile(r"^\s*; metal (\w+)")
# What Apple's GPU needs no instruction for: waits, and hints to the processor.
_NOTHING = ("s_waitcnt", "s_nop", "s_inst_prefetch", "s_clause", "s_barrier", "s_code_end")
# Kinds of instructions by how their names begin; the first that fits counts.
_KINDS = (
    ("fma", r"v_(pk_)?fmac?_"),
    ("device loads", r"(global|flat|s)_load"),
    ("device stores", r"(global|flat)_store"),
    ("threadgroup loads", r"ds_read"),
    ("threadgroup stores", r"ds_write"),
    ("spills", r"(buffer|scratch)_(load|store)"),
    ("branches", r"s_c?branch|s_setpc|s_endpgm"),
    ("barriers", r"(simdgroup_)?barrier"),
    ("64-bit", r"\w*_([iub]64|co_|co_ci_)"),
    ("moves", r"[vs]_mov_"),
    ("float", r"v_\w+_f(16|32)"),
    ("integer", r"[vs]_"),
)
_BYTES = {"ubyte": 1, "sbyte": 1, "u8": 1, "ushort": 2, "u16": 2, "short": 2}


class Compiled(NamedTuple):
    """A kernel's instructions.

    Attributes:
        blocks: Names of instructions that run in a row, in order.
        registers: 32-bit registers of a thread.
        spilled: Bytes of a thread that lie in memory for want of registers, or because an array is
            indexed by what the compiler does not know.
    """

    blocks: tuple[tuple[str, ...], ...]
    registers: int
    spilled: int


def compiled(text: str, name: str) -> Compiled:
    """Compile a kernel.

    Args:
        text: What MLX would hand to Apple's compiler: ``EmulatedKernel.metal_text(...)``.
        name: The kernel's function.

    Raises:
        CompilerMissingError: If clang-19 is not installed.
    """
    clang = toolchain.require_compiler(COMPILER, f"Install it: apt-get install {COMPILER}")
    parameters = msl_text.kernel_parameters(text, name)
    text = msl_text.share_threadgroup_variables(text, "LINT_SHARED_VARIABLE({name});")
    text = re.sub(r"^[ \t]*#[ \t]*include[ \t]*<metal\w*>", "", text, flags=re.MULTILINE)
    instance = re.search(r"\[\[kernel\]\]\s+decltype\((.*?)\)\s", text)
    # The instance that is called is made by the call.
    text = re.sub(r"^template \[\[host_name.*$", "", text, flags=re.MULTILINE)
    source = f'#include "machine.h"\n#line 1 "kernel"\n{text}\n'
    source += _called(instance[1] if instance else name, parameters)
    done = subprocess.run(
        [clang, *_FLAGS, f"-I{toolchain.HERE / 'msl'}", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"[machine] {COMPILER} failed: {done.stderr[:4000]}")
    body = done.stdout.split("\nmachine_entry:", 1)[1]
    code, _, facts = body.partition(".Lfunc_end")
    registers, spilled = (
        int(re.search(rf"; {name}: (\d+)", facts)[1]) for name in ("NumVgprs", "ScratchSize")
    )
    return Compiled(_blocks(code), registers, spilled)


def _called(instance: str, parameters: list[msl_text.Parameter]) -> str:
    """A kernel of OpenCL's kind that calls the function."""
    declared, passed = [], []
    for parameter in parameters:
        if parameter.is_attribute:
            passed.append(f"attribute::{parameter.attribute}()")
        else:
            declared.append(f"{parameter.type.replace('&', '*')} {parameter.name}")
            passed.append(f"{'*' if parameter.is_reference else ''}{parameter.name}")
    return (
        "#undef kernel\n"
        f"__kernel __attribute__((amdgpu_num_vgpr({REGISTERS}))) void machine_entry("
        f"{', '.join(declared)}) {{\n  {instance}({', '.join(passed)});\n}}\n"
    )


def _blocks(code: str) -> tuple[tuple[str, ...], ...]:
    blocks: list[list[str]] = [[]]
    for line in code.splitlines():
        if metal := _METAL.match(line):
            blocks[-1].append(metal[1])
        elif _LABEL.match(line):
            blocks.append([])
        elif (found := _INSTRUCTION.match(line)) and not found[1].startswith(_NOTHING):
            blocks[-1].append(found[1])
            if "branch" in found[1]:
                blocks.append([])
    return tuple(tuple(block) for block in blocks if block)


class Products(NamedTuple):
    """The body of a loop that multiplies numbers of the cache by those of the query rows.

    Attributes:
        what: ``"packed"`` or ``"exact"``, by what it loads.
        numbers: Of the cache, in a turn of a lane.
        kinds: Instructions by kind, and bytes that are loaded.
    """

    what: str
    numbers: int
    kinds: Counter[str]

    @property
    def beside(self) -> float:
        """Instructions that are no multiplication, for a number of the cache."""
        counted = sum(n for kind, n in self.kinds.items() if not kind.endswith("bytes"))
        return (counted - self.kinds["fma"]) / self.numbers


def products(compiled: Compiled, rows: int) -> list[Products]:
    """The bodies of the loops that take most of the time of attention, in order.

    Args:
        compiled: A kernel for few query rows.
        rows: Query rows of a KV head, which multiply each number once.
    """
    found = []
    for block in compiled.blocks:
        count = kinds(block)
        numbers = count["fma"] // rows
        # What rotates or merges has few products in a row, or none of numbers that all lanes share.
        if numbers >= 8 and count["threadgroup loads"]:
            what = "packed" if count["device bytes"] < 2 * numbers else "exact"
            found.append(Products(what, numbers, count))
    return found


def kinds(names: tuple[str, ...]) -> Counter[str]:
    """How many instructions there are of each kind, and bytes of a lane that they load."""
    count: Counter[str] = Counter()
    for name in names:
        kind = next((k for k, pattern in _KINDS if re.match(pattern, name)), "of lanes")
        count[kind] += 1
        if kind.endswith("loads"):
            count[kind.replace("loads", "bytes")] += _bytes(name)
    return count


def _bytes(name: str) -> int:
    for word, size in _BYTES.items():
        if word in name:
            return size
    wide = re.search(r"dwordx?(\d*)", name)
    if wide:
        return 4 * int(wide[1] or 1)
    bits = re.search(r"b(\d+)", name)
    size = int(bits[1]) // 8 if bits else 4
    return 2 * size if "read2" in name else size
