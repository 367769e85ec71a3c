"""The weights of a torch model, in the form that fingerprints sample."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rotormlx.storage.fingerprint import Fingerprint, Weights
from rotormlx.torch.parallel import is_shared, ranks_of, whole


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """Return the fingerprint of a model; reads its weights.

    Raises:
        ValueError: If a weight is not in memory.
    """
    return weights(model).fingerprint


def weights(model: PreTrainedModel) -> Weights:
    """Return the weights of a model's text decoder without reading them.

    Raises:
        ValueError: If ``model`` is no model of transformers, or its ranks do not tell which parts
            they have. All ranks of a model must read its fingerprint together.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"[fingerprint] model must be a model of transformers, but a {type(model).__name__} "
            "was given; pass what from_pretrained returned."
        )
    # The text decoder only: mlx-lm loads no layers of vision and speech.
    # The state dict, because quantized weights may be buffers.
    state = model.get_decoder().state_dict()
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    if (ranks := ranks_of(model)) > 1 and not any(map(is_shared, tensors.values())):
        raise ValueError(
            f"[fingerprint] The ranks of a model must tell which parts of its weights they have, "
            f"but the {ranks} ranks of this {type(model).__name__} do not; install transformers "
            "5.24 or newer, or load the model without tensor parallelism."
        )
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    return Weights("torch", shapes, partial(_sample, tensors))


@torch.no_grad()
def _sample(
    tensors: dict[str, Tensor], places: Mapping[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.generic]]:
    return {name: _numbers(name, tensors[name], place) for name, place in places.items()}


def _numbers(name: str, weight: Tensor, place: NDArray[np.int64]) -> NDArray[np.generic]:
    if weight.is_meta:
        raise ValueError(
            f"[fingerprint] All weights must be in memory to identify the model, but {name} is on "
            "the device meta; load the model without offloading."
        )
    wide = torch.float32 if weight.is_floating_point() else torch.int64
    try:
        weight = whole(weight)
        # One by one: small dtypes cannot be indexed by tensors.
        numbers = [weight[(int(at),) * weight.ndim].to(wide) for at in place]
        return torch.stack(numbers).cpu().numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            "[fingerprint] Weights must be tensors whose numbers can be read to identify the "
            f"model, but {name} is a {type(weight).__name__} of {weight.dtype}; use the model "
            "without that quantization."
        ) from error
