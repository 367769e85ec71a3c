"""nvcc compiles the kernels as torch has them compiled, within a budget of registers."""

import re
import shutil
import subprocess

import pytest

from rotormlx.torch.build import TORCH_FLAGS, Configuration
from tests.support.cuda_calls import KERNELS

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
# Registers of a thread at head_dim 128 and up to 4 bits; none is spilled. A multiprocessor has
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


def compiled(folder, architecture, *, head_dim, bits, rotation="cascade"):
    """Registers and bytes spilled of each kernel, as ptxas reports them."""
    configuration = Configuration(rotation, head_dim, head_dim, *bits, architecture)
    for name, text in configuration.headers().items():
        (folder / name).write_text(text)
    command = ["nvcc", "-std=c++17", "-Xptxas", "-v", "-cubin"]
    command += [*TORCH_FLAGS, *configuration.cuda_flags()]
    command += [f"-I{folder}", str(KERNELS / "launch.cu"), "-o", str(folder / "launch.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Nothing is said but what ptxas was asked for.
    said = [line for line in done.stderr.splitlines() if line and "ptxas info" not in line]
    assert [line for line in said if "bytes stack frame" not in line] == []
    reports = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return {readable(name): (int(used), int(spilled)) for name, spilled, used in reports}


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


@pytest.mark.parametrize(
    ("architecture", "bits"),
    [*((architecture, 4) for architecture in ARCHITECTURES), ("sm_90a", 2), ("sm_90a", 3)],
)
def test_registers_are_within_their_budget(architecture, bits, tmp_path, figure):
    found = compiled(tmp_path, architecture, head_dim=128, bits=(bits, bits))
    assert found.keys() == BUDGETS.keys()
    over = {
        name: (used, spilled)
        for name, (used, spilled) in found.items()
        if spilled or used > BUDGETS[name]
    }
    assert over == {}
    used = ", ".join(f"{name} {found[name][0]}" for name in ("attend<1>", "attend<2>"))
    figure(
        f"CUDA registers of a thread on {architecture}, {bits} bits, head_dim 128: {used}; "
        "none spilled"
    )


@pytest.mark.parametrize(
    ("head_dim", "bits", "rotation"), [(80, (2, 3), "rotor3"), (256, (8, 3), "hadamard")], ids=str
)
def test_other_configurations_compile(head_dim, bits, rotation, tmp_path):
    found = compiled(tmp_path, "sm_90a", head_dim=head_dim, bits=bits, rotation=rotation)
    assert found.keys() == BUDGETS.keys()
