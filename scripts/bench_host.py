"""What a decode step costs on the host, through transformers: ``python scripts/bench_host.py``.

With ``--model PATH``, a prompt through that model too.

A tiny model of eight layers over a short history on the CPU, so that little is computed. Contenders
run in one process, in turn with the exact cache, ten steps each. The profiler counts the torch
operations of a step, those included that another one calls; what a model without cache and
attention has of them is taken off.
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
# Steps of a turn.
TURN = 10


def tiny_model() -> LlamaForCausalLM:
    """A model whose layers cost little more than their calls."""
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
    """Keeps nothing; attention gets the new tokens."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """The tokens themselves."""
        return key_states, value_states


def no_attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The queries themselves."""
    return query.transpose(1, 2).contiguous(), None


AttentionInterface.register("none", no_attention)
AttentionMaskInterface.register("none", sdpa_mask)


class Contender:
    """A cache, and the attention that reads it.

    Args:
        model: The model; contenders share it.
        attention: The attention's name.
        cache: An empty cache.
    """

    def __init__(self, model: LlamaForCausalLM, attention: str, cache: Any) -> None:
        self.model, self.attention, self.cache = model, attention, cache

    def read(self, ids: torch.Tensor) -> None:
        """Let tokens go through the model."""
        self.model.set_attn_implementation(self.attention)
        self.model(ids, cache=self.cache)

    def timed(self, ids: torch.Tensor) -> float:
        """Seconds that they take."""
        self.model.set_attn_implementation(self.attention)
        start = time.perf_counter()
        self.model(ids, cache=self.cache)
        return time.perf_counter() - start

    def operations(self, ids: torch.Tensor) -> int:
        """Torch operations of one call."""
        with profile(activities=[ProfilerActivity.CPU]) as found:
            self.read(ids)
        return sum(event.count for event in found.key_averages() if "::" in event.key)


def contenders(model: LlamaForCausalLM, room: int) -> dict[str, Contender]:
    """By name; the first is the exact cache."""
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
    """Every contender's step, behind a history of so many tokens."""
    model = tiny_model()
    prompt, one = torch.randint(0, 257, (1, history)), torch.randint(0, 257, (1, 1))
    nothing = Contender(model, "none", NoCache(config=model.config)).operations(one)
    rows: list[Row] = []
    for place, name in enumerate(contenders(model, history)):
        # Caches of their own, so that all have the same history.
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
                "more, us a layer": 1e3 * (medians[-1] - medians[0]) / LAYERS,
                "operations a layer": (pair[-1].operations(one) - nothing) / LAYERS,
            }
        )
    return rows


@torch.inference_mode()
def prompts(path: Path, tokens: int, runs: int) -> list[Row]:
    """A whole prompt through a model in float32; the fastest run counts."""
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
    history: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 200,
    steps: Annotated[int, typer.Option(help="Counted steps of each.")] = 300,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a Llama model, for a prompt as well.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of that prompt.")] = 2048,
    output: Annotated[Path, typer.Option(help="Where JSON goes.")] = Path("bench-host"),
) -> None:
    """Measure and print the tables."""
    torch.set_num_threads(1)
    title = f"A decode step of {LAYERS} layers behind {history} tokens, CPU, one thread"
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
