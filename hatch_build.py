"""Adds the dependencies at build time, with the MLX that this machine needs, and the CPU library.

On Linux the wheel ``mlx`` holds no backend: ``mlx[cpu]`` or ``mlx[cuda13]`` brings one, and the two
overwrite each other's files. So an installation from source looks at the machine: a CUDA build of
MLX that is there stays, an NVIDIA driver asks for the CUDA build, anything else for the CPU build.
A wheel for others must not carry this machine's choice: build it with ``ROTORMLX_MLX=plain``.

The library of cpu_kernels/ is compiled where there is a C++ compiler, and the wheel is then one for
this kind of machine. Without one the package works, on MLX's own operations.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface
from packaging.tags import sys_tags

# Lower bounds are what the tests were run with, or an older one that passed them; nothing has an
# upper bound, because nothing newer is known to break.
MLX_BOUND = ">=0.32.4"  # arrays and kernels; the oldest that tells its memory limit
DEPENDENCIES = [
    "jinja2>=3.1.6",  # the errors of chat templates, and the page of rotormlx quality
    "mlx-lm>=0.31.3",  # model loading and generation; its cache contract changed in 0.32
    "numpy>=2.0",  # the reference codec, and memory that the CPU library writes to
    "pip>=23",  # fetches the demo model, also in environments made without pip
    "platformdirs>=4",  # where models, calibrations and compiled kernels are kept
    "rich>=14.3",  # tables and progress bars; older ones end a hidden bar with an empty line
    "scipy>=1.15",  # confidence intervals of the measurements
    "tokenizers>=0.23",  # the demo model's tokenizer, made from its GGUF file
    "typer>=0.20",  # the command line
]
# Imports rotormlx_switch.py in every interpreter that has ROTORMLX in its environment.
SWITCH = "rotormlx_switch.pth"


class DependenciesHook(MetadataHookInterface):
    """Fills in ``project.dependencies``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the project table."""
        metadata["dependencies"] = [mlx_for_this_machine() + MLX_BOUND, *DEPENDENCIES]


class CPULibraryHook(BuildHookInterface[Any]):
    """Compiles cpu_kernels/ into the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds a wheel, standard or editable."""
        # Beside the package, where Python reads .pth files; the rest is found in the clone.
        build_data["force_include_editable"][str(Path(self.root, SWITCH))] = SWITCH
        done = subprocess.run(
            [sys.executable, str(Path(self.root, "cpu_kernels", "build.py"))],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip() or "cpu_kernels/build.py failed").splitlines()[0]
            self.app.display_warning(
                "rotormlx is built without its CPU library, so attention on a CPU is slow: "
                + reason
            )
            return
        library = Path(done.stdout.strip())
        if version != "editable":  # an editable installation finds it in the clone
            build_data["force_include"][str(library)] = f"rotormlx/{library.name}"
        # It needs no particular Python, but this kind of machine.
        build_data["tag"] = f"py3-none-{platform_tag()}"
        build_data["pure_python"] = False


def platform_tag() -> str:
    """The kind of machine that the library is compiled for.

    On Linux it promises this machine only; auditwheel finds out which others can load it. On a Mac
    the compiler makes it for $MACOSX_DEPLOYMENT_TARGET and newer, if that is set.
    """
    platforms = (tag.platform for tag in sys_tags())
    machine = next(p for p in platforms if not p.startswith(("manylinux", "musllinux")))
    target = os.environ.get("MACOSX_DEPLOYMENT_TARGET")
    if target and machine.startswith("macosx"):
        major, minor = [*target.split("."), "0"][:2]
        architecture = machine.split("_", 3)[3]
        return f"macosx_{major}_{minor}_{architecture}"
    return machine


def mlx_for_this_machine() -> str:
    """The name of the MLX distribution to depend on."""
    choice = os.environ.get("ROTORMLX_MLX")
    if choice is not None:
        return "mlx" if choice == "plain" else f"mlx[{choice}]"
    site_packages = Path(sysconfig.get_path("purelib"))
    if sys.platform != "linux" or any(site_packages.glob("mlx_cuda*.dist-info")):
        return "mlx"
    return "mlx[cuda13]" if Path("/proc/driver/nvidia/version").exists() else "mlx[cpu]"
