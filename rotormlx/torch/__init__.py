"""Compressed caches for torch: operators, and a cache for transformers.

    import rotormlx, rotormlx.torch

    model = AutoModelForCausalLM.from_pretrained("path or repository")
    print(rotormlx.torch.apply(model, rotormlx.RotorConfig(key_bits=4)))

From then on ``model.generate`` uses a compressed cache. The operators
``torch.ops.rotormlx.{encode, decode, attend, step}`` are available after this import. transformers
is loaded when :class:`RotorCache` or a function that needs it is first used. Nothing is compiled at
import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import rotormlx.torch.step  # noqa: F401  (defines an operator)
from rotormlx.torch.ops import attend, decode, encode, prefill_scale
from rotormlx.torch.torch_ops import KVView

if TYPE_CHECKING:
    from rotormlx.torch.cache import RotorCache
    from rotormlx.torch.calibration import load_calibration
    from rotormlx.torch.integration import apply, remove, report
    from rotormlx.torch.prompt_cache import load_prompt_cache, save_prompt_cache

_LAZY = {
    "RotorCache": "rotormlx.torch.cache",
    "apply": "rotormlx.torch.integration",
    "load_calibration": "rotormlx.torch.calibration",
    "load_prompt_cache": "rotormlx.torch.prompt_cache",
    "remove": "rotormlx.torch.integration",
    "report": "rotormlx.torch.integration",
    "save_prompt_cache": "rotormlx.torch.prompt_cache",
}

__all__ = [
    "KVView",
    "RotorCache",
    "apply",
    "attend",
    "decode",
    "encode",
    "load_calibration",
    "load_prompt_cache",
    "prefill_scale",
    "remove",
    "report",
    "save_prompt_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rotormlx.torch' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
