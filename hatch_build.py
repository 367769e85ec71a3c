"""Add the dependencies, with the right MLX for this machine, and the CPU library at build time.

On Linux, the wheel ``mlx`` contains no backend. ``mlx[cpu]`` or ``mlx[cuda13]`` installs one, and
the two overwrite each other's files. Therefore, an installation from source keeps a CUDA build of
MLX if one is installed, selects the CUDA build if there is an NVIDIA driver, and otherwise selects
the CPU build. A wheel for other machines must not depend on this choice: build it with
``ROTORMLX_MLX=plain``.

If there is a C++ compiler, the library of cpu_kernels/ is compiled, and the wheel is for this kind
of machine only. Without a compiler, the package uses MLX's own operations.
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

# Lower bounds are versions that passed the tests. There are no upper bounds, because no newer
# version is known to break.
MLX_BOUND = ">=0.32.4"  # arrays and kernels; the oldest version that reports its memory limit
DEPENDENCIES = [
    "jinja2>=3.1.6",  # the errors of chat templates, and the page of rotormlx quality
    "mlx-lm>=0.31.3",  # model loading and generation; its cache contract changed in 0.32
    "numpy>=2.0",  # the reference codec, and memory that the CPU library writes to
    "pip>=23",  # fetches the demo model, even in environments made without pip
    "platformdirs>=4",  # where models, calibrations and compiled kernels are kept
    "rich>=14.3",  # tables and progress bars; older versions print an empty line after a hidden bar
    "scipy>=1.15",  # confidence intervals of the measurements
    "tokenizers>=0.23",  # the demo model's tokenizer, made from its GGUF file
    "typer>=0.20",  # the command line
]
# Imports rotormlx_switch.py in every interpreter that has ROTORMLX in its environment.
SWITCH = "rotormlx_switch.pth"


class DependenciesHook(MetadataHookInterface):
    """Metadata hook that fills in ``project.dependencies``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the dependencies in the project table; hatchling calls this."""
        metadata["dependencies"] = [mlx_for_this_machine() + MLX_BOUND, *DEPENDENCIES]


class CPULibraryHook(BuildHookInterface[Any]):
    """Build hook that compiles cpu_kernels/ into the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library; hatchling calls this before a wheel, standard or editable."""
        # Next to the package, where Python reads .pth files; other files are found in the clone.
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
        # The library works with any Python, but only on this kind of machine.
        build_data["tag"] = f"py3-none-{platform_tag()}"
        build_data["pure_python"] = False


def platform_tag() -> str:
    """Return the platform tag of the machines that the library is compiled for.

    On Linux, the tag names this machine only; auditwheel determines which others can load the
    library. On a Mac, the library is for $MACOSX_DEPLOYMENT_TARGET and newer, if that is set.
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
    """Return the name of the MLX distribution to depend on."""
    choice = os.environ.get("ROTORMLX_MLX")
    if choice is not None:
        return "mlx" if choice == "plain" else f"mlx[{choice}]"
    site_packages = Path(sysconfig.get_path("purelib"))
    if sys.platform != "linux" or any(site_packages.glob("mlx_cuda*.dist-info")):
        return "mlx"
    return "mlx[cuda13]" if Path("/proc/driver/nvidia/version").exists() else "mlx[cpu]"
