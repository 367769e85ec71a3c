"""Instructions of the Metal kernels, counted on a model of the machine, within their budgets."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from rotormlx.codec import reference
from rotormlx.codec.format import BLOCK, ROLES
from rotormlx.config import BITS
from rotormlx.mlx.backends.metal_levels import OF_BITS
from tests import emulator
from tests.support import metal_machine
from tests.support.attend_cases import Case, Launch, problem
from tests.support.codec_cases import made_codec
from tests.support.runners import METAL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        METAL.on_device or emulator.missing() is not None, reason="needs the emulator, and no Metal"
    ),
    pytest.mark.skipif(shutil.which("clang-19") is None, reason="clang-19 is not installed"),
]

GQA, HEAD_DIM = 4, 128
# Instructions for a code beside the multiplications, with four query rows: by bits and the way to
# find levels.
BUDGETS = {
    **{(2, "pairs"): 3.1, (2, "table"): 4.6, (2, "quad"): 5.2, (2, "arithmetic"): 8.1},
    **{(3, "pairs"): 2.95, (3, "table"): 4.95, (3, "quad"): 9.1, (3, "arithmetic"): 11.1},
    **{(4, "pairs"): 1.6, (4, "table"): 3.6, (4, "quad"): 8.5, (4, "arithmetic"): 11.9},
    (8, "table"): 2.95,
}
EXACT_BUDGET = 0.9
WAYS = [(bits, way) for bits in BITS for way in OF_BITS[bits]]


def compiled(call):
    """The kernels that a call launches, by name, as the model of the machine has them."""
    texts = {}

    def make(**made):
        kernel = emulator.metal_kernel(**made)

        def launch(*, output_shapes, output_dtypes, **more):
            facts = {"output_shapes": output_shapes, "output_dtypes": output_dtypes, **more}
            texts.update([kernel.named_text(**facts)])
            # Nothing is run.
            return [mx.zeros(*of) for of in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    with METAL.kernels(make):
        call()
    return {name: metal_machine.compiled(text, name) for name, text in texts.items()}


def attend(bits, **changes):
    """A call of a decode step."""
    sizes = {"kv_heads": 1, "batch": 1, "blocks": 5, "repeats": GQA, "dims": (HEAD_DIM, HEAD_DIM)}
    case = Case(bits=(bits, bits), dtype="f16", mask="causal", **sizes | changes)
    return lambda: problem(case).run(METAL)


@pytest.mark.parametrize(("bits", "way"), WAYS)
def test_instructions_of_a_code_are_within_their_budget(bits, way, figure):
    kernels = compiled(attend(bits, launch=Launch(kernels=2, levels=way)))
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
        f"{loaded:.1f} bytes from threadgroup memory, {kernels[name].registers} registers"
    )
    assert max(keys.beside, values.beside) <= BUDGETS[bits, way]
    # Words come 16 bytes at a time, and no address of one is multiplied out in 64 bits.
    for products in (keys, values):
        assert products.kinds["device bytes"] == 16 * products.kinds["device loads"]
        assert products.kinds["64-bit"] <= 6 * max(products.kinds["device loads"], 1)


def codec_call(verb, role, bits):
    """A call that encodes or decodes a block."""
    chosen, x = made_codec("cascade", HEAD_DIM, bits, role), mx.zeros((1, 1, BLOCK, HEAD_DIM))
    if verb == "encode":
        return lambda: METAL.encode(x, chosen)
    packed = reference.encode(np.array(x), chosen)
    return lambda: METAL.decode(packed, chosen)


# Each kernel but that of many query rows, whose products of matrices the model does not know.
CALLS = {
    "attend": attend(4, launch=Launch(kernels=2, levels="pairs"), sink_logits=True),
    "attend alone": attend(3, launch=Launch(levels="pairs"), blocks=1, sink_logits=True),
    **{
        f"{verb} {role} {bits}": codec_call(verb, role, bits)
        for verb in ("encode", "decode")
        for role in ROLES
        for bits in (3, 4)
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_no_array_of_a_thread_lies_in_memory(name):
    """It would, if a loop that indexes one were not unrolled, or registers did not suffice."""
    kernels = compiled(CALLS[name])
    assert len(kernels) == (2 if name == "attend" else 1)
    assert {name: kernel.spilled for name, kernel in kernels.items() if kernel.spilled} == {}
    assert {name for name, kernel in kernels.items() if kernel.registers > 256} == set()
