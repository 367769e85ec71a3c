"""The command ``rotormlx batch``: answers the prompts of a file, many at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from rotormlx.cli.mlx_lm_commands import Session, say
from rotormlx.cli.refusal import Refusal, sentence
from rotormlx.cli.usage import Usage, measure
from rotormlx.mlx import integration

# A prompt as the user gave it: text, or chat messages.
Prompt = str | list[dict[str, str]]


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts: one per line; in a ``.jsonl`` file, each line is JSON.

    A JSON line is a string, a list of chat messages, or an object with a ``prompt`` or
    ``messages``.

    Raises:
        Refusal: If the file is missing or empty, or a line is none of these.
    """
    if not path.is_file():
        raise Refusal(f"[batch] A file of prompts is required, but {path} is not a file; check it.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(
            f"[batch] The file of prompts must be text in UTF-8, but reading {path} failed: "
            f"{sentence(error)}."
        ) from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise Refusal(f"[batch] At least one prompt is required, but {path} has none; write some.")
    if path.suffix != ".jsonl":
        return list(lines)
    return [_parsed(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def _parsed(line: str, where: str) -> Prompt:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
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
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Answer prompts with a compressed batch, and report its memory.

    Args:
        session: Loads the model.
        model_path: A directory or the name of a repository.
        prompts: The prompts, as :func:`read_prompts` returns them.
        max_tokens: Maximum number of tokens per answer.
        batch_size: Maximum number of sequences at once.
        temp: Sampling temperature; 0 is greedy.
        use_chat_template: Whether to apply the chat template to the prompts, if there is one.
        write: Receives the answers in the order of the prompts, each as soon as it and all earlier
            ones are known. An answer has a ``prompt``, a ``text`` and the number of ``tokens``.
            After an interrupt, ``write`` receives all answers that are known.

    Raises:
        Refusal: If the model cannot be used, a prompt of chat messages is given without a chat
            template, or a prompt has no tokens.
    """
    model, tokenizer = session.load(model_path)[:2]
    chat = use_chat_template and tokenizer.has_chat_template
    if not chat and any(isinstance(prompt, list) for prompt in prompts):
        raise Refusal(
            f"[batch] Chat messages need a chat template, but {model_path} has none or it is "
            "switched off; give text."
        )
    encoded = [_encode(tokenizer, prompt, chat) for prompt in prompts]
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=batch_size,
        prefill_batch_size=min(8, batch_size),
        sampler=make_sampler(temp),
    )
    report, total, count = integration.model_report(model), Usage(), 0
    indices = {
        uid: i for i, uid in enumerate(generator.insert(encoded, [max_tokens] * len(encoded)))
    }
    tokens: list[list[int]] = [[] for _ in prompts]
    known: dict[int, dict[str, Any]] = {}  # answers that wait for an earlier one
    try:
        while responses := generator.next_generated():
            for response in responses:
                index = indices[response.uid]
                if response.finish_reason != "stop":
                    tokens[index].append(response.token)
                if response.finish_reason is None:
                    continue
                total += measure(report, response.prompt_cache)
                text, size = tokenizer.decode(tokens[index]), len(tokens[index])
                known[index] = {"prompt": prompts[index], "text": text, "tokens": size}
                while count in known:
                    write(known.pop(count))
                    count += 1
    finally:
        generator.close()
        for _, late in sorted(known.items()):
            write(late)
        count += len(known)
        if count < len(prompts):
            say(f"{count} of {len(prompts)} prompts were answered")
        say(f"{report.summary}\n{total.describe(count)}")
        session.print_peak(total)


def _encode(tokenizer: Any, prompt: Prompt, chat: bool) -> list[int]:
    if not chat:
        ids = list(tokenizer.encode(prompt))
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError) as error:
            raise Refusal(
                f"[batch] The chat template does not accept the prompt {str(prompt)[:60]!r}: "
                f"{sentence(error)}; correct it."
            ) from error
    if not ids:
        raise Refusal(
            f"[batch] A prompt must have at least one token, but {str(prompt)[:60]!r} has none; "
            "correct it."
        )
    return ids
