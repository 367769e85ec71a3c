"""Measure how row scales, and noise subtracted from scores, change the divergence.

    python scripts/scales.py [--model DIRECTORY] [--gguf-file NAME] [--figure docs/scales.png]

A model of transformers reads a text in chunks of 64 tokens, in float32. Before each chunk, the
script encodes and decodes all whole blocks after 4 sink tokens. The exponent of a row's scale runs
from least squares (0) to the scale without bias (1). The noise of the codes can be subtracted from
the scores of packed keys. Format 2 is (1, 0.75, noise). The script prints Markdown; docs/CODES.md
explains the method and shows the results.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rotormlx.cli import demo_model
from rotormlx.codec import codebook
from rotormlx.codec.format import BLOCK, KEY, VALUE, codec
from rotormlx.config import RotorConfig
from rotormlx.measure.intervals import mean_interval
from rotormlx.measure.text import default_text
from rotormlx.torch import torch_ops

SINK, FIRST = 4, 192
# Exponents of keys and of values, and whether noise is subtracted from scores.
CHOICES = (
    (0.0, 0.0, False),
    (0.5, 0.5, False),
    (1.0, 1.0, False),
    (0.5, 0.5, True),
    (0.75, 0.75, True),
    (1.0, 0.5, True),
    (1.0, 0.75, True),
    (1.0, 1.0, True),
)
FIGURE_LAYER = 10


def coded(x: Tensor, bits: int, layer: int, role: str, exponent: float) -> tuple[Tensor, Tensor]:
    """Return whole blocks ``[B, K, N * 64, D]`` decoded, and their scales ``[B, K, N * 64]``.

    With a the angle between a row and its levels, least squares makes the decoded row cos(a) times
    as long as the row; inner products without bias need 1 / cos(a) times.
    """
    made = codec(RotorConfig(bits, bits), x.shape[-1], layer=layer, role=role)
    packed = torch_ops.encode(x, made)
    decoded = torch_ops.decode(packed, made, dtype=torch.float32)
    centre: Tensor | float = 0.0
    if packed.centres is not None:
        centre = packed.centres.float().repeat_interleave(BLOCK, 2)
    row, stored = x - centre, decoded - centre
    cosine = torch.cosine_similarity(row, stored, dim=-1).clip(min=1e-3)
    longer = row.norm(dim=-1) / stored.norm(dim=-1) * cosine ** (1 - 2 * exponent)
    return centre + stored * longer[..., None], packed.scales.flatten(2).float() * longer


class CodedLayer(DynamicLayer):
    """A cache layer of transformers that codes its whole blocks before it adds new tokens.

    Args:
        layer: Index of the layer.
        bits: Bits of keys and of values; 0 keeps them exact.
        choice: One of ``CHOICES``.
    """

    def __init__(self, layer: int, bits: int, choice: tuple[float, float, bool]) -> None:
        super().__init__()
        self.layer, self.bits, self.choice, self.done = layer, bits, choice, SINK
        # Half the variance of each token's score for a scaled query of norm 1, [B, K, S].
        self.noise: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **options: Any) -> Any:
        """Code whole blocks, then add new tokens; transformers calls this."""
        whole = (self.get_seq_length() - self.done) // BLOCK * BLOCK
        if whole > 0 and self.bits:
            part = slice(self.done, self.done + whole)
            decoded, scales = coded(
                self.keys[..., part, :], self.bits, self.layer, KEY, self.choice[0]
            )
            self.keys[..., part, :] = decoded
            self.values[..., part, :], _ = coded(
                self.values[..., part, :], self.bits, self.layer, VALUE, self.choice[1]
            )
            if self.choice[2] and self.noise is not None:
                self.noise[..., part] = codebook.SCORE_NOISE[self.bits] * scales.square()
            self.done += whole
        none = key_states.new_zeros(key_states.shape[:3])
        self.noise = none if self.noise is None else torch.cat([self.noise, none], -1)
        return super().update(key_states, value_states, *more, **options)


def attend(
    layers: list[CodedLayer],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    **rest: Any,
) -> Any:
    """Compute attention with the noise of each token subtracted from its score."""
    noise = layers[module.layer_idx].noise
    length, tokens = query.shape[2], key.shape[2]
    if mask is None:
        hidden = torch.ones(length, tokens, dtype=torch.bool).triu(tokens - length + 1)
        mask = torch.zeros(1, 1, length, tokens).masked_fill(hidden, -torch.inf)
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    if noise is not None:
        repeats = query.shape[1] // key.shape[1]
        square = (query * rest["scaling"]).square().sum(-1, keepdim=True)
        mask = mask - square * noise.repeat_interleave(repeats, 1)[:, :, None]
    rest["is_causal"] = False
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **rest)


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor, bits: int, choice: Any = CHOICES[0]) -> Tensor:
    """Return log probabilities after each token from ``FIRST`` on, ``[N, V]``; 0 bits is exact."""
    cache = DynamicCache()
    count = model.config.get_text_config().num_hidden_layers
    cache.layers = layers = [CodedLayer(layer, bits, choice) for layer in range(count)]
    ALL_ATTENTION_FUNCTIONS.register("scales", partial(attend, layers))
    ALL_MASK_ATTENTION_FUNCTIONS.register("scales", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("scales")
    rows = [
        model(ids[:, start : start + BLOCK], past_key_values=cache).logits[0]
        for start in range(0, ids.shape[1] - 1, BLOCK)
    ]
    return torch.log_softmax(torch.cat(rows)[FIRST:].float(), -1)


@torch.inference_mode()
def scores(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last 64 queries of one layer, ``[H, 64, D]``, and its keys ``[K, S, D]``."""
    found = {}

    def attention(module: Any, query: Tensor, key: Tensor, *more: Any, **options: Any) -> Any:
        found[module.layer_idx] = query[0, :, -BLOCK:], key[0]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *more, **options)

    ALL_ATTENTION_FUNCTIONS.register("scales", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("scales", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("scales")
    model(ids, use_cache=False)
    return found[FIGURE_LAYER]


def draw(model: Any, ids: Tensor, path: Path, bits: int = 2) -> None:
    """Plot scores of packed keys over exact scores, less the centre's score, for two scales."""
    query, keys = scores(model, ids)
    whole = (keys.shape[1] - SINK) // BLOCK * BLOCK
    keys = keys[None, :, SINK : SINK + whole]
    query = query.reshape(keys.shape[1], -1, query.shape[-1]) * query.shape[-1] ** -0.5
    centre = keys.unflatten(2, (-1, BLOCK)).mean(-2).half().float().repeat_interleave(BLOCK, 2)
    exact = (query @ (keys - centre)[0].mT).flatten()
    chosen = torch.randperm(len(exact), generator=torch.Generator().manual_seed(0))[:3000]
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
    for axis, exponent, title in zip(
        axes, (0.0, 1.0), ("format 1: least squares", "format 2: without bias"), strict=True
    ):
        decoded, _ = coded(keys, bits, FIGURE_LAYER, KEY, exponent)
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
    model: Annotated[
        Path | None, typer.Option(help="Model directory; SmolLM2-135M by default.")
    ] = None,
    gguf_file: Annotated[
        str | None, typer.Option(help="A GGUF file in the model directory.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 1217,
    bits: Annotated[list[int] | None, typer.Option(help="Bits of keys and values.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Only draw the figure, to this file.")] = None,
) -> None:
    """Print the divergence for each choice."""
    directory, more = model or demo_model.fetch(), {"gguf_file": gguf_file} if gguf_file else {}
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **more).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, **more)
    ids = torch.tensor([tokenizer.encode(default_text()[: 8 * tokens])[:tokens]])
    if figure is not None:
        draw(loaded, ids, figure)
        return
    exact = log_probabilities(loaded, ids, 0)
    names = "bits | keys | values | noise off | KL | 95 % | median | 99.9 % | top-1"
    print(f"| {names} |\n" + "|---" * 9 + "|")
    for width in bits or (2, 3, 4, 8):
        for choice in CHOICES:
            found = log_probabilities(loaded, ids, width, choice)
            kl = (exact.exp() * (exact - found)).sum(-1).double().numpy()
            low, high = mean_interval(kl)
            same = float((exact.argmax(-1) == found.argmax(-1)).double().mean())
            print(
                f"| {width} | {choice[0]:g} | {choice[1]:g} | {'yes' if choice[2] else 'no'} | "
                f"{kl.mean():.5f} | {low:.5f} to {high:.5f} | {np.median(kl):.5f} | "
                f"{np.quantile(kl, 0.999):.3f} | {same:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
