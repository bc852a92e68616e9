"""Tables for a terminal: no word and no number is ever split over two lines.

A table that is wider than the terminal gives way in this order: columns that are marked `extra` are left out, headers are
wrapped, texts are wrapped at their blanks, numbers such as "0 to 663,840" likewise, and the columns that still do not fit
go to a second table below. For example, at 80 columns ``lrkit run`` shows no time per step, and "trainable at start" takes
two lines. A text that is to stay on one line has `GLUE` for its blanks.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len

GAP = 2
"""Blanks between two columns."""

GLUE = "\N{NO-BREAK SPACE}"
"""A blank at which no line ends; it is printed as a blank."""

_COMFORTABLE = 28  # a text column is not wrapped to less than this if an extra column could go instead


class Column(NamedTuple):
    """One column.

    Args:
        header: its name, which may be wrapped at its blanks.
        number: set to the right, and wrapped after everything else.
        extra: left out first, the last such column before the others.
    """

    header: str
    number: bool = False
    extra: bool = False


class Table(NamedTuple):
    """A table as lines.

    Args:
        header: lines of the header.
        rows: lines of all rows, below each other.
        width: the widest line.
    """

    header: list[str]
    rows: list[str]
    width: int


def lay_out(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None
) -> tuple[list[Table], list[str]]:
    """Lay a table out in a terminal's width.

    Args:
        columns: the columns, the one that names a row first.
        rows: one text per column.
        width: columns of the terminal; None if there is no width to fit into.

    Returns:
        One table, or several if not all columns fit beside each other; and the headers of the columns left out.
    """
    measured = [_Measured(column, [row[index] for row in rows]) for index, column in enumerate(columns)]
    chosen = list(range(len(columns)))
    if width is None:
        return [_table(measured, [each.natural for each in measured])], []
    left_out: list[str] = []
    for index in [index for index in reversed(chosen) if columns[index].extra]:
        if _sum([measured[i].comfortable for i in chosen]) <= width:
            break
        chosen.remove(index)
        left_out.insert(0, columns[index].header)
    tables = []
    for group in _groups([measured[index].least for index in chosen], width):
        parts = [measured[chosen[index]] for index in group]
        tables.append(_table(parts, _fitted(parts, width)))
    return tables, left_out


def wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines at its blanks; a word that is longer than a line stays whole."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


class _Measured:
    """A column with its texts, and how wide it is at its widest and at its narrowest."""

    def __init__(self, column: Column, texts: Sequence[str]) -> None:
        self.column, self.texts = column, texts
        self.cells = max(map(cell_len, texts), default=0)
        self.unbroken = max((cell_len(word) for text in texts for word in text.split(" ")), default=0)
        self.head = max(map(cell_len, column.header.split(" ")))

    @property
    def natural(self) -> int:
        """The width at which nothing is wrapped."""
        return max(self.cells, cell_len(self.column.header))

    @property
    def least(self) -> int:
        """The width below which a word or a number would be broken."""
        return max(self.unbroken, self.head)

    @property
    def comfortable(self) -> int:
        """The width that is worth more than an extra column."""
        return self.natural if self.column.number else max(self.least, min(self.natural, _COMFORTABLE))

    @property
    def under_header(self) -> int:
        """The width at which the header alone is wrapped."""
        return max(self.cells, self.head)


def _sum(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _groups(least: Sequence[int], width: int) -> list[list[int]]:
    """Share columns among tables, each of which begins with the first column."""
    groups = [[0]]
    for index in range(1, len(least)):
        if len(groups[-1]) > 1 and _sum([least[i] for i in [*groups[-1], index]]) > width:
            groups.append([0])
        groups[-1].append(index)
    return groups


def _fitted(parts: Sequence[_Measured], width: int) -> list[int]:
    """Narrow columns until they fit: those that a long header makes wide, then those with texts, then numbers."""
    widths = [part.natural for part in parts]
    headers = [part.under_header for part in parts]
    texts = [part.under_header if part.column.number else part.least for part in parts]
    for floors in (headers, texts, [part.least for part in parts]):
        while _sum(widths) > width:
            slack = [have - floor for have, floor in zip(widths, floors, strict=True)]
            widest = max(range(len(widths)), key=lambda i: (slack[i] > 0, widths[i]))
            if slack[widest] <= 0:
                break
            widths[widest] -= 1
    return widths


def _table(parts: Sequence[_Measured], widths: Sequence[int]) -> Table:
    heads = [wrapped(part.column.header, width) for part, width in zip(parts, widths, strict=True)]
    deepest = max(map(len, heads))
    heads = [[""] * (deepest - len(lines)) + lines for lines in heads]
    bodies = [[wrapped(text, width) for text in part.texts] for part, width in zip(parts, widths, strict=True)]
    needed = [
        max(cell_len(line) for lines in (head, *body) for line in lines)
        for head, body in zip(heads, bodies, strict=True)
    ]
    rights = [part.column.number for part in parts]
    header = _lines(heads, needed, rights)
    rows = [line for row in zip(*bodies, strict=True) for line in _lines(row, needed, rights)]
    return Table(header, rows, _sum(needed))


def _lines(cells: Sequence[Sequence[str]], widths: Sequence[int], rights: Sequence[bool]) -> list[str]:
    """Set one row's cells beside each other."""
    lines = []
    for index in range(max(map(len, cells))):
        texts = [cell[index] if index < len(cell) else "" for cell in cells]
        padded = [
            " " * (width - cell_len(text)) + text if right else text + " " * (width - cell_len(text))
            for text, width, right in zip(texts, widths, rights, strict=True)
        ]
        lines.append((" " * GAP).join(padded).replace(GLUE, " ").rstrip())
    return lines
