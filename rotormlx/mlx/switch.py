"""Application of the environment variable ROTORMLX to loaded models, for rotormlx_switch.py.

Each model gets one line: the summary of its report, or why it keeps its own caches. The lines go to
the logger ``rotormlx``, which writes to standard error unless the program gave it a handler.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from rotormlx.config import RotorConfig
from rotormlx.mlx.environment import VARIABLE, requested


def load_model(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Load a model, with compressed caches if ROTORMLX is set.

    Args:
        own: ``load_model`` of mlx-lm or mlx-vlm.
        *args: The arguments of ``own``.
        **kwargs: The named arguments of ``own``.

    Returns:
        The result of ``own``: a model, or a tuple whose first entry is a model. A model that cannot
        be compressed keeps its own caches.

    Raises:
        ValueError: If ROTORMLX is not a valid configuration.
    """
    config = requested()
    loaded = own(*args, **kwargs)
    if config is not None:
        _compress(loaded[0] if isinstance(loaded, tuple) else loaded, config)
    return loaded


def _compress(model: Any, config: RotorConfig) -> None:
    log, setting = _log(), f"{VARIABLE}={os.environ[VARIABLE]}"
    try:
        # Imported here, because the import itself fails with an unsupported mlx-lm.
        from rotormlx.mlx import integration  # noqa: PLC0415

        report = integration.apply(model, config)
    except Exception as error:  # the program must run as without ROTORMLX, and log why
        known = isinstance(error, (ValueError, RuntimeError))
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        log.warning("rotormlx: %s: a model keeps its own caches: %s", setting, reason)
    else:
        log.info("rotormlx: %s: %s", setting, report.summary)


def _log() -> logging.Logger:
    log = logging.getLogger("rotormlx")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
        log.propagate = False  # a root handler would write the same line again
    return log
