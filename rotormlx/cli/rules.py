"""Checks of mlx-lm's options: allowed values, and combinations without effect.

mlx-lm accepts any number, and ignores an option that has no effect together with another. These
checks refuse both before a model is loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from rotormlx.cli.options import MOST, option_of
from rotormlx.cli.refusal import Refusal, sentence
from rotormlx.config import RotorConfig
from rotormlx.report import Report


class Range(NamedTuple):
    """The smallest and largest value of an option, and one further allowed value."""

    least: float
    most: float
    besides: float | None = None


_COUNT = Range(1, MOST)
RANGES: dict[str, Range] = {
    "max_tokens": Range(1, MOST, -1),  # -1: without end
    "temp": Range(0, 1e6),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "top_k": Range(0, MOST),
    "min_tokens_to_keep": _COUNT,
    "xtc_probability": Range(0, 1),
    "xtc_threshold": Range(0, 0.5),
    "seed": Range(0, 2**64 - 1),
    "prefill_step_size": _COUNT,
    "max_kv_size": _COUNT,
    "num_draft_tokens": _COUNT,
    "batch_size": _COUNT,
    "sequence_length": Range(2, MOST),
    "num_samples": Range(1, MOST, -1),  # -1: all
    "prompt_tokens": _COUNT,
    "generation_tokens": _COUNT,
    "num_trials": _COUNT,
    "delay": Range(0, MOST),
    "num_shots": Range(0, MOST),
    "limit": _COUNT,
    "port": Range(0, 65535),
    "decode_concurrency": _COUNT,
    "prompt_concurrency": _COUNT,
    "prompt_cache_size": Range(0, MOST),
    "prompt_cache_bytes": Range(0, 2**63 - 1),
}
# By command and option: ranges narrower than those of the other commands.
_NARROWER: dict[tuple[str, str], Range] = {
    ("server", "max_tokens"): _COUNT,
    ("evaluate", "max_tokens"): _COUNT,
    ("perplexity", "seed"): Range(0, 2**32 - 1),  # the range of numpy's seeds
    ("evaluate", "seed"): Range(0, 2**32 - 1),
}
_DATA_SUFFIXES = (".txt", ".text", ".md", ".rst", ".json", ".jsonl", ".csv", ".parquet")


def check(name: str, args: argparse.Namespace, given: Collection[str], processes: int) -> None:
    """Refuse options that mlx-lm would ignore or fail on.

    Args:
        name: The command.
        args: The options of the command.
        given: The names of the options that the user gave; the others have their defaults.
        processes: Number of processes that share the model.

    Raises:
        Refusal: If a value is out of range, a file is missing, or options do not fit together.
    """
    for dest, value in vars(args).items():
        allowed = _NARROWER.get((name, dest), RANGES.get(dest))
        if allowed is None or value is None or value == allowed.besides:
            continue
        if not allowed.least <= value <= allowed.most or not math.isfinite(value):
            besides = "" if allowed.besides is None else f", or {allowed.besides}"
            raise Refusal(
                f"[{name}] {option(dest)} must be from {allowed.least} to {allowed.most}{besides}, "
                f"but {value} was given; see rotormlx {name} --help."
            )
    _check_texts(name, args, given)
    _check_files(name, args)
    for rule in _CONFLICTS:
        if rule.applies(name, args, set(given), processes):
            raise Refusal(f"[{name}] {rule.reason(args)}.")
    if name == "server":
        _check_address(args.host, args.port)


def option(dest: str) -> str:
    """Return an option as it is written on the command line."""
    return "--" + dest.replace("_", "-")


def _check_texts(name: str, args: argparse.Namespace, given: Collection[str]) -> None:
    for dest in ("model", "draft_model", "data_path", "prompt_cache_file", "host"):
        if getattr(args, dest, None) == "":
            raise Refusal(f"[{name}] {option(dest)} must not be empty; leave it out or name one.")
    if "" in getattr(args, "extra_eos_token", ()):
        raise Refusal(f"[{name}] --extra-eos-token must not be empty; leave it out.")
    for dest in ("chat_template_config", "chat_template_args"):
        if dest not in given:
            continue
        value = getattr(args, dest)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, dict):
            raise Refusal(
                f"[{name}] {option(dest)} must be a JSON object such as "
                f"'{{\"enable_thinking\": false}}', but {str(getattr(args, dest))[:60]!r} was "
                "given; correct it."
            )


def _check_files(name: str, args: argparse.Namespace) -> None:
    for image in getattr(args, "image", None) or ():
        if not is_file(image):
            raise Refusal(f"[{name}] No such image file: {image[:200]}; check the path.")
    adapter = getattr(args, "adapter_path", None)
    if adapter is not None and not is_file(Path(adapter) / "adapter_config.json"):
        raise Refusal(
            f"[{name}] --adapter-path must be a folder with an adapter_config.json, but "
            f"{adapter[:200] or 'an empty path'} has none; check the path."
        )
    data = getattr(args, "data_path", None)
    if data is not None and not is_file(data) and not is_folder(data):
        relative = data.startswith((".", "~", "/")) or data.count("/") > 1
        if relative or len(data) > 200 or Path(data).suffix.lower() in _DATA_SUFFIXES:
            raise Refusal(f"[{name}] No such text file: {data[:200]}; check the path.")


def is_file(path: str | Path) -> bool:
    """Return whether a path is a file; false for a path that the system does not accept."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_same_model(a: str, b: str) -> bool:
    """Return whether two names are the same repository, or two paths the same folder."""
    return a == b or (is_folder(a) and is_folder(b) and Path(a).resolve() == Path(b).resolve())


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a folder; false for a path that the system does not accept."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


