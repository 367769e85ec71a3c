"""The configuration that ROTORMLX in the environment asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rotormlx.config import RotorConfig

VARIABLE = "ROTORMLX"
_off: ContextVar[bool] = ContextVar("off", default=False)


def requested() -> RotorConfig | None:
    """The configuration that the environment asks for; None if it asks for none.

    Raises:
        ValueError: If ROTORMLX is no configuration.
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
    """Load models as they are, because the caller compresses them as it was told to."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)
