"""Keeps ``mlx_lm server`` running whatever a request contains.

mlx-lm generates for all clients in one thread, and one exception ends that thread for good. An
empty prompt, a stop word that is a number or a ``top_k`` beyond the vocabulary is enough. The guard
checks each request before the thread gets it, and answers an invalid one with status 400 and a
sentence. If an exception happens nevertheless, running requests are answered with status 500, and
generation continues with the next one.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from rotormlx.cli.prompts import vocabulary_of
from rotormlx.cli.refusal import Refusal

MOST_TOKENS = 2**20  # of a prompt and its answer together
MOST_BYTES = 2**26  # of the body of a request, images included
STALLED_S = 300  # a client that sends or receives nothing for so many seconds is disconnected
# By class of mlx-lm's server: its methods, and the methods of _Guard that replace them.
_REPLACED = {
    "ResponseGenerator": {
        "_run_generate": "run_generate",
        "_next_request": "next_request",
        "_tokenize": "tokenize",
        "stop_and_join": "stop_and_join",
    },
    "ModelProvider": {"_load": "load"},
    "APIHandler": {
        "do_POST": "do_post",
        "do_GET": "do_get",
        "validate_model_parameters": "validate",
        "_set_completion_headers": "set_headers",
        "flush_headers": "flush_headers",
    },
}
_INTEGERS = ("max_tokens", "top_k", "num_draft_tokens", "top_logprobs", "seed")
_SIZES = ("repetition_context_size", "presence_context_size", "frequency_context_size")
_NUMBERS = (
    *("temperature", "top_p", "min_p", "xtc_probability", "xtc_threshold"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


class BadRequest(ValueError):
    """An invalid request."""


@contextmanager
def guarded(
    tool: ModuleType, probe: Callable[[str, str | None], None]
) -> Iterator[Callable[[], int]]:
    """Guard a server against every request while this context is open.

    Args:
        tool: ``mlx_lm.server``.
        probe: Called with a model and an adapter; raises if they cannot be loaded.

    Yields:
        A function that returns how often generation was restarted.
    """
    guard = _Guard(tool, probe)
    with ExitStack() as stack:
        for (owner, name), own in guard.own.items():
            if own is None:
                logging.warning("rotormlx: mlx-lm's server no longer has %s.%s", owner, name)
                continue
            function = _method(getattr(guard, _REPLACED[owner][name]))
            stack.enter_context(patch.object(getattr(tool, owner), name, function))
        for name in ("scan_cache_dir", "GenerationContext"):
            if hasattr(tool, name):
                stack.enter_context(patch.object(tool, name, getattr(guard, name)))
        stack.enter_context(patch.object(tool.APIHandler, "timeout", STALLED_S))
        try:
            yield lambda: guard.restarts
        finally:
            guard.stop()


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return method


class _Guard:
    """Replacements for methods of mlx-lm's server; the first argument is the method's own ``self``.

    Args:
        tool: ``mlx_lm.server``.
        probe: Called with a model and an adapter; raises if they cannot be loaded.
    """

    def __init__(self, tool: ModuleType, probe: Callable[[str, str | None], None]) -> None:
        self.tool = tool
        self.probe = probe
        self.restarts = 0
        self._taken = 0  # requests that the generation thread has taken
        self._waiting: weakref.WeakSet[Any] = weakref.WeakSet()  # the queues of their answers
        self._running: weakref.WeakSet[Any] = weakref.WeakSet()  # contexts with a method stop()
        self._generators: weakref.WeakSet[Any] = weakref.WeakSet()
        # None for a method that mlx-lm no longer has; it is not replaced.
        self.own: dict[tuple[str, str], Any] = {
            (owner, name): getattr(getattr(tool, owner), name, None)
            for owner, names in _REPLACED.items()
            for name in names
        }
        self._own_scan: Any = getattr(tool, "scan_cache_dir", None)
        running = self._running

        class Context(getattr(tool, "GenerationContext", object)):  # type: ignore[misc]
            __hash__ = object.__hash__

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                running.add(self)

        self.GenerationContext = Context

    # ---- the generation thread ------------------------------------------------------------------

    def run_generate(self, generator: Any) -> None:
        """Generate until the server stops; restart after an exception."""
        self._generators.add(generator)
        try:
            self._generate_on(generator)
        finally:
            # MLX's CPU build aborts at exit if a thread has left streams behind.
            mx.clear_streams()

    def _generate_on(self, generator: Any) -> None:
        while not generator._stop:
            before = self._taken
            try:
                generator._generate()
            except Exception as error:
                logging.exception("rotormlx: generation stopped and is restarted")
                for answers in list(self._waiting):
                    answers.put(RuntimeError(f"generation stopped: {error}"))
                self._waiting.clear()
                self.restarts += 1
                if self._taken == before:  # no request was taken: the model cannot be loaded
                    generator._generation_failed = True
                    return
            gc.collect()
            mx.clear_cache()

    def next_request(self, generator: Any, timeout: float | None = None) -> Any:
        """Return the next request, and remember the queue of its answers."""
        request = self.own["ResponseGenerator", "_next_request"](generator, timeout)
        if request is not None:
            self._taken += 1
            self._waiting.add(request[0])
        return request

    def tokenize(self, generator: Any, tokenizer: Any, request: Any, args: Any) -> Any:
        """Tokenize as mlx-lm does, but refuse prompts that would stop generation later."""
        try:
            result = self.own["ResponseGenerator", "_tokenize"](generator, tokenizer, request, args)
        except Exception as error:
            raise BadRequest(
                f"the prompt cannot be read: {error or type(error).__name__}"
            ) from error
        prompt = result[0]
        if not prompt:
            raise BadRequest("prompt must not be empty")
        if len(prompt) + args.max_tokens > MOST_TOKENS:
            raise BadRequest(
                f"prompt and answer must have at most {MOST_TOKENS} tokens, but the prompt has "
                f"{len(prompt)} and max_tokens is {args.max_tokens}"
            )
        vocabulary = vocabulary_of(generator.model_provider.model, tokenizer)
        if args.sampling.top_k >= vocabulary:
            raise BadRequest(f"top_k must be less than the vocabulary of {vocabulary} tokens")
        if any(not 0 <= token < vocabulary for token in args.logits.logit_bias or ()):
            raise BadRequest(f"logit_bias must name tokens from 0 to {vocabulary - 1}")
        return result

    def load(self, provider: Any, path: str, adapter: Any = None, draft: Any = None) -> None:
        """Load as mlx-lm does, but refuse a bad model before the current one is unloaded."""
        if provider.model is not None:
            self.probe(path, adapter)
            if draft is not None:
                self.probe(draft, None)
        self.own["ModelProvider", "_load"](provider, path, adapter, draft)

    def stop_and_join(self, generator: Any) -> None:
        """Stop as mlx-lm does, without waiting for the end of long answers."""
        generator._stop = True
        for context in list(self._running):
            context.stop()
        self.own["ResponseGenerator", "stop_and_join"](generator)

    def stop(self) -> None:
        """Stop the remaining generation threads, so that the process can exit."""
        for generator in list(self._generators):
            self.stop_and_join(generator)

    # ---- the handlers of requests ---------------------------------------------------------------

    def do_post(self, handler: Any) -> None:
        """Answer any POST request, valid or not."""
        length = handler.headers.get("Content-Length", "")
        if length.strip().lstrip("+-").isdecimal() and not 0 <= int(length[:20]) <= MOST_BYTES:
            _answer(handler, 413, f"a request must have from 0 to {MOST_BYTES} bytes")
            return
        self._answered(handler, "do_POST")

    def do_get(self, handler: Any) -> None:
        """Answer any GET request, even if an error occurs."""
        self._answered(handler, "do_GET")

    def _answered(self, handler: Any, name: str) -> None:
        handler.rotormlx_flushed = handler.rotormlx_checked = False
        try:
            self.own["APIHandler", name](handler)
        except OSError:  # the client has disconnected or stalled
            handler.close_connection = True
        except Exception as error:
            logging.warning("rotormlx: a request failed: %s: %s", type(error).__name__, error)
            status = 500 if handler.rotormlx_checked else 400
            _answer(handler, status, f"{type(error).__name__}: {error}"[:500])

    def flush_headers(self, handler: Any) -> None:
        """Send headers as http.server does; after that, the status is final."""
        handler.rotormlx_flushed = True
        self.own["APIHandler", "flush_headers"](handler)

    def set_headers(self, handler: Any, status_code: int = 200) -> None:
        """Set headers; replace the 404 that mlx-lm gives for errors of generation by 400 or 500."""
        error = sys.exc_info()[1]
        if status_code == 404 and error is not None and not isinstance(error, Refusal):
            status_code = 400 if isinstance(error, BadRequest) else 500
        self.own["APIHandler", "_set_completion_headers"](handler, status_code)

    def validate(self, handler: Any) -> None:
        """Validate as mlx-lm does, after the checks of :func:`check_parameters`."""
        check_parameters(handler, handler.body)
        self.own["APIHandler", "validate_model_parameters"](handler)
        handler.rotormlx_checked = True

    def scan_cache_dir(self, *args: Any, **kwargs: Any) -> Any:
        """Return the models in the hub's cache; an empty list if there is no cache."""
        try:
            return self._own_scan(*args, **kwargs)
        except Exception as error:  # huggingface_hub raises its own types
            logging.info("rotormlx: no models of the hub: %s", error)
            return SimpleNamespace(repos=())


