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
from rotormlx.torch.parallel import check_whole


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """The fingerprint of a model; reads its weights.

    Raises:
        ValueError: If a weight is not in memory.
    """
    return weights(model).fingerprint


def weights(model: PreTrainedModel) -> Weights:
    """The weights of a model's text decoder, of which none is read yet.

    Raises:
        ValueError: If ``model`` is none, or this process has only a part of it.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"[fingerprint] model must be a model of transformers, but a {type(model).__name__} "
            "was given; pass what from_pretrained returned."
        )
    check_whole(model)
    # Vision and speech have layers too, and mlx-lm loads neither.
    # Its state: quantized weights may be buffers.
    state = model.get_decoder().state_dict()
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    return Weights("torch", shapes, partial(_sample, tensors))


@torch.no_grad()
def _sample(
    tensors: dict[str, Tensor], places: Mapping[str, NDArray[np.int64]]
) -> dict[str, NDArray[np.generic]]:
    return {name: _numbers(name, tensors[name], place) for name, place in places.items()}


def _numbers(name: str, whole: Tensor, place: NDArray[np.int64]) -> NDArray[np.generic]:
    if whole.is_meta:
        raise ValueError(
            f"[fingerprint] All weights must be in memory to tell the model, but {name} is on the "
            "device meta; load the model without offloading."
        )
    wide = torch.float32 if whole.is_floating_point() else torch.int64
    try:
        # One by one: small dtypes cannot be indexed by tensors.
        numbers = [whole[(int(at),) * whole.ndim].to(wide) for at in place]
        return torch.stack(numbers).cpu().numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"[fingerprint] Weights must be tensors whose numbers can be read to tell the model, "
            f"but {name} is a {type(whole).__name__} of {whole.dtype}; use the model without that "
            "quantization."
        ) from error
