"""How the scale of a row decides the divergence.

    python scripts/scales.py [--model DIRECTORY] [--gguf-file NAME] [--figure docs/scales.png]

A model of transformers reads a text in chunks of 64 tokens, in float32. Before each chunk, all
whole blocks behind 4 sink tokens are replaced by what they decode to, with each row's scale moved
between least squares (exponent 0) and the unbiased one (1); format 2 has 1/2. Prints Markdown.
docs/CODES.md explains the exponent and shows the results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotormlx.cli import demo_model
from rotormlx.codec.format import BLOCK, KEY, VALUE, codec
from rotormlx.config import RotorConfig
from rotormlx.measure.intervals import mean_interval
from rotormlx.measure.text import default_text
from rotormlx.torch import torch_ops

SINK, FIRST = 4, 192
# Exponents of keys and of values.
EXPONENTS = ((0.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0))
FIGURE_LAYER = 10


def coded(x: Tensor, bits: int, layer: int, role: str, exponent: float) -> Tensor:
    """Whole blocks ``[B, K, N * 64, D]`` as they decode with this scale.

    The stored scale makes a decoded row as long as the row. With a the angle between both, least
    squares wants cos(a) times that, and an inner product without bias 1 / cos(a).
    """
    made = codec(RotorConfig(bits, bits), x.shape[-1], layer=layer, role=role)
    packed = torch_ops.encode(x, made)
    decoded = torch_ops.decode(packed, made, dtype=torch.float32)
    centre: Tensor | float = 0.0
    if packed.centres is not None:
        centre = packed.centres.float().repeat_interleave(BLOCK, 2)
    cosine = torch.cosine_similarity(x - centre, decoded - centre, dim=-1)[..., None]
    return centre + (decoded - centre) * cosine.clip(min=1e-3) ** (1 - 2 * exponent)


class CodedLayer(DynamicLayer):
    """A cache layer of transformers whose whole blocks are coded before new tokens come."""

    def __init__(self, layer: int, bits: int, exponents: tuple[float, float]) -> None:
        super().__init__()
        self.layer, self.bits, self.exponents, self.done = layer, bits, exponents, SINK

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **options: Any) -> Any:
        """As transformers calls it."""
        whole = (self.get_seq_length() - self.done) // BLOCK * BLOCK
        if whole > 0 and self.bits:
            part = slice(self.done, self.done + whole)
            for role, x, exponent in zip(
                (KEY, VALUE), (self.keys, self.values), self.exponents, strict=True
            ):
                x[..., part, :] = coded(x[..., part, :], self.bits, self.layer, role, exponent)
            self.done += whole
        return super().update(key_states, value_states, *more, **options)


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor, bits: int, exponents: Any = (0, 0)) -> Tensor:
    """Of what follows each token from ``FIRST`` on, ``[N, V]``; exact with 0 bits."""
    cache = DynamicCache()
    layers = model.config.get_text_config().num_hidden_layers
    cache.layers = [CodedLayer(layer, bits, exponents) for layer in range(layers)]
    rows = [
        model(ids[:, start : start + BLOCK], past_key_values=cache).logits[0]
        for start in range(0, ids.shape[1] - 1, BLOCK)
    ]
    return torch.log_softmax(torch.cat(rows)[FIRST:].float(), -1)


@torch.inference_mode()
def scores(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[H, 64, D]`` of the last tokens of one layer, and its keys ``[K, S, D]``."""
    found = {}

    def attention(module: Any, query: Tensor, key: Tensor, *more: Any, **options: Any) -> Any:
        found[module.layer_idx] = query[0, :, -BLOCK:], key[0]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *more, **options)

    ALL_ATTENTION_FUNCTIONS.register("scales", attention)
    model.set_attn_implementation("scales")
    model(ids, use_cache=False)
    model.set_attn_implementation("sdpa")
    return found[FIGURE_LAYER]


def draw(model: Any, ids: Tensor, path: Path, bits: int = 2) -> None:
    """Scores of packed keys less that of their centre, against the exact ones; two scales."""
    query, keys = scores(model, ids)
    whole = (keys.shape[1] - SINK) // BLOCK * BLOCK
    keys = keys[None, :, SINK : SINK + whole]
    query = query.reshape(keys.shape[1], -1, query.shape[-1]) * query.shape[-1] ** -0.5
    centre = keys.unflatten(2, (-1, BLOCK)).mean(-2).half().float().repeat_interleave(BLOCK, 2)
    exact = (query @ (keys - centre)[0].mT).flatten()
    chosen = torch.randperm(len(exact), generator=torch.Generator().manual_seed(0))[:3000]
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
    for axis, exponent, title in zip(
        axes, (0.0, 0.5), ("format 1: least squares", "format 2: norm kept"), strict=True
    ):
        decoded = coded(keys, bits, FIGURE_LAYER, KEY, exponent)
        found = (query @ (decoded - centre)[0].mT).flatten()
        slope = float((found * exact).sum() / (exact * exact).sum())
        print(f"{title}: slope {slope:.3f}")
        axis.scatter(exact[chosen], found[chosen], s=2, alpha=0.4, linewidths=0)
        ends = np.array([float(exact[chosen].min()), float(exact[chosen].max())])
        axis.plot(ends, ends, color="black", linewidth=0.8, label="exact")
        axis.plot(ends, slope * ends, color="tab:red", label=f"slope {slope:.2f}")
        axis.set(title=title, xlabel="exact score, less its block's centre")
        axis.legend()
    axes[0].set_ylabel(f"score from {bits} bits")
    figure.savefig(path, dpi=100)


def main(
    model: Annotated[Path | None, typer.Option(help="A directory; SmolLM2-135M if none.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file in it.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 1217,
    bits: Annotated[list[int] | None, typer.Option(help="Bits of keys and values.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Only draw the figure, there.")] = None,
) -> None:
    """Print the divergence for each pair of exponents."""
    directory, more = model or demo_model.fetch(), {"gguf_file": gguf_file} if gguf_file else {}
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **more).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, **more)
    ids = torch.tensor([tokenizer.encode(default_text()[: 8 * tokens])[:tokens]])
    if figure is not None:
        draw(loaded, ids, figure)
        return
    exact = log_probabilities(loaded, ids, 0)
    print("| bits | keys | values | KL | 95 % | 99.9th | top-1 |\n" + "|---" * 7 + "|")
    for width in bits or (2, 3, 4, 8):
        for pair in EXPONENTS:
            found = log_probabilities(loaded, ids, width, pair)
            kl = (exact.exp() * (exact - found)).sum(-1).double().numpy()
            low, high = mean_interval(kl)
            same = float((exact.argmax(-1) == found.argmax(-1)).double().mean())
            print(
                f"| {width} | {pair[0]:g} | {pair[1]:g} | {kl.mean():.5f} | {low:.5f} to "
                f"{high:.5f} | {np.quantile(kl, 0.999):.3f} | {same:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