def check_parameters(given: Any, body: dict[str, Any]) -> None:
    """Refuse parameters that mlx-lm does not check, or checks only in part.

    Args:
        given: An object with the parameters as attributes, defaults included.
        body: The JSON body of the request.

    Raises:
        BadRequest: If a parameter has the wrong type or is out of range.
    """
    for name in (*_INTEGERS, *_SIZES):
        if isinstance(getattr(given, name, None), bool):
            raise BadRequest(f"{name} must be a whole number")
    for name in _NUMBERS:
        value = getattr(given, name, None)
        if value is None:  # mlx-lm checks whether it may be missing
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadRequest(f"{name} must be a number")
        if not abs(value) <= sys.float_info.max:  # NaN, infinite, or an integer beyond floats
            raise BadRequest(f"{name} must be finite")
        setattr(given, name, float(value))
    for name in ("max_tokens", *_SIZES, "num_draft_tokens"):
        value = getattr(given, name, None)
        if isinstance(value, int) and value > MOST_TOKENS:
            raise BadRequest(f"{name} must be at most {MOST_TOKENS}")
    seed = getattr(given, "seed", None)
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**64):
        raise BadRequest("seed must be a whole number from 0 to 2**64 - 1")
    if not 0 <= (getattr(given, "xtc_threshold", None) or 0) <= 0.5:
        raise BadRequest("xtc_threshold must be from 0 to 0.5")
    if not isinstance(getattr(given, "requested_draft_model", ""), str):
        raise BadRequest("draft_model must be a string")
    _check_bias(getattr(given, "logit_bias", None))
    _check_body(body)


