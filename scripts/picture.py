"""Run the demo, and save its table as a picture: ``python scripts/picture.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rotormlx.cli import demo

PICTURE = Path(__file__).parent.parent / "docs" / "demo.svg"


def main(output: Annotated[Path, typer.Argument(help="File to write.")] = PICTURE) -> None:
    """Write the output of ``rotormlx demo`` as an SVG picture."""
    console = Console(record=True, width=88)
    demo.run(console=console)
    console.save_svg(str(output), title="rotormlx demo")


if __name__ == "__main__":
    typer.run(main)
