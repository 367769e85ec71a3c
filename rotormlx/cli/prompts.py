"""Checks of prompts: made once the tokenizer is loaded, before the weights are read."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from mlx_lm.processors import load_processor

from rotormlx.cli.refusal import Refusal
from rotormlx.cli.rules import option


def check(
    name: str, args: argparse.Namespace, given: Collection[str], loaded: tuple[Any, ...]
) -> None:
    """Refuse a prompt, or an option about it, that the model does not support.

    Args:
        name: The command of mlx-lm.
        args: The options of the command.
        given: The names of the options that the user gave.
        loaded: Model and tokenizer, and the configuration if mlx-lm asked for it.

    Raises:
        Refusal: If there is no prompt, or an option needs a chat template, images or a larger
            vocabulary than the model has.
    """
    model, tokenizer = loaded[:2]
    has_template = tokenizer.has_chat_template
    if name == "chat" and not has_template:
        raise Refusal(
            f"[chat] A chat needs a model with a chat template, but {args.model} has none; use "
            "rotormlx generate."
        )
    if name == "generate" and not has_template:
        for dest in ("system_prompt", "prefill_response", "chat_template_config"):
            if dest in given:
                raise Refusal(
                    f"[generate] {option(dest)} has no effect on a model without a chat template; "
                    "leave it out."
                )
    raw = not has_template or getattr(args, "ignore_chat_template", False)
    prompt = getattr(args, "prompt", None)
    if prompt is not None and prompt != "-" and raw and not len(tokenizer.encode(prompt)):
        raise Refusal(
            f"[{name}] The prompt must have at least one token, but {prompt!r} has none; write one."
        )
    if getattr(args, "image", None) and load_processor(model, loaded[2]) is None:
        raise Refusal(
            f"[generate] --image needs a model that takes images, but {args.model} takes text only."
        )
    vocabulary = vocabulary_of(model, tokenizer)
    for dest in ("top_k", "min_tokens_to_keep"):
        value = getattr(args, dest, 0)
        if value >= vocabulary:
            raise Refusal(
                f"[{name}] {option(dest)} must be less than the {vocabulary} tokens of the "
                f"vocabulary, but {value} was given."
            )


def vocabulary_of(model: Any, tokenizer: Any) -> int:
    """Return the size of a model's vocabulary; the tokenizer's if the model does not give one."""
    args = getattr(model, "args", None)
    sizes = []
    for holder in (args, getattr(args, "text_config", None)):
        size = holder.get("vocab_size") if isinstance(holder, dict) else None
        size = getattr(holder, "vocab_size", size)
        if isinstance(size, int):
            sizes.append(size)
    return min(sizes, default=int(tokenizer.vocab_size))
