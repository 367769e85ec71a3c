"""The Metal kernels on a model of the machine: ``python -m tests.support.metal_kernels``.

Prints what each of them takes, counted by ``metal_machine.py``.
"""

from collections import Counter

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from rotormlx.codec import reference
from rotormlx.codec.format import BLOCK, ROLES
from rotormlx.config import BITS
from rotormlx.mlx.backends.metal_levels import OF_BITS
from tests import emulator
from tests.support import metal_machine
from tests.support.attend_cases import Case, Launch, problem
from tests.support.codec_cases import made_codec
from tests.support.runners import METAL

GQA, HEAD_DIM = 4, 128
# Widths, and for each the ways to find levels.
WAYS = [(bits, way) for bits in BITS for way in OF_BITS[bits]]
# Columns of the table of whole kernels.
KINDS = (
    *("fma", "float", "integer", "64-bit", "moves", "branches", "barriers", "of lanes"),
    *("device loads", "device bytes", "threadgroup loads", "threadgroup bytes"),
)


def attend(bits, **changes):
    """A call of a decode step."""
    sizes = {"kv_heads": 1, "batch": 1, "blocks": 5, "repeats": GQA, "dims": (HEAD_DIM, HEAD_DIM)}
    case = Case(bits=(bits, bits), dtype="f16", mask="causal", **sizes | changes)
    return lambda: problem(case).run(METAL)


def in_parts(bits, way):
    """A call that cuts the sequence into parts and merges them."""
    return attend(bits, launch=Launch(kernels=2, levels=way))


def codec_call(verb, role, bits):
    """A call that encodes or decodes a block."""
    chosen, x = made_codec("cascade", HEAD_DIM, bits, role), mx.zeros((1, 1, BLOCK, HEAD_DIM))
    if verb == "encode":
        return lambda: METAL.encode(x, chosen)
    packed = reference.encode(np.array(x), chosen)
    return lambda: METAL.decode(packed, chosen)


# A call for each kernel, but for that of many query rows: the model knows no products of matrices.
CALLS = {
    "attend": attend(4, launch=Launch(kernels=2, levels="pairs"), sink_logits=True),
    "attend alone": attend(4, launch=Launch(levels="pairs"), blocks=1, sink_logits=True),
    **{
        f"{verb} {role}s, {bits} bits": codec_call(verb, role, bits)
        for verb in ("encode", "decode")
        for role in ROLES
        for bits in (3, 4)
    },
}


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


def whole(kernel):
    """Instructions of a kernel by kind, each counted once however often it runs."""
    return sum((metal_machine.kinds(block) for block in kernel.blocks), Counter())


def main():
    """Print the tables."""
    title = f"Loops of attention, GQA {GQA}, head_dim {HEAD_DIM}: instructions of a code beside fma"
    loops = Table("bits", "way", "keys", "values", "exact", "bytes", "spilled", title=title)
    for bits, way in WAYS:
        kernels = compiled(in_parts(bits, way))
        (kernel,) = (kernel for name, kernel in kernels.items() if "attend_parts" in name)
        exact, keys, values = metal_machine.products(kernel, GQA)
        found = [f"{products.beside:.2f}" for products in (keys, values, exact)]
        read = keys.kinds["threadgroup bytes"] / keys.numbers
        loops.add_row(str(bits), way, *found, f"{read:.1f}", str(kernel.spilled))
    console = Console(width=160)
    console.print(loops)
    kernels = Table("kernel", "all", *KINDS, "registers", "spilled", title="Whole kernels")
    for name, call in CALLS.items():
        for kernel_name, kernel in compiled(call).items():
            own = "merge" if "attend_merge" in kernel_name else name
            counts = whole(kernel)
            total = sum(map(len, kernel.blocks))
            cells = (str(counts[kind]) for kind in KINDS)
            kernels.add_row(own, str(total), *cells, str(kernel.registers), str(kernel.spilled))
    console.print(kernels)


if __name__ == "__main__":
    main()
