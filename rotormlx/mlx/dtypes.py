"""The dtypes that keys, values and queries may have."""

from __future__ import annotations

import mlx.core as mx

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
