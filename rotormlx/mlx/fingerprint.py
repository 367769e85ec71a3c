"""The weights of an MLX model, in the form that a fingerprint needs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from rotormlx.storage.fingerprint import Fingerprint, Weights


def fingerprint(model: Module) -> Fingerprint:
    """Return the fingerprint of a model, which reads its weights."""
    return weights(model).fingerprint


def weights(model: Module) -> Weights:
    """Return the weights of a model without reading any of them yet."""
    tree: Any = model
    parameters: dict[str, mx.array] = dict(tree_flatten(tree.parameters()))
    shapes = {name: p.shape for name, p in parameters.items()}
    return Weights("mlx", shapes, partial(_sample, parameters))


def _sample(
    parameters: dict[str, mx.array], places: Mapping[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.generic]]:
    numbers = {}
    for name, place in places.items():
        whole, index = parameters[name], mx.array(place)
        numbers[name] = whole[(index,) * whole.ndim] if whole.ndim else whole.reshape(1)
    mx.eval(numbers)
    return {name: np.array(_widened(array)) for name, array in numbers.items()}


def _widened(array: mx.array) -> mx.array:
    is_floating = mx.issubdtype(array.dtype, mx.floating)
    return array.astype(mx.float32 if is_floating else mx.uint32)
