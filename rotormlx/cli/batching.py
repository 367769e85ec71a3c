"""Answers to the prompts of a file, many at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_lm
from mlx_lm.sample_utils import make_sampler

from rotormlx.cli.mlx_lm_commands import Session, say
from rotormlx.cli.refusal import Refusal
from rotormlx.cli.usage import Usage, measure
from rotormlx.mlx import integration

# A prompt as it was given: text, or chat messages.
Prompt = str | list[dict[str, str]]


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts: one a line, in a ``.jsonl`` file as JSON.

    There a line is a string, a list of chat messages, or an object with one of them as its
    ``prompt`` or ``messages``.

    Raises:
        Refusal: If the file is missing or empty, or a line is none of these.
    """
    if not path.is_file():
        raise Refusal(f"[batch] A file of prompts is required, but {path} is none; check the path.")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise Refusal(f"[batch] At least one prompt is required, but {path} has none; write some.")
    if path.suffix != ".jsonl":
        return list(lines)
    return [_parsed(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def _parsed(line: str, where: str) -> Prompt:
    try:
        given = json.loads(line)
    except json.JSONDecodeError:
        given = None
    if isinstance(given, dict):
        given = given.get("prompt", given.get("messages"))
    is_chat = isinstance(given, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in given
    )
    if not given or not (isinstance(given, str) or is_chat):
        raise Refusal(
            f"[batch] A prompt must be a JSON string or a list of messages with role and content, "
            f"but {where} is {line[:60]!r}; correct it."
        )
    return given


def answer(
    session: Session,
    model_path: str,
    prompts: list[Prompt],
    *,
    max_tokens: int,
    batch_size: int,
    temp: float,
    use_chat_template: bool,
) -> list[dict[str, Any]]:
    """Answer prompts with a compressed batch, and say what it took.

    Args:
        session: Loads the model.
        model_path: A directory or the name of a repository.
        prompts: What :func:`read_prompts` returned.
        max_tokens: Longest answer, in tokens.
        batch_size: Most sequences at once.
        temp: Sampling temperature; 0 is greedy.
        use_chat_template: Whether the prompts go through the chat template, if there is one.

    Returns:
        A dictionary for each prompt: ``prompt``, ``text`` and the number of ``tokens``.

    Raises:
        Refusal: If the model cannot be used, or messages meet a model without a chat template.
    """
    model, tokenizer = session.load(model_path)[:2]
    chat = use_chat_template and tokenizer.has_chat_template
    if not chat and any(isinstance(prompt, list) for prompt in prompts):
        raise Refusal(
            f"[batch] Chat messages need a chat template, but {model_path} has none or it is "
            "switched off; give text."
        )
    encoded = [_encode(tokenizer, prompt, chat) for prompt in prompts]
    response: Any = mlx_lm.batch_generate(
        model,
        tokenizer,
        encoded,
        max_tokens=max_tokens,
        return_prompt_caches=True,
        return_token_ids=True,
        completion_batch_size=batch_size,
        prefill_batch_size=min(8, batch_size),
        sampler=make_sampler(temp),
    )
    report = integration.model_report(model)
    total = Usage()
    for caches in response.caches:
        total += measure(report, caches)
    say(f"{report.summary}\n{total.describe(len(prompts))}")
    session.print_peak(total)
    return [
        {"prompt": prompt, "text": text, "tokens": len(ids)}
        for prompt, text, ids in zip(prompts, response.texts, response.token_ids, strict=True)
    ]


def _encode(tokenizer: Any, prompt: Prompt, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
