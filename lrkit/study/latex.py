"""A study's tables in LaTeX: one float with the title as its caption, and the notes below. No torch here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lrkit.study.texts import latex

if TYPE_CHECKING:
    from lrkit.study.table import Column, Table


def latex_table(
    title: str, name: str, tables: "Sequence[tuple[str, Table, list[Column]]]", notes: Sequence[str]
) -> str:
    """Write one ``table`` of several ``tabular``, with the title as its caption and the notes below.

    Args:
        title: of the study.
        name: of the study, for the label.
        tables: a heading, which may be empty, a table and its columns each.
        notes: a sentence each.
    """
    label = "".join(c for c in name if c.isascii() and (c.isalnum() or c in "-."))
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{latex(title if title.endswith(('.', '!', '?')) else f'{title}.')}}}",
        rf"\label{{tab:{label}}}\par\medskip",
    ]
    for heading, table, columns in tables:
        lines += [rf"\textbf{{{latex(heading)}}}\par\smallskip"] if heading else []
        lines += _tabular(table, columns)
    told = [latex(note) for note in notes]
    if any(_best(table, column) for _, table, columns in tables for column in columns):
        told.insert(0, "Bold: the best mean.")
    if told:
        lines += [r"\begin{minipage}{\linewidth}\raggedright", r"\par ".join(told), r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _tabular(table: "Table", columns: "Sequence[Column]") -> list[str]:
    headers = zip(*(_two_lines(column.latex) for column in columns), strict=True)
    best = [_best(table, column) for column in columns]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
        r"\toprule",
        *[" & ".join(header) + r" \\" for header in headers if any(header)],
        r"\midrule",
    ]
    for row in table.rows:
        entries = [
            _entry(column.text(row), bold=row.index in winners)
            for column, winners in zip(columns[1:], best[1:], strict=True)
        ]
        lines.append(" & ".join([latex(row.label), *entries]) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}\par\medskip"]


def _best(table: "Table", column: "Column") -> set[int]:
    """Return the rows with the highest number of a column; none if all are equal, or the column is not to be compared."""
    if column.number is None:
        return set()
    found = {row.index: value for row in table.rows if (value := column.number(row)) is not None}
    highest = max(found.values(), default=0.0)
    best = {index for index, value in found.items() if value == highest}
    return best if len(best) < len(found) else set()


def _entry(text: str, *, bold: bool) -> str:
    """Write a number: a sign is a minus, not a hyphen; the best one's mean is bold, and its spread is not."""
    if text.startswith(("+", "-", "[")):
        return f"${text}$".replace(", ", r",\,")
    if not bold:
        return latex(text or "–")
    mean, spread, rest = text.partition(" ±")
    return rf"\textbf{{{latex(mean)}}}{latex(spread + rest) if not spread else ' ' + latex(spread + rest)}"


def _two_lines(header: str) -> tuple[str, str]:
    """Split a header over two lines of a table, at the bar."""
    over, bar, under = header.partition("|")
    return (over, under) if bar else ("", header)