def _check_bias(bias: Any) -> None:
    try:
        fine = not bias or all(
            0 <= int(token) < 2**31 and math.isfinite(float(value)) for token, value in bias.items()
        )
    except (AttributeError, TypeError, ValueError, OverflowError):
        fine = False
    if not fine:
        raise BadRequest("logit_bias must be an object of tokens and finite numbers")


def _check_body(body: dict[str, Any]) -> None:
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise BadRequest("stop must be a string that is not empty, or a list of them")
    options = body.get("stream_options")
    if options is not None:
        if not isinstance(options, dict):
            raise BadRequest("stream_options must be an object")
        options.setdefault("include_usage", False)
    for name in ("chat_template_kwargs", "role_mapping"):
        if not isinstance(body.get(name, {}), (dict, type(None))):
            raise BadRequest(f"{name} must be an object")
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRequest("tools must be a list of objects")
    messages = body.get("messages", [])
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRequest("messages must be a list of objects")
    for message in messages:
        content = message.get("content")
        is_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not isinstance(message.get("role"), str) or not (
            content is None or isinstance(content, str) or is_parts
        ):
            raise BadRequest("a message must have a role, and a content of text or of parts")
    prompt = body.get("prompt", "")
    if not isinstance(prompt, str):
        raise BadRequest("prompt must be a string")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRequest("texts must be Unicode, but one has half of a surrogate pair") from None


def _answer(handler: Any, status: int, message: str) -> None:
    """Send an error; if a status was already sent, only a stream gets it, as an event."""
    handler.close_connection = True
    try:
        text = json.dumps({"error": message})
        if getattr(handler, "rotormlx_flushed", False):
            if getattr(handler, "stream", False):
                handler.wfile.write(f"data: {text}\n\n".encode())
            return
        handler._headers_buffer = []
        handler.send_response(status)
        handler.send_header("Content-type", "application/json")
        handler.end_headers()
        handler.wfile.write(text.encode())
    except OSError:
        pass  # the client has disconnected
