"""Refusals: one sentence on standard error and exit status 2, instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup


class Refusal(Exception):
    """What was asked cannot be done; the message is one sentence for the user."""


class RefusingGroup(TyperGroup):
    """A command line that prints a :class:`Refusal` of any of its commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            # Standard output belongs to the generated text.
            typer.echo(f"rotormlx: {refusal}", err=True)
            raise typer.Exit(2) from None


@contextmanager
def refusing(*kinds: type[Exception], where: tuple[str, ...] = ("",)) -> Iterator[None]:
    """Turn errors into refusals.

    Args:
        *kinds: Which errors.
        where: What their messages start with, such as ``"[quality]"``; other errors pass.
    """
    try:
        yield
    except kinds as error:
        if not str(error).startswith(where):
            raise
        text = error.strerror if isinstance(error, OSError) else None  # without its number
        raise Refusal(text or str(error)) from error
