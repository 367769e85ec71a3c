"""Measure the host time of a decode step in transformers: ``python scripts/bench_host.py``.

With ``--model PATH``, the script also times a prompt in that model.

A tiny model of eight layers decodes over a short history on the CPU, so that little is computed.
Each contender runs in turn with the exact cache in one process, ten steps each. The profiler counts
the torch operations of a step, including nested ones, minus those of a model without cache and
attention.
"""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from bench_report import Row, write_figures
from rich.progress import track
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import sdpa_mask

from rotormlx.cli.terminal import wide_console
from rotormlx.config import RotorConfig
from rotormlx.torch.cache import RotorCache

LAYERS = 8
# Steps per turn.
TURN = 10


def tiny_model() -> LlamaForCausalLM:
    """Return a model whose layers cost little more than their calls."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    return LlamaForCausalLM(config).eval()


class NoCache(DynamicCache):
    """A cache that keeps nothing; attention gets only the new tokens."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the new tokens."""
        return key_states, value_states


def no_attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the queries."""
    return query.transpose(1, 2).contiguous(), None


AttentionInterface.register("none", no_attention)
AttentionMaskInterface.register("none", sdpa_mask)


class Contender:
    """A cache and the attention that reads it.

    Args:
        model: Model, shared by all contenders.
        attention: Name of the attention.
        cache: Empty cache.
    """

    def __init__(self, model: LlamaForCausalLM, attention: str, cache: Any) -> None:
        self.model, self.attention, self.cache = model, attention, cache

    def read(self, ids: torch.Tensor) -> None:
        """Read tokens with the model."""
        self.model.set_attn_implementation(self.attention)
        self.model(ids, cache=self.cache)

    def timed(self, ids: torch.Tensor) -> float:
        """Read tokens with the model, and return the seconds that it takes."""
        self.model.set_attn_implementation(self.attention)
        start = time.perf_counter()
        self.model(ids, cache=self.cache)
        return time.perf_counter() - start

    def operations(self, ids: torch.Tensor) -> int:
        """Return the number of torch operations of one call."""
        with profile(activities=[ProfilerActivity.CPU]) as found:
            self.read(ids)
        return sum(event.count for event in found.key_averages() if "::" in event.key)


def contenders(model: LlamaForCausalLM, room: int) -> dict[str, Contender]:
    """Return the contenders by name; the first is the exact cache."""
    exact = DynamicCache(config=model.config)
    model.set_attn_implementation("rotormlx")
    grows = RotorCache(model.config, RotorConfig())
    static = RotorCache(model.config, RotorConfig(), max_cache_len=room)
    return {
        "DynamicCache": Contender(model, "sdpa", exact),
        "RotorCache, 4 bit": Contender(model, "rotormlx", grows),
        "RotorCache, 4 bit, static": Contender(model, "rotormlx", static),
    }


@torch.inference_mode()
def decode_steps(history: int, steps: int) -> list[Row]:
    """Time a decode step of every contender after a history of ``history`` tokens."""
    model = tiny_model()
    prompt, one = torch.randint(0, 257, (1, history)), torch.randint(0, 257, (1, 1))
    nothing = Contender(model, "none", NoCache(config=model.config)).operations(one)
    rows: list[Row] = []
    for place, name in enumerate(contenders(model, history)):
        # New caches for each pair, so that all have the same history.
        exact, *others = contenders(model, history + 2 * steps).values()
        pair = [exact, others[place - 1]] if place else [exact]
        for contender in pair:
            contender.read(prompt)
        times: list[list[float]] = [[] for _ in pair]
        for _ in track(range(steps // TURN), name):
            for contender, own in zip(pair, times, strict=True):
                own += [contender.timed(one) for _ in range(TURN)]
        medians = [1e3 * statistics.median(own) for own in times]
        rows.append(
            {
                "contender": name,
                "ms": medians[-1],
                "this / DynamicCache": medians[-1] / medians[0],
                "more, us per layer": 1e3 * (medians[-1] - medians[0]) / LAYERS,
                "operations per layer": (pair[-1].operations(one) - nothing) / LAYERS,
            }
        )
    return rows


@torch.inference_mode()
def prompts(path: Path, tokens: int, runs: int) -> list[Row]:
    """Time a whole prompt in a float32 model; the fastest run counts."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = torch.randint(0, model.config.vocab_size, (1, tokens))
    times: dict[str, list[float]] = {}
    for _ in track(range(runs), "prompts"):
        for name, contender in contenders(model, tokens).items():
            times.setdefault(name, []).append(contender.timed(prompt))
    exact = times["DynamicCache"]
    return [
        {
            "contender": name,
            "s": min(own),
            "this / DynamicCache": min(own) / min(exact),
            "by medians": statistics.median(own) / statistics.median(exact),
        }
        for name, own in times.items()
    ]


def main(
    history: Annotated[int, typer.Option(help="Tokens of history.")] = 200,
    steps: Annotated[int, typer.Option(help="Timed steps of each contender.")] = 300,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a Llama model; also time a prompt in it.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt for --model.")] = 2048,
    output: Annotated[Path, typer.Option(help="Folder for JSON.")] = Path("bench-host"),
) -> None:
    """Measure and print the tables."""
    torch.set_num_threads(1)
    title = f"Decode step of {LAYERS} layers after {history} tokens, CPU, one thread"
    tables = {title: decode_steps(history, steps)}
    if model is not None:
        tables[f"A prompt of {prompt} tokens, float32"] = prompts(model, prompt, runs=5)
    write_figures(
        wide_console(),
        tables,
        output,
        device=platform.processor() or platform.machine(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


if __name__ == "__main__":
    typer.run(main)
