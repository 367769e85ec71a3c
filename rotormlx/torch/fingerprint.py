"""The weights of a torch model, as a fingerprint takes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rotormlx.storage.fingerprint import Fingerprint, Weights


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """What tells a model's weights; reads them.

    Raises:
        ValueError: If a weight is not in memory.
    """
    return weights(model).fingerprint


def weights(model: PreTrainedModel) -> Weights:
    """The weights of a model's text decoder, of which none is read yet.

    Raises:
        ValueError: If ``model`` is none.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"[fingerprint] A model of transformers is required, but a {type(model).__name__} was "
            "given; pass what from_pretrained returned."
        )
    # Vision and speech have layers too, and mlx-lm loads neither.
    parameters = dict(model.get_decoder().named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    return Weights("torch", shapes, partial(_sample, parameters))


@torch.no_grad()
def _sample(
    parameters: dict[str, Tensor], places: Mapping[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.generic]]:
    numbers: dict[str, Tensor] = {}
    for name, place in places.items():
        whole = parameters[name]
        if whole.is_meta:
            raise ValueError(
                f"[fingerprint] All weights must be in memory to tell the model, but {name} is on "
                "the device meta; load the model without offloading."
            )
        index = torch.from_numpy(place).to(whole.device)
        numbers[name] = whole[(index,) * whole.ndim] if whole.ndim else whole.reshape(1)
    return {name: _widened(x).cpu().numpy() for name, x in numbers.items()}


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x.long()
