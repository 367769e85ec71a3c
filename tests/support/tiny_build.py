"""Builds one small C++ file as CUDA kernels are built; run in a process of its own.

python -m tests.support.tiny_build DIRECTORY
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from unittest.mock import patch

from rotormlx.torch import build


def main() -> None:
    """Build it, load it, call it."""
    (kernels := Path(sys.argv[1]) / "kernels").mkdir(exist_ok=True)
    source = kernels / "tiny.cpp"
    source.write_text('extern "C" int seven() { return 7; }\n')
    chosen = build.Configuration("cascade", 64, 80, 4, 3, "sm_90a")
    with (
        patch.object(build, "missing", lambda: None),
        patch.object(build, "folder", lambda _: kernels),
        patch.object(build, "SOURCES", [source.name]),
    ):
        directory = build.build(chosen)
    library = ctypes.CDLL(str(directory / f"{directory.name}.so"))
    print(f"built: {library.seven()}")


if __name__ == "__main__":
    main()
