"""Models that transformers spreads over ranks by tensor parallelism: each has its own KV heads."""

from __future__ import annotations

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


def check_whole(model: PreTrainedModel) -> None:
    """Refuse to read the weights of a model of which this process has a part.

    Raises:
        ValueError: If the model is spread over ranks.
    """
    if (ranks := ranks_of(model)) > 1:
        raise ValueError(
            f"[fingerprint] A model must be in one process for calibrations and for files of "
            f"prompt caches, but {type(model).__name__} is spread over {ranks} ranks, each with "
            "its own KV heads; load it without tensor parallelism."
        )
