"""A study as every section of the report looks at it, and how its names and settings are written."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import attrs
from markupsafe import Markup, escape

from lrkit.study.charts import Style
from lrkit.study.results import CellRecord, Status, StudyRecord
from lrkit.study.table import Table

T = TypeVar("T")

WORDS: dict[Status, str] = {
    "done": "done",
    "running": "running or interrupted",
    "failed": "failed",
    "missing": "not begun",
}
"""The page's words for a cell's status."""


@attrs.frozen(kw_only=True)
class View:
    """A study, its table, and its rows' styles and marks.

    Args:
        record: the study.
        table: of its comparisons.
        styles: of the rows.
        chips: the mark of each row, as an ``svg`` element.
    """

    record: StudyRecord
    table: Table
    styles: tuple[Style, ...]
    chips: tuple[str, ...]

    def label(self, row: int) -> str:
        """Return a row's label."""
        return self.record.rows[row].label

    def name(self, row: int) -> Markup:
        """Return a row's label behind its mark, for the page."""
        mark = Markup(self.chips[row])
        return Markup('<span class="row">{}<span>{}</span></span>').format(mark, breakable(self.label(row)))

    def cells(self, row: int, task: str) -> tuple[CellRecord, ...]:
        """Return the cells of a row on a task."""
        return self.record.cells_of(row, task)

    @property
    def rows(self) -> range:
        """The rows' indices."""
        return range(len(self.record.rows))

    @property
    def order(self) -> list[int]:
        """The rows' indices, with the base first."""
        base = self.record.base
        return [base, *(row for row in self.rows if row != base)]

    @property
    def several(self) -> bool:
        """True if the study has several tasks."""
        return len(self.record.tasks) > 1

    def by_task(self, section: "Callable[[View, str], T]") -> list[tuple[str, T]]:
        """Return a section of each task that has one, with the task's name if there are several."""
        parts = [(task.name if self.several else "", section(self, task.name)) for task in self.record.tasks]
        return [(name, part) for name, part in parts if part]


def breakable(text: str) -> Markup:
    """Return a label that may break behind an equals sign or a dot, but not in a number."""
    return Markup(re.sub(r"(=|[.,/](?!\d))", r"\1<wbr>", str(escape(text))))


def alpha_over_rank(method: dict[str, Any]) -> str:
    """Write the scale α/r of a method in plain data; empty if it has none, or its layers have ranks of their own."""
    part = method.get("parameterization")
    alpha, rank = (part.get("alpha"), part.get("rank")) if isinstance(part, dict) else (None, None)
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        return ""
    return f"{alpha / rank:g}"
