"""Use compressed caches in programs without rotormlx support: ``ROTORMLX=4 some-server ...``.

rotormlx_switch.pth imports this module when an interpreter starts, if the environment has ROTORMLX.
The import must be fast. Therefore, functions of other packages are wrapped only when their modules
are imported, and rotormlx is imported only when a wrapped function is first called. See
docs/SERVERS.md.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any

# By module: functions to wrap, and the replacement of each, which gets the original function as its
# first argument. These load models, or handle caches in the prefix stores of servers.
WRAPPED = {
    "mlx_lm.generate": {
        "BatchGenerator._make_new_cache": "rotormlx.mlx.prefix_stores:made_anew",
    },
    "mlx_lm.utils": {"load_model": "rotormlx.mlx.switch:load_model"},
    "mlx_vlm.utils": {"load_model": "rotormlx.mlx.switch:load_model"},
    "rapid_mlx.prefix_cache": {
        "BlockAwarePrefixCache.__init__": "rotormlx.mlx.prefix_stores:paged",
    },
    "vllm_mlx.prefix_cache": {
        "BlockAwarePrefixCache.__init__": "rotormlx.mlx.prefix_stores:paged",
    },
    "rapid_mlx.memory_cache": {
        "_trim_cache_offset": "rotormlx.mlx.prefix_stores:trimmed",
    },
    "vllm_mlx.memory_cache": {
        "_trim_cache_offset": "rotormlx.mlx.prefix_stores:trimmed",
        "_detach_cache_for_storage": "rotormlx.mlx.prefix_stores:copied",
        "_dequantize_cache": "rotormlx.mlx.prefix_stores:copied",
    },
    "vllm_mlx.scheduler": {
        "Scheduler._bound_cache_layers": "rotormlx.mlx.prefix_stores:limited",
    },
}
# Functions that only some versions have.
OPTIONAL = {"BatchGenerator._make_new_cache"}


class Finder:
    """Import finder that wraps the functions in ``WRAPPED`` when their modules are imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find a module with the other finders; Python calls this for every import."""
        if name not in WRAPPED:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, Finder))
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                wrap(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def wrap(module: ModuleType) -> None:
    """Wrap the functions of a module that was just executed, before other modules bind them."""
    for name, place in WRAPPED[module.__name__].items():
        holder, _, own_name = name.rpartition(".")
        home = vars(module).get(holder) if holder else module
        function = None if home is None else vars(home).get(own_name)
        if function is not None:
            setattr(home, own_name, _calling(place, function))
        elif name not in OPTIONAL:
            print(
                f"rotormlx: ROTORMLX needs {module.__name__}.{name}, but the installed version "
                "has no such function, so caches of this package may stay exact or be refused; "
                "docs/SERVERS.md names the versions that work.",
                file=sys.stderr,
            )


def _calling(place: str, function: Any) -> Any:
    home, _, name = place.partition(":")
    is_static = isinstance(function, staticmethod)
    own = function.__func__ if is_static else function

    @functools.wraps(own)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(home), name)(own, *args, **kwargs)

    return staticmethod(wrapper) if is_static else wrapper


if not any(isinstance(finder, Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, Finder())
