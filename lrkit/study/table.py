"""The ablation table as text: plain, Markdown, LaTeX, CSV, and a pandas frame. No torch here.

pandas is imported when it is used, since it is slow to import.
"""

import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.study.columns import COSTS, EFFECTS, SCORES, Column, columns_of, columns_of_tasks
from lrkit.study.combined import Combined
from lrkit.study.latex import latex_table
from lrkit.study.scores import Scale, scale_of
from lrkit.study.sheet import safe_csv
from lrkit.study.table_row import TableRow
from lrkit.study.texts import markdown, text_tables

if TYPE_CHECKING:
    import pandas


@attrs.frozen(kw_only=True)
class Table:
    """The ablation table of a study: one per task, below each other.

    Args:
        title: the study's title.
        name: the study's name.
        base: label of the base row.
        scores: the primary score's name on each task.
        tasks: names of the tasks.
        rows: the tasks in the study's order, and within each its rows in the study's order.
        limits: sentences on what p cannot show with so few pairs or so many rows.
        notes: further sentences that belong under the table as a whole.
        combined: the rows on all tasks together, if there are several tasks.
        margin: differences that are smaller do not matter, as stated before the first test cell; None if none was.
        higher_is_better: of each task, if a larger score is a better one; empty if it is so of all.
    """

    title: str
    name: str
    base: str
    scores: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: tuple[TableRow, ...]
    limits: tuple[str, ...]
    notes: tuple[str, ...]
    combined: tuple[Combined, ...] = ()
    margin: float | None = None
    higher_is_better: tuple[bool, ...] = ()

    @property
    def scale(self) -> Scale:
        """The scale that scores are written on, which is percent if they are shares."""
        means = [row.mean for row in self.rows if row.mean is not None]
        return scale_of(self.scores, means, higher_is_better=all(self.higher_is_better))

    def of(self, task: str) -> "Table":
        """Return the table of one task."""
        at = self.tasks.index(task)
        rows = tuple(row for row in self.rows if row.task == task)
        one = slice(at, at + 1)
        return attrs.evolve(
            self, tasks=(task,), scores=self.scores[one], rows=rows, higher_is_better=self.higher_is_better[one]
        )

    def frame(self) -> "pandas.DataFrame":
        """Return the table with unrounded numbers, one line per task and row."""
        import pandas

        return pandas.DataFrame(self._plain(), columns=self._plain_columns())

    def to_csv(self) -> str:
        """Write the same numbers as CSV; an entry without a number is empty."""
        out = io.StringIO()
        writer = csv.DictWriter(out, self._plain_columns(), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._plain())
        return safe_csv(out.getvalue())

    def to_markdown(self) -> str:
        """Write a Markdown document: a table per task, the means side by side if there are several tasks, notes."""
        blocks = [f"# {markdown(self.title)}"]
        for name, table, columns in self._tables(SCORES + EFFECTS + COSTS):
            blocks += [f"## {markdown(name)}"] if name else []
            head = [markdown(column.header) for column in columns]
            ruler = ["---", *["---:"] * (len(columns) - 1)]
            lines = [[markdown(row.label), *(column.text(row) or "-" for column in columns[1:])] for row in table.rows]
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in [head, ruler, *lines]))
        blocks.append("\n".join(f"- {markdown(note)}" for note in self.all_notes()))
        return "\n\n".join(block for block in blocks if block) + "\n"

    def to_latex(self) -> str:
        r"""Write a LaTeX ``table``: scores, effects, then costs, per task. It needs ``\usepackage{booktabs}``."""
        return latex_table(self.title, self.name, list(self._tables(SCORES, EFFECTS, COSTS)), self.all_notes())

    def __str__(self) -> str:
        """Write the table as plain text for a terminal of 100 columns."""
        blocks = [self.title]
        for name, table, columns in self._tables(SCORES, EFFECTS, COSTS):
            texts = [[column.header for column in columns]]
            texts += [[column.text(row) or "-" for column in columns] for row in table.rows]
            blocks += [name] if name else []
            blocks += text_tables(texts, 100)
        blocks.append("\n".join(line for note in self.all_notes() for line in textwrap.wrap(note, 100)))
        return "\n\n".join(block for block in blocks if block)

    def _tables(self, *groups: Sequence[str]) -> "Iterator[tuple[str, Table, list[Column]]]":
        """List what is printed below each other: a heading, empty with one task; a task's table; its columns.

        Args:
            groups: keys of the columns of each table of a task. With several tasks their means come last.
        """
        for task in self.tasks:
            table = self.of(task)
            shown = [columns for columns in (columns_of(table, keys) for keys in groups) if len(columns) > 1]
            for number, columns in enumerate(shown):
                yield (task if len(self.tasks) > 1 and number == 0 else ""), table, columns
        columns = columns_of_tasks(self)
        if len(columns) > 1:
            yield "Means by task", self.of(self.tasks[0]), columns

    def all_notes(self) -> list[str]:
        """List the limits and notes of the table, then the notes of its rows, with row and task named."""
        several = len(self.tasks) > 1
        names = [f"{row.label} on {row.task}" if several else row.label for row in self.rows]
        rows = zip(names, self.rows, strict=True)
        return [*self.limits, *self.notes, *(f"{name}: {note}" for name, row in rows for note in row.notes)]

    def _plain(self) -> list[dict[str, Any]]:
        return [
            attrs.asdict(row, recurse=False) | {"row": row.label, "notes": " ".join(row.notes)} for row in self.rows
        ]

    def _plain_columns(self) -> list[str]:
        names = [field.name for field in attrs.fields(TableRow) if field.name not in ("index", "label", "notes")]
        return ["row", *names, "notes"]


__all__ = ["COSTS", "EFFECTS", "SCORES", "Column", "Table", "columns_of", "columns_of_tasks"]
