"""How commands tell of mistakes: in one line on stderr, with exit status 1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import typer

from codec.batch import PlanError
from codec.jobs import UserError, reason_of


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A mistake in the input is one line on stderr and exit status 1, never a traceback."""
    try:
        yield
    except PlanError as error:
        raise typer.BadParameter(str(error)) from error
    except BrokenPipeError:
        fail("standard output was closed")
    except (UserError, ValueError, OSError, MemoryError) as error:
        fail(reason_of(error))


def fail(*reasons: str) -> NoReturn:
    """Each of these in a line of stderr, and exit status 1."""
    for reason in reasons:
        typer.echo("codec: " + " ".join(reason.split()), err=True)
    raise typer.Exit(1)
