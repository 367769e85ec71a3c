"""Instructions of the Metal kernels, counted on a model of the machine, within their budgets."""

import shutil

import pytest

from tests import emulator
from tests.support import metal_machine
from tests.support.metal_kernels import CALLS, GQA, WAYS, compiled, in_parts
from tests.support.runners import METAL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        METAL.on_device or emulator.missing() is not None, reason="needs the emulator, and no Metal"
    ),
    pytest.mark.skipif(shutil.which("clang-19") is None, reason="clang-19 is not installed"),
]

# Instructions for a code beside the multiplications, with four query rows: by bits and the way to
# find levels.
BUDGETS = {
    **{(2, "pairs"): 3.1, (2, "table"): 4.6, (2, "quad"): 5.2, (2, "arithmetic"): 8.1},
    **{(3, "pairs"): 2.95, (3, "table"): 4.95, (3, "quad"): 9.1, (3, "arithmetic"): 11.1},
    **{(4, "pairs"): 1.6, (4, "table"): 3.6, (4, "quad"): 8.5, (4, "arithmetic"): 11.9},
    (8, "table"): 2.95,
}
EXACT_BUDGET = 0.9
# Instructions of whole kernels, each counted once.
WHOLE = {
    **{"attend": 2290, "merge": 670, "attend alone": 2790},
    **{"encode keys, 3 bits": 2930, "encode keys, 4 bits": 4300},
    **{"encode values, 3 bits": 2270, "encode values, 4 bits": 3580},
    **{"decode keys, 3 bits": 2080, "decode keys, 4 bits": 1310},
    **{"decode values, 3 bits": 2120, "decode values, 4 bits": 1220},
}
# Bytes of a thread that lie in memory: to encode keys takes more registers than there are.
SPILLED = {"encode keys, 3 bits": 48, "encode keys, 4 bits": 80}


@pytest.mark.parametrize(("bits", "way"), WAYS)
def test_instructions_of_a_code_are_within_their_budget(bits, way, figure):
    kernels = compiled(in_parts(bits, way))
    (name,) = (name for name in kernels if "attend_parts" in name)
    found = metal_machine.products(kernels[name], GQA)
    assert [p.what for p in found] == ["exact", "packed", "packed"]
    exact, keys, values = found
    assert exact.beside <= EXACT_BUDGET
    loaded = (keys.kinds["threadgroup bytes"] + values.kinds["threadgroup bytes"]) / (
        keys.numbers + values.numbers
    )
    figure(
        f"Metal, a model of the machine: {bits} bits, {way}: instructions of a code beside {GQA} "
        f"multiplications {keys.beside:.2f} (keys) and {values.beside:.2f} (values), "
        f"{loaded:.1f} bytes from threadgroup memory"
    )
    assert max(keys.beside, values.beside) <= BUDGETS[bits, way]
    assert kernels[name].spilled == 0
    # Words come 16 bytes at a time, and no address of one is multiplied out in 64 bits.
    for products in (keys, values):
        assert products.kinds["device bytes"] == 16 * products.kinds["device loads"]
        assert products.kinds["64-bit"] <= 6 * max(products.kinds["device loads"], 1)


@pytest.mark.parametrize("name", CALLS)
def test_whole_kernels_are_within_their_budgets(name):
    """An array of a thread would lie in memory if a loop that indexes it were not unrolled."""
    kernels = compiled(CALLS[name])
    assert len(kernels) == (2 if name == "attend" else 1)
    for full_name, kernel in kernels.items():
        own = "merge" if "attend_merge" in full_name else name
        assert sum(map(len, kernel.blocks)) <= WHOLE[own], own
        assert kernel.spilled <= SPILLED.get(own, 0), own
