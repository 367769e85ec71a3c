"""``python -m rotormlx.torch build``: compiles the CUDA kernels before they are first used."""

from __future__ import annotations

from typing import Annotated

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
        int | None, typer.Option(help="head_dim of the values, if another")
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


if __name__ == "__main__":
    app(prog_name="python -m rotormlx.torch")
