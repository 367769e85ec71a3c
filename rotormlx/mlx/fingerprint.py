"""A name for a model's weights, so that a file made with one model is not used with another."""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

# Numbers of each parameter that are read.
_SAMPLE = 16


def fingerprint(model: Module) -> str:
    """A name for a model's weights: a digest of all shapes and of the first numbers of each."""
    parameters = _parameters(model)
    samples = {name: p.reshape(-1)[:_SAMPLE] for name, p in parameters.items()}
    mx.eval(samples)
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(_described(name, parameters[name]))
        digest.update(np.array(mx.contiguous(samples[name]).view(mx.uint8)).tobytes())
    return digest.hexdigest()


def structure(model: Module) -> str:
    """A name for the shapes of a model: unlike :func:`fingerprint` it reads no weight."""
    parameters = _parameters(model)
    described = (_described(name, parameters[name]) for name in sorted(parameters))
    return hashlib.sha256(b"".join(described)).hexdigest()


def _parameters(model: Module) -> dict[str, mx.array]:
    tree: Any = model
    return dict(tree_flatten(tree.parameters()))


def _described(name: str, parameter: mx.array) -> bytes:
    return f"{name} {parameter.shape} {parameter.dtype}".encode()
