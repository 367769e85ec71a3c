"""Compare our codec with published ones on one text, at their true bits.

    python scripts/rivals.py [--model DIRECTORY] [--gguf-file NAME] [--schemes '...']

A model of transformers reads a text in chunks of 64 tokens, in float32, through its own cache and
through each scheme of ``rotormlx quality``. Our schemes use the real cache of ``rotormlx.torch``,
with attention over packed bytes; the others use the simulated caches of ``rotormlx quality``. Both
compress only layers with full attention. The script prints Markdown as results come.

By default, everything is packed except 4 sink tokens and the chunk being read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from rotormlx.cli import demo_model
from rotormlx.config import RotorConfig
from rotormlx.measure import cache_contents
from rotormlx.measure.baselines import SimulatedCache
from rotormlx.measure.intervals import mean_interval
from rotormlx.measure.quality_plan import first_packed
from rotormlx.measure.schemes import Scheme, scheme
from rotormlx.measure.scoring import CHUNK
from rotormlx.measure.text import default_text
from rotormlx.torch import RotorCache, apply, remove
from rotormlx.torch.cache import growing_layers
from rotormlx.torch.probe import cache_name

FAMILIES = ("", "kvarn-", "kivi-", "turboquant-", "exl3-", "rotorquant-")
OPTIONS = {
    "": (",scale=prefill",),
    "kvarn-": (",group=128",),
    "turboquant-": (",qjl",),
    "exl3-": (",compander",),
}
# The best families at equal bits, also with more bits in keys; KVarN's own preset is k4v2.
UNEQUAL, BEST = ("k3v2", "k4v2", "k4v3"), ("", "kvarn-", "kivi-")
COLUMNS = ("scheme", "bits per value", "exact tokens", "KL", "95 %", "median", "99.9th", "top-1")


class SimulatedLayer(DynamicLayer):
    """A simulated cache of ``rotormlx quality`` as a cache layer of transformers."""

    def __init__(self, held: SimulatedCache) -> None:
        super().__init__()
        self.held = held

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **options: Any) -> Any:
        """Add tokens, and return all keys and values, new tokens exact; transformers calls this."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (mx.array(x.numpy()) for x in (key_states, value_states))
        found = self.held.update_and_fetch(*new)
        self.keys, self.values = (torch.from_numpy(np.array(x)) for x in found)
        return self.keys, self.values


@contextmanager
def our_cache(model: Any, config: RotorConfig) -> Iterator[tuple[Any, Callable[[], float]]]:
    """Yield a real cache of the torch companion, and a function for its bits per value."""
    apply(model, config)
    cache = RotorCache(model.config, config)

    def bits() -> float:
        codecs = [store.codec for layer in cache.rotor_layers for store in layer.stores or ()]
        return float(
            np.average([c.bits_per_value for c in codecs], weights=[c.head_dim for c in codecs])
        )

    try:
        yield cache, bits
    finally:
        remove(model)


@contextmanager
def simulated_cache(model: Any, chosen: Scheme) -> Iterator[tuple[Any, Callable[[], float]]]:
    """Yield a cache with simulated growing layers, and a function for its bits per value."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for index in growing_layers(cache.layers):
        cache.layers[index] = SimulatedLayer(chosen.make(index))
    simulated = [x.held for x in cache.layers if isinstance(x, SimulatedLayer)]
    yield cache, lambda: cache_contents.bits_per_value(simulated)


@torch.inference_mode()
def log_probabilities(model: Any, ids: Tensor, cache: Any, first: int) -> Tensor:
    """Return the log probabilities after each token from ``first`` on, ``[N, V]``."""
    rows = [
        model(ids[:, start : start + CHUNK], **{cache_name(model): cache}).logits[0]
        for start in range(0, ids.shape[1] - 1, CHUNK)
    ]
    return torch.log_softmax(torch.cat(rows)[first : ids.shape[1] - 1].float(), -1)


def packed_tokens(cache: Any) -> int:
    """Return the number of tokens that every compressed layer holds packed."""
    if isinstance(cache, RotorCache):
        return cache.packed_tokens
    return min(x.held.packed_tokens for x in cache.layers if isinstance(x, SimulatedLayer))


def row(model: Any, ids: Tensor, exact: Tensor, chosen: Scheme) -> str:
    """Return one row of the table."""
    first, config = ids.shape[1] - 1 - len(exact), chosen.config
    opened = simulated_cache(model, chosen) if config is None else our_cache(model, config)
    with opened as (cache, bits):
        found = log_probabilities(model, ids, cache, first)
        if packed_tokens(cache) < ids.shape[1] - CHUNK - first:
            raise RuntimeError(
                f"Predictions must read packed tokens, but {chosen.name} has too few."
            )
        true_bits = bits()
    kl = (exact.exp() * (exact - found)).sum(-1).double().numpy()
    low, high = mean_interval(kl)
    sink, window = cache_contents.exact_tokens(chosen.make(0))
    same = float((exact.argmax(-1) == found.argmax(-1)).double().mean())
    return (
        f"| `{chosen.name}` | {true_bits:.3f} | {sink} + {window} | {kl.mean():.5f} | {low:.5f} to "
        f"{high:.5f} | {np.median(kl):.5f} | {np.quantile(kl, 0.999):.3f} | {same:.1%} |"
    )


def default_schemes() -> Iterator[str]:
    """Yield all families at 2, 3 and 4 bits, and with more key bits; 4 sink tokens, no window."""
    for bits in ("k2v2", "k3v3", "k4v4"):
        yield from _named(bits, FAMILIES)
    yield from _named("k4v4", ("nvfp4-",))
    for bits in UNEQUAL:
        yield from _named(bits, BEST)


def _named(bits: str, families: tuple[str, ...]) -> Iterator[str]:
    for family in families:
        for more in ("", *OPTIONS.get(family, ())):
            yield f"{family}{bits}:window=0{more}"


def read(names: list[str]) -> list[Scheme]:
    """Return schemes by name; refuse those without a cache in torch."""
    chosen = [scheme(name) for name in names]
    for one in chosen:
        simulated = isinstance(one.make(0), SimulatedCache)
        if one.transform or not (simulated or one.config):
            raise typer.BadParameter(
                f"A scheme must be simulated, or ours without a calibration, but got {one.name!r}; "
                "use rotormlx quality for it."
            )
    return chosen


def main(
    model: Annotated[
        Path | None, typer.Option(help="Model directory; SmolLM2-135M by default.")
    ] = None,
    gguf_file: Annotated[
        str | None, typer.Option(help="A GGUF file in the model directory.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 1217,
    schemes: Annotated[str | None, typer.Option(help="Schemes, separated by spaces.")] = None,
) -> None:
    """Print the divergence of each scheme from the exact cache."""
    chosen = read(schemes.split() if schemes else list(default_schemes()))
    directory, more = model or demo_model.fetch(), {"gguf_file": gguf_file} if gguf_file else {}
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **more).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, **more)
    ids = torch.tensor([tokenizer.encode(default_text()[: 8 * tokens])[:tokens]])
    own = DynamicCache(config=loaded.config.get_text_config(decoder=True))
    exact = log_probabilities(loaded, ids, own, first_packed(chosen))
    print(f"{len(exact)} predictions.\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for one in chosen:
        print(row(loaded, ids, exact, one), flush=True)


if __name__ == "__main__":
    typer.run(main)
