"""Kinds of a mask, as the kernels number them: cuda_kernels/launch.h, metal_kernels/scores.h."""

from __future__ import annotations

NONE, CAUSAL, BOOLEAN, ADDITIVE = range(4)
