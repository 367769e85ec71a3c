"""Tensor parallelism of transformers: every rank holds its own share of a model's KV heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

# Layers whose output is the keys, alone or with other projections.
_KEY_LAYERS = ("k_proj", "qkv_proj", "query_key_value")


def ranks_of(model: PreTrainedModel) -> int:
    """Return the number of ranks that share a model's heads; 1 if it is not spread."""
    return getattr(model, "tp_size", None) or 1


def check_heads(model: PreTrainedModel) -> None:
    """Refuse a model whose KV heads cannot be shared evenly; transformers cannot run it either.

    Raises:
        ValueError: If the number of ranks does not divide the number of KV heads.
    """
    ranks = ranks_of(model)
    heads = getattr(model.config.get_text_config(decoder=True), "num_key_value_heads", None)
    if not isinstance(heads, int) or heads % ranks == 0:
        return
    layers = {name.rpartition(".")[2] for name, how in model.tp_plan.items() if how == "colwise"}
    if layers.intersection(_KEY_LAYERS):
        raise ValueError(
            f"[apply] The number of ranks must divide the {heads} KV heads of "
            f"{type(model).__name__}, but there are {ranks} ranks; start fewer."
        )


def own_heads(model: PreTrainedModel) -> tuple[int, int]:
    """Return which share of a model's KV heads this process holds.

    Returns:
        The index of the share, and the number of shares. Ranks hold neighbouring heads, in order.
    """
    weight: Any  # a DTensor if it is shared; not every build of torch has that class
    for name, weight in model.named_parameters():
        if f".{_KEY_LAYERS[0]}.weight" in name and is_shared(weight):
            mesh = weight.device_mesh
            axis = None if mesh.ndim == 1 else "tp"
            return mesh.get_local_rank(axis), ranks_of(model)
    return 0, 1


def is_shared(tensor: Tensor) -> bool:
    """Return whether this process holds only a part of a weight."""
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def whole(tensor: Tensor) -> Tensor:
    """Return a weight with the parts of all ranks; every rank must call this."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def check_whole(model: PreTrainedModel) -> None:
    """Refuse to save or load a prompt cache for a model that is spread over ranks.

    Raises:
        ValueError: If the model is spread over ranks.
    """
    if (ranks := ranks_of(model)) > 1:
        raise ValueError(
            f"[prompt cache] A model must be in one process to save or load a prompt cache, but "
            f"{type(model).__name__} is spread over {ranks} ranks, each with its own KV heads; "
            "load it without tensor parallelism."
        )
