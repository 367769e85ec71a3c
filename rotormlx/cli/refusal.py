"""Refusals: one sentence on standard error and exit status 2, instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

# typer exports only BadParameter; where the related classes are defined depends on its version.
_UsageError: Any = typer.BadParameter.__base__
_MissingParameter: Any = next(
    kind for kind in typer.BadParameter.__subclasses__() if kind.__name__ == "MissingParameter"
)
REFUSED = 2
INTERRUPTED = 130  # as a shell reports a process that Ctrl-C has ended


class Refusal(Exception):
    """A request that cannot be met; the message is one sentence for the user."""


class RefusingGroup(TyperGroup):
    """A group of commands that prints a :class:`Refusal` raised by any of them."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an interrupt prints one line."""
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            # Standard output belongs to the generated text.
            typer.echo(f"rotormlx: {refusal}", err=True)
            raise typer.Exit(REFUSED) from None
        except KeyboardInterrupt:
            typer.echo("rotormlx: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except _MissingParameter:
            raise  # typer prints the usage line, which names the missing argument
        except _UsageError as error:
            command = error.ctx.command_path if error.ctx else "rotormlx"
            name = command.rpartition(" ")[2]
            sentence = " ".join(error.format_message().split()).rstrip(".")
            typer.echo(f"rotormlx: [{name}] {sentence}; see {command} --help.", err=True)
            raise typer.Exit(REFUSED) from None


@contextmanager
def refusing(*kinds: type[Exception], where: tuple[str, ...] = ("",)) -> Iterator[None]:
    """Turn errors into refusals.

    Args:
        *kinds: The types of errors to turn.
        where: How their messages start, such as ``"[quality]"``; other errors pass unchanged.
    """
    try:
        yield
    except kinds as error:
        if not str(error).startswith(where):
            raise
        raise Refusal(sentence(error)) from error


def sentence(error: BaseException) -> str:
    """Return an error as one line; a system error loses its number but keeps its path."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
