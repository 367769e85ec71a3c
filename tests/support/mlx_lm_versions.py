"""What the oldest supported mlx-lm cannot do itself."""

import pytest
from mlx_lm.models.cache import KVCache

BEFORE_0_32 = hasattr(KVCache, "meta_state")


def since_0_32(reason: str) -> pytest.MarkDecorator:
    """Skips a test where mlx-lm is older, for a reason that lies in mlx-lm."""
    return pytest.mark.skipif(BEFORE_0_32, reason=f"mlx-lm before 0.32 {reason}")


# Model types of tests/support/models.py that it runs otherwise.
NOT_BEFORE_0_32 = {
    "afm7": "hands keys and values on by the state of a cache",
    "llama4": "fails in its own chunked cache",
}


def model_types(types):
    """Parameters of these types, skipped where mlx-lm is too old for one."""
    reasons = {name: NOT_BEFORE_0_32.get(name) for name in types}
    return [
        pytest.param(name, marks=[since_0_32(reason)] if reason else [])
        for name, reason in reasons.items()
    ]