class _Conflict(NamedTuple):
    applies: Callable[[str, Any, set[str], int], bool]
    reason: Callable[[Any], str]


def _without_effect(dest: str, why: str) -> Callable[[Any], str]:
    return lambda args: f"{option(dest)} has no effect {why}; leave it out"


def _template_options(dest: str) -> _Conflict:
    return _Conflict(
        lambda name, args, given, n: {dest, "ignore_chat_template"} <= given,
        _without_effect(dest, "with --ignore-chat-template"),
    )


def _sampling(dest: str) -> _Conflict:
    return _Conflict(
        lambda name, args, given, n: (
            name in ("generate", "chat", "evaluate") and dest in given and args.temp == 0
        ),
        _without_effect(dest, "at --temp 0, which is greedy; give a --temp"),
    )


def _needs(dest: str, needed: str, off: object) -> _Conflict:
    return _Conflict(
        lambda name, args, given, n: dest in given and getattr(args, needed, off) == off,
        _without_effect(dest, f"without {option(needed)}"),
    )


def _excludes(dest: str, other: str, why: str) -> _Conflict:
    return _Conflict(
        lambda name, args, given, n: {dest, other} <= given,
        lambda args: f"{option(dest)} and {option(other)} do not fit together: {why}",
    )


def _sharded(dest: str) -> _Conflict:
    return _Conflict(
        lambda name, args, given, n: (
            n > 1 and dest in given and name in ("chat", "server", "benchmark")
        ),
        _without_effect(dest, "in a run of several processes"),
    )


_CONFLICTS = (
    _excludes(
        "draft_model", "max_kv_size", "mlx-lm does not limit the caches of a draft model; leave "
        "one out",
    ),
    _excludes(
        "draft_model", "prompt_cache_file", "the file has no cache of the draft model; leave one "
        "out",
    ),
    _excludes("draft_model", "image", "speculative decoding takes text only; leave one out"),
    _Conflict(
        lambda name, args, given, n: (
            getattr(args, "draft_model", None) is not None
            and getattr(args, "max_tokens", None) == -1
        ),
        lambda args: "--draft-model needs a --max-tokens of at least 1, but -1 was given; "
        "give a number",
    ),
    # A server accepts it without --draft-model: a default for requests that name a draft model.
    _Conflict(
        lambda name, args, given, n: (
            name == "generate" and "num_draft_tokens" in given and args.draft_model is None
        ),
        _without_effect("num_draft_tokens", "without --draft-model"),
    ),
    *map(_template_options, ("system_prompt", "prefill_response", "chat_template_config")),
    *map(_sampling, ("top_p", "min_p", "top_k", "min_tokens_to_keep")),
    *map(_sampling, ("xtc_probability", "xtc_threshold")),
    _needs("min_tokens_to_keep", "min_p", 0),
    _needs("xtc_threshold", "xtc_probability", 0),
    *map(_sharded, ("adapter_path", "draft_model", "quantize_activations")),
    _Conflict(
        lambda name, args, given, n: n == 1 and getattr(args, "pipeline", False),
        _without_effect("pipeline", "in a single process; start several with mlx.launch"),
    ),
)  # fmt: skip


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be bound; otherwise the server would hang after loading."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except (OSError, UnicodeError) as error:
        raise Refusal(
            f"[server] The server cannot listen on port {port} of {host}: {sentence(error)}; "
            "choose another --host or --port."
        ) from error


def check_saved(path: str, asked: RotorConfig, given: dict[str, str], saved: Report) -> None:
    """Refuse options that contradict a saved cache, which keeps its own settings.

    Args:
        path: The file.
        asked: The configuration from the options of this run.
        given: The options that the user gave, from field to option name; only these are checked.
        saved: The report on the caches of the file.
    """
    for field, option in given.items():
        wanted, made = getattr(asked, field), getattr(saved.config, field)
        if field == "channel_scale":
            made = saved.config.used_channel_scale
        by_layer = field in ("key_bits", "value_bits") and not saved.has_mean
        if by_layer or wanted != made:
            own = option_of(field)
            kept = "bits by layer" if by_layer else f"{own} {made}"
            meant = f"{own} {wanted}" if option == own else f"{option}, {own} {wanted},"
            raise Refusal(
                f"[prompt cache] {path} keeps {kept}, the setting it was made with, but {meant} "
                f"was given; leave {option} out, or make the file again."
            )
