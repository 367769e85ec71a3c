"""The dtypes that the companion accepts, and their casts under autocast."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that torch's own attention would cast to, or None outside of autocast."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
