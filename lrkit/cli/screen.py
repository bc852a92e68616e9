"""Print for people and for programs: tables and sentences that fit the terminal, JSON, and complaints on stderr."""

import json
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from lrkit.cli.tables import GLUE, Column, lay_out, wrapped
from lrkit.errors import LrkitWarning, cut


def width() -> int | None:
    """Return the terminal's columns; None if stdout is no terminal, so that there is no width to fit into."""
    from rich.console import Console

    console = Console()
    return console.width if console.is_terminal else None


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table as wide as the terminal at most.

    Args:
        columns: the columns, as `lrkit.cli.tables` takes them.
        rows: one text per column.
        title: a line above.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    room = width()
    tables, left_out = lay_out(columns, rows, room)
    if title:
        console.print(Text("\n".join(wrapped(title, room or sys.maxsize)), style="bold"))
        console.print()
    for each in tables:
        for line in each.header:
            console.print(Text(line, style="bold"))
        console.print(Text(("-" if console.options.ascii_only else "─") * each.width))
        for line in each.rows:
            console.print(Text(line))
        console.print()
    if left_out:
        say(f"Left out at {room} columns: {', '.join(left_out)}. A wider terminal or --json has it all.")


def whole(text: str) -> str:
    """Return a table's entry so that it stays on one line, as a number and its unit should."""
    return text.replace(" ", GLUE)


def say(text: str, *, reflow: bool = False) -> None:
    """Print sentences; on a terminal their lines are broken at blanks.

    Args:
        text: one line or several.
        reflow: whether a terminal's lines may join those of the text, as in a docstring's paragraphs.
    """
    if (room := width()) is not None:
        # A list's item begins a line of its own, and so does a line that is indented by more than an item's text.
        text = re.sub(r"(?<=\S)\n(?: {2})?(?=[^\s\-*>|])", " ", text) if reflow else text
        text = "\n".join(part for line in text.split("\n") for part in wrapped(line, room))
    typer.echo(text)


def say_below(term: str, text: str) -> None:
    """Print a term, and what it means indented below it."""
    room = width()
    say(term)
    for line in [text] if room is None else wrapped(text, max(20, room - 4)):
        typer.echo(f"    {line}" if line else "")


def say_json(value: Any) -> None:
    """Print plain data as JSON, with null for a number that is not finite."""
    typer.echo(json.dumps(finite(value), indent=1, allow_nan=False, default=str))


def finite(value: Any) -> Any:
    """Return plain data with None for each number that is not finite."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def complain(message: str) -> None:
    """Print one line on stderr."""
    print(f"lrkit: {cut(' '.join(message.split()))}", file=sys.stderr)  # noqa: T201


def left_out(name: str, why: object) -> None:
    """Warn that a method is missing from a list, and why."""
    warnings.warn(f"{name} is left out: {why}", LrkitWarning, stacklevel=2)
