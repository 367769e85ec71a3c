"""``python -m rotormlx.torch build`` compiles CUDA kernels; ``bench`` measures a whole model."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from rotormlx.codec.rotation import check_head_dim
from rotormlx.config import BITS, ROTATIONS, RotorConfig
from rotormlx.torch.build import Configuration, architecture, missing
from rotormlx.torch.build import build as build_library

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """The torch companion of rotormlx."""


@app.command()
def build(
    head_dim: Annotated[int, typer.Option(help="head_dim of the keys")] = 128,
    value_dim: Annotated[
        int | None, typer.Option(help="head_dim of the values, if different")
    ] = None,
    key_bits: Annotated[int, typer.Option(help=f"one of {BITS}")] = 4,
    value_bits: Annotated[int, typer.Option(help=f"one of {BITS}")] = 4,
    rotation: Annotated[str, typer.Option(help=f"one of {', '.join(ROTATIONS)}")] = "cascade",
    verbose: Annotated[bool, typer.Option(help="show the compilers' commands")] = False,
) -> None:
    """Compile the CUDA kernels of one configuration for the GPU of this machine."""
    try:
        RotorConfig(key_bits, value_bits, rotation)
        dims = (head_dim, head_dim if value_dim is None else value_dim)
        for dim in dims:
            check_head_dim(dim)
        if (reason := missing()) is not None:
            raise RuntimeError(f"[build] CUDA kernels cannot be built: {reason}.")
        arch = architecture(torch.cuda.get_device_capability())
        chosen = Configuration(rotation, *dims, key_bits, value_bits, arch)
        directory = build_library(chosen, verbose=verbose)
    except (ValueError, RuntimeError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error
    typer.echo(f"built for {arch} in {directory}")


def _count(text: str) -> Any:
    return typer.Option(help=text, min=1)


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="llama-1b, llama-3b, llama-8b, qwen3-4b or tiny, or a folder with config.json."
        ),
    ],
    *,
    bits: Annotated[
        str, typer.Option(help=f"bits of RotorCache, comma-separated, from {BITS}")
    ] = "4",
    prompt: Annotated[int, _count("tokens of the prompt for the time to the first token")] = 2048,
    history: Annotated[int, _count("tokens in the cache before decoding")] = 16384,
    tokens: Annotated[int, _count("tokens to write after the first one")] = 64,
    batch: Annotated[int, _count("sequences at once")] = 1,
    runs: Annotated[int, _count("measured runs of each cache")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cuda",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "bfloat16",
    weights: Annotated[bool, typer.Option("--weights", help="load the folder's weights")] = False,
    output: Annotated[Path, typer.Option(help="JSON file for the result")] = Path(
        "bench-model.json"
    ),
) -> None:
    """Measure a whole model with compressed and other caches, side by side."""
    # Imported here because only this command needs transformers and rich.
    from rich.console import Console  # noqa: PLC0415

    from rotormlx.torch import bench as measure  # noqa: PLC0415

    def keep(result: measure.Result) -> None:
        output.write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")

    try:
        widths = _widths(bits)
        if not output.parent.is_dir() or output.is_dir():
            raise ValueError(
                f"[bench] --output must be a file in an existing folder, but it is {output}."
            )
        made, kind = measure.model_of(model, device=device, dtype=dtype, weights=weights)
        result = measure.run(
            made,
            measure.contenders(widths),
            measure.Settings(prompt, history, tokens, batch, runs),
            name=model,
            weights=kind,
            command=shlex.join(["python", "-m", "rotormlx.torch", *sys.argv[1:]]),
            keep=keep,
        )
    except (ValueError, OSError) as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error
    Console().print(measure.table(result))
    for line in (*measure.remarks(result), f"Written: {output}"):
        typer.echo(line)


def _widths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part in map(str, BITS) for part in parts):
        raise ValueError(
            f"[bench] --bits must be from {BITS}, comma-separated, but it is {text!r}."
        )
    return [int(part) for part in dict.fromkeys(parts)]


if __name__ == "__main__":
    app(prog_name="python -m rotormlx.torch")
