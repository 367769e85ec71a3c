"""The kinds of masks, numbered as in cuda_kernels/launch.h and metal_kernels/scores.h."""

from __future__ import annotations

NONE, CAUSAL, BOOLEAN, ADDITIVE = range(4)
