"""What a measured divergence consists of, and whether layers deserve different bits.

``python scripts/explore.py noise`` gives the divergence that comes from arithmetic alone: the same
exact cache, read in chunks of another length or computed in another dtype. ``python
scripts/explore.py layers`` measures what each layer's keys and values lose by themselves, gives
bits to those that lose most, and compares that with the same number of bits everywhere. Both read
SmolLM2-135M-Instruct and print Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

import mlx.core as mx
import mlx_lm
import numpy as np
import typer
from mlx_lm.models.cache import make_prompt_cache
from rich.progress import Progress

from rotormlx import codebook, hook, quality, rivals, smollm2
from rotormlx.cache import RotorKVCache
from rotormlx.config import BITS, RotorConfig
from rotormlx.cpu_linear import numpy_linear
from rotormlx.probe import compress
from rotormlx.quality import Scores, differences
from rotormlx.quality_run import CHUNK, mean_interval

Bits = tuple[int, int]  # of keys and of values
START = 192  # the first prediction for which every scheme reads packed tokens
ROLES = ("key", "value")
LONGEST = 4096  # tokens of a text
NEARLY_EXACT = 8  # its error is 1/1,400 of that of 3 bits

app = typer.Typer(help=__doc__)
Tokens = Annotated[int, typer.Option(help="Tokens of the text to compare on.")]


class Reader:
    """SmolLM2 and a text, read through caches.

    Args:
        tokens: Tokens of the text to compare on, the first of the default text.
        seen: Tokens behind them, to learn from.
    """

    def __init__(self, tokens: int, seen: int = 0) -> None:
        self.model, tokenizer = mlx_lm.load(str(smollm2.fetch()))[:2]
        ids = tokenizer.encode(quality.default_text()[: 8 * (tokens + seen)])
        self.ids, self.seen = ids[:tokens], ids[tokens : tokens + seen]

    def through(
        self,
        make: Callable[[int], Any],
        *,
        dtype: mx.Dtype = mx.float32,
        chunk: int = CHUNK,
        seen: bool = False,
    ) -> Scores:
        """What the model predicts through caches that ``make`` gives for each layer."""
        caches = compress(make_prompt_cache(self.model), make)
        with numpy_linear(), quality.computing_in(self.model, dtype):
            return quality.score(self.model, self.seen if seen else self.ids, caches, chunk=chunk)


def exact(layer: int) -> Any:
    """The cache of a layer that packs nothing, of mlx-lm."""
    return rivals.scheme(rivals.EXACT).make(layer)


def unpacked(layer: int) -> RotorKVCache:
    """The same as ours: attention is computed by rotormlx, and nothing is packed."""
    return RotorKVCache(RotorConfig(window=LONGEST), layer)


def packed(bits: Sequence[Bits]) -> Callable[[int], RotorKVCache]:
    """Caches with bits of their own for each layer."""
    return lambda layer: RotorKVCache(RotorConfig(*bits[layer]), layer)


@app.command()
def noise(tokens: Tokens = 1217) -> None:
    """Print the divergence that arithmetic alone makes, beside that of 4 bits."""
    reader = Reader(tokens)
    dtypes = {"bfloat16": mx.bfloat16, "float32": mx.float32}
    four = packed([(4, 4)] * len(reader.model.layers))
    print(
        "| reference: the exact cache in | against it | KL | 95 % | top-1 |\n" + "| --- " * 5 + "|"
    )
    with ExitStack() as stack:
        _installed(stack)
        of = {name: reader.through(exact, dtype=dtype) for name, dtype in dtypes.items()}
        for name, dtype in dtypes.items():
            others: dict[str, Callable[[], Scores]] = {
                f"exact, {name}, chunks of {chunk}": lambda chunk=chunk, dtype=dtype: (
                    reader.through(exact, dtype=dtype, chunk=chunk)
                )
                for chunk in (32, 128)
            } | {
                f"rotormlx with nothing packed, {name}": lambda dtype=dtype: reader.through(
                    unpacked, dtype=dtype
                ),
                f"rotormlx 4 bits, {name}": lambda dtype=dtype: reader.through(four, dtype=dtype),
            }
            for label, scores in others.items():
                _print(name, label, of[name], scores())
        _print("float32", "exact, bfloat16", of["float32"], of["bfloat16"])
        coarse = reader.through(four, dtype=mx.bfloat16)
        _print("float32", "rotormlx 4 bits, bfloat16", of["float32"], coarse)


@app.command()
def layers(
    tokens: Tokens = 1217,
    seen: Annotated[int, typer.Option(help="Tokens to measure each layer on.")] = 705,
    mean: Annotated[list[float] | None, typer.Option(help="Bits a code, the mean.")] = None,
) -> None:
    """Measure each layer, allot bits, and compare with equal bits."""
    reader = Reader(tokens, seen)
    count = len(reader.model.layers)
    with ExitStack() as stack:
        _installed(stack)
        progress = stack.enter_context(Progress())
        loss = sensitivities(reader, progress)
        print("| layer | keys | values |\n| --- | --- | --- |")
        for layer, (keys, values) in enumerate(loss):
            print(f"| {layer} | {keys:.6f} | {values:.6f} |")
        reference = reader.through(exact)
        print("\n| bits a code | keys and values | KL | less equal bits', 95 % |\n| --- " * 4 + "|")
        for bits in mean or (3.0, 4.0):
            first = None
            for name, allotted in _allocations(loss, bits, count).items():
                kl = differences(reference, reader.through(packed(allotted)), start=START).kl
                first = kl if first is None else first
                low, high = mean_interval(kl - first)
                print(f"| {bits:g} | {name} | {kl.mean():.5f} | {low:+.5f} to {high:+.5f} |")


def sensitivities(reader: Reader, progress: Progress) -> np.ndarray:
    """KL divergence with 3 bits in the keys or the values of one layer only, ``[layers, 2]``."""
    count = len(reader.model.layers)
    reference = reader.through(exact, seen=True)
    loss = np.zeros((count, 2))
    for layer in progress.track(range(count), description="Layers"):
        for role, bits in enumerate(((3, NEARLY_EXACT), (NEARLY_EXACT, 3))):

            def make(index: int, layer: int = layer, bits: Bits = bits) -> RotorKVCache:
                chosen = index == layer
                return RotorKVCache(RotorConfig(*bits), index) if chosen else unpacked(index)

            scores = reader.through(make, seen=True)
            loss[layer, role] = differences(reference, scores, start=START).kl.mean()
    return loss


def allotted(loss: np.ndarray, mean: float, choices: Sequence[int]) -> np.ndarray:
    """Bits for each entry of ``loss``, greedily: a step goes where it saves most for each bit.

    Args:
        loss: KL divergence of each part alone at 3 bits, any shape. With other bits it is taken to
            be proportional to the squared error of a code.
        mean: Bits, the mean over the parts.
        choices: Bits that a part may have, ascending.
    """
    error = np.array([squared_error(bits) for bits in choices]) / squared_error(3)
    index = np.zeros(loss.shape, int)
    widths = np.array(choices)
    room = mean * loss.size
    while True:
        gain = np.full(loss.shape, -1.0)
        for step in np.ndindex(loss.shape):
            here = index[step]
            if here + 1 < len(choices):
                wider = widths[here + 1] - widths[here]
                if widths[index].sum() + wider <= room + 1e-9:
                    gain[step] = loss[step] * (error[here] - error[here + 1]) / wider
        best = np.unravel_index(gain.argmax(), loss.shape)
        if gain[best] < 0:
            return widths[index]
        index[best] += 1


def squared_error(bits: int) -> float:
    """Of the codebook on normal numbers of variance 1."""
    levels = codebook.magnitudes(bits).astype(np.float64)
    grid = (np.arange(200_000) + 0.5) / 25_000  # 0 to 8
    weight = np.exp(-np.square(grid) / 2)
    index = np.searchsorted(codebook.boundaries(bits), grid, side="right")
    return float((np.square(grid - levels[index]) * weight).sum() / weight.sum())


def _allocations(loss: np.ndarray, mean: float, count: int) -> dict[str, list[Bits]]:
    choices = [bits for bits in BITS if bits <= 4 or mean > 3]
    by_layer = allotted(loss.sum(1), mean, choices)
    by_part = allotted(loss, mean, choices)
    whole = int(mean)
    found = {"the same in every layer": [(whole, whole)] * count} if whole == mean else {}
    if mean + 1 in BITS and mean - 1 in BITS:
        found["keys a bit more, values a bit less"] = [(whole + 1, whole - 1)] * count
    found["by layer"] = [(int(bits), int(bits)) for bits in by_layer]
    found["by layer, keys and values apart"] = [(int(k), int(v)) for k, v in by_part]
    return found


def _installed(stack: ExitStack) -> None:
    hook.install()
    stack.callback(hook.remove)


def _print(name: str, label: str, reference: Scores, scores: Scores) -> None:
    found = differences(reference, scores, start=START)
    low, high = mean_interval(found.kl)
    top1 = found.quality.top1
    print(f"| {name} | {label} | {found.kl.mean():z.5f} | {low:z.5f} to {high:z.5f} | {top1:.1%} |")


if __name__ == "__main__":
    app()
