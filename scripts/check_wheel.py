"""Use an installed rotormlx for real, away from the clone: ``python check_wheel.py``."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

import rotormlx


def main() -> None:
    """Compress and read a cache, find the type marker, and run the command."""
    package = Path(rotormlx.__file__).parent
    if "site-packages" not in package.parts:
        sys.exit(f"An installed rotormlx is required, but {package} was imported.")
    if not importlib.resources.files("rotormlx").joinpath("py.typed").is_file():
        sys.exit("The wheel lacks py.typed.")
    cache = rotormlx.RotorKVCache()
    keys = mx.random.normal((1, 2, 300, 64))
    cache.update_and_fetch(keys, keys)
    if cache.packed_tokens != 192:
        sys.exit(f"192 tokens must be packed, but {cache.packed_tokens} are.")
    command = Path(sys.executable).parent / "rotormlx"
    print(subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
