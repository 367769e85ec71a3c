"""Runs a command of mlx-vlm with compressed caches, and reports their memory."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from rotormlx.cli import usage
from rotormlx.cli.mlx_lm_commands import say
from rotormlx.cli.refusal import Refusal, refusing, sentence
from rotormlx.config import RotorConfig
from rotormlx.mlx import hosts, integration

# Options of mlx-vlm for another kind of cache. They would have no effect, so they are refused.
REFUSED = ("--kv-bits", "--kv-key-bits", "--kv-value-bits", "--kv-quant-scheme")


def run(name: str, argv: list[str], config: RotorConfig, *, sliding_windows: bool) -> None:
    """Run ``mlx_vlm.<name>`` with compressed caches.

    Args:
        name: A command of mlx-vlm, such as ``generate``.
        argv: The options of the command.
        config: How keys and values are compressed.
        sliding_windows: Whether sliding windows are compressed where possible.

    Raises:
        Refusal: If mlx-vlm is not installed, an option asks for its own cache quantization, the
            model cannot be compressed, or mlx-vlm stops with an error.
    """
    if not hosts.MLX_VLM.is_available:
        raise Refusal(
            "[vlm] mlx-vlm is required for this command, but it is not installed; install it: "
            "pip install 'rotormlx[vlm]'."
        )
    quantizing = next((a for a in argv if a.partition("=")[0] in REFUSED), None)
    if quantizing is not None:
        raise Refusal(
            f"[vlm] rotormlx compresses the cache itself, but {quantizing} asks mlx-vlm for "
            "another cache; leave it out and use --key-bits and --value-bits."
        )
    utils = importlib.import_module("mlx_vlm.utils")
    session = _Session(config, sliding_windows, utils.load_model)
    with (
        patch.object(sys, "argv", [f"mlx_vlm.{name}", *argv]),
        patch.object(utils, "load_model", session.load_model),
        patch.object(integration.CompressedCaches, "limited", session.remembering()),
    ):
        try:
            importlib.import_module(f"mlx_vlm.{name}").main()
        except (ValueError, RuntimeError, OSError, MemoryError, ImportError) as error:
            stopped = f"[vlm] mlx_vlm {name} stopped: {sentence(error).rstrip('.')}."
            raise Refusal(stopped) from error
    session.print_usage()


class _Session:
    """A loader of models for a command; it remembers the caches that were made last."""

    def __init__(
        self, config: RotorConfig, sliding_windows: bool, load: Callable[..., Any]
    ) -> None:
        self._config = config
        self._sliding_windows = sliding_windows
        self._load = load
        self._latest: tuple[Any, list[Any]] | None = None

    def load_model(self, *args: Any, **options: Any) -> Any:
        """Load a model as mlx-vlm does, and compress its caches."""
        model = self._load(*args, **options)
        with refusing(ValueError, RuntimeError, where=("[apply]", "[hook]")):
            report = integration.apply(model, self._config, sliding_windows=self._sliding_windows)
        say(report.summary)
        return model

    def remembering(self) -> Callable[..., list[Any]]:
        """Return a function that makes compressed caches and remembers the latest ones."""
        make = integration.CompressedCaches.limited

        def limited(maker: integration.CompressedCaches, max_kv_size: int | None) -> list[Any]:
            made = make(maker, max_kv_size)
            self._latest = maker.report, made
            return made

        return limited

    def print_usage(self) -> None:
        """Print the size of the latest caches, if they hold tokens."""
        if self._latest is not None and usage.measure(*self._latest).tokens:
            say(usage.describe(*self._latest).splitlines()[-1])
