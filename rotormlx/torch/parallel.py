"""Models that transformers spreads over ranks by tensor parallelism: each has its own KV heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

# Layers whose output holds the keys, alone or with what else is projected.
_KEY_LAYERS = ("k_proj", "qkv_proj", "query_key_value")


def ranks_of(model: PreTrainedModel) -> int:
    """Ranks that share a model's heads; 1 where it is whole."""
    return getattr(model, "tp_size", None) or 1


def check_heads(model: PreTrainedModel) -> None:
    """Refuse a model whose KV heads do not go round; transformers itself cannot run it either.

    Raises:
        ValueError: If the ranks do not divide the KV heads that they are to share.
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
    """Which share of a model's KV heads is here.

    Returns:
        The place of the share, and how many there are: ranks hold neighbouring heads, in order.
    """
    weight: Any  # if it is shared, a DTensor, of which not every build of torch knows
    for name, weight in model.named_parameters():
        if f".{_KEY_LAYERS[0]}.weight" in name and is_shared(weight):
            mesh = weight.device_mesh
            axis = None if mesh.ndim == 1 else "tp"
            return mesh.get_local_rank(axis), ranks_of(model)
    return 0, 1


def is_shared(tensor: Tensor) -> bool:
    """Whether this process has a part of a weight; all ranks together have the whole."""
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def whole(tensor: Tensor) -> Tensor:
    """A weight with the parts of all ranks, each of which must call this."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def check_whole(model: PreTrainedModel) -> None:
    """Refuse to store or read the prompt cache of a model of which this process has a part.

    Raises:
        ValueError: If the model is spread over ranks.
    """
    if (ranks := ranks_of(model)) > 1:
        raise ValueError(
            f"[prompt cache] A model must be in one process for files of prompt caches, but "
            f"{type(model).__name__} is spread over {ranks} ranks, each with its own KV heads; "
            "load it without tensor parallelism."
        )
