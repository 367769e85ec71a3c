"""The configuration given by the environment variable ROTORMLX."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rotormlx.config import RotorConfig

VARIABLE = "ROTORMLX"
_off: ContextVar[bool] = ContextVar("off", default=False)


def requested() -> RotorConfig | None:
    """Return the configuration given by ROTORMLX; None if there is none.

    Raises:
        ValueError: If ROTORMLX is not a valid configuration.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if _off.get() or text.lower() in ("", "0", "off"):
        return None
    try:
        return RotorConfig.from_text(text)
    except ValueError as error:
        raise ValueError(f"[{VARIABLE}] {str(error).partition('] ')[2]}") from error


@contextmanager
def off() -> Iterator[None]:
    """Ignore ROTORMLX in this context, where the caller compresses models itself."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)
