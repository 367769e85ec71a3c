"""KV-cache compression with Clifford rotors for mlx-lm.

    import rotormlx

    model, tokenizer = rotormlx.load("path or repository", rotormlx.RotorConfig(key_bits=4))

After that, ``mlx_lm.generate`` and all other code that takes its cache from the model use a
compressed one. Importing this package loads neither a model library nor a compiler; both are
loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rotormlx.config import RotorConfig

if TYPE_CHECKING:
    from rotormlx.measure.calibrate import calibrate
    from rotormlx.mlx.cache.batch import BatchRotorKVCache
    from rotormlx.mlx.cache.single import RotorKVCache
    from rotormlx.mlx.cache.trim import trim_prompt_cache
    from rotormlx.mlx.integration import apply, load, make_prompt_cache, remove
    from rotormlx.mlx.prompt_cache import load_prompt_cache, save_prompt_cache
    from rotormlx.report import Report
    from rotormlx.storage.calibration import Calibration

__version__ = version("rotormlx")

_LAZY = {
    "BatchRotorKVCache": "rotormlx.mlx.cache.batch",
    "Report": "rotormlx.report",
    "RotorKVCache": "rotormlx.mlx.cache.single",
    "Calibration": "rotormlx.storage.calibration",
    "apply": "rotormlx.mlx.integration",
    "calibrate": "rotormlx.measure.calibrate",
    "load": "rotormlx.mlx.integration",
    "load_prompt_cache": "rotormlx.mlx.prompt_cache",
    "make_prompt_cache": "rotormlx.mlx.integration",
    "remove": "rotormlx.mlx.integration",
    "save_prompt_cache": "rotormlx.mlx.prompt_cache",
    "trim_prompt_cache": "rotormlx.mlx.cache.trim",
}

__all__ = [
    "BatchRotorKVCache",
    "Calibration",
    "Report",
    "RotorConfig",
    "RotorKVCache",
    "apply",
    "calibrate",
    "load",
    "load_prompt_cache",
    "make_prompt_cache",
    "remove",
    "save_prompt_cache",
    "trim_prompt_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rotormlx' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
