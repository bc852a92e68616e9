"""The score of each cell with a link to its folder, and the tracebacks of cells that failed."""

import math
from urllib.parse import quote

import attrs

from lrkit.errors import cut
from lrkit.study.charts import minus
from lrkit.study.report.view import WORDS, View
from lrkit.study.results import CellRecord, Status

_TRACEBACK = 20_000  # characters of a traceback that are shown, at most


@attrs.frozen
class Failure:
    """A cell that failed: its row, task and seed, the error in one line, the traceback and a link."""

    row: int
    place: str
    line: str
    traceback: str
    link: str


def failures(view: View) -> list[Failure]:
    """Return the cells that failed."""
    found = []
    for cell in view.record.cells:
        if cell.status == "failed":
            text = cell.error or "no traceback was kept"
            lead = f"… the last {_TRACEBACK:,} of {len(text):,} characters\n" if len(text) > _TRACEBACK else ""
            place, line = f"{cell.task}, seed {cell.seed}", cut(cell.error_line or text)
            found.append(Failure(cell.row, place, line, lead + text[-_TRACEBACK:], _link(cell)))
    return found


@attrs.frozen
class Entry:
    """A cell in the table: its status, the text and the link; none of the two if the study has no such cell."""

    status: Status | None
    text: str = ""
    link: str = ""


@attrs.frozen
class Grid:
    """The cells by row and task on one side and seed on the other."""

    seeds: list[int]
    several: bool
    lines: list[tuple[int, str, list[Entry]]]
    unit: str

    @classmethod
    def of(cls, view: View) -> "Grid":
        """Collect it."""
        record = view.record
        seeds = list(dict.fromkeys(cell.seed for cell in record.cells))
        lines = []
        for row in view.rows:
            for task in record.tasks:
                cells = {cell.seed: cell for cell in view.cells(row, task.name)}
                entries = [_entry(view, task.name, cells.get(seed)) for seed in seeds]
                lines.append((row, task.name, entries))
        units = {view.table.of(task.name).scale.unit for task in record.tasks}
        return cls(seeds, view.several, lines, units.pop() if len(units) == 1 else "")


def _entry(view: View, task: str, cell: CellRecord | None) -> Entry:
    if cell is None:
        return Entry(None)
    text = f"at step {cell.steps}" if cell.status == "running" else WORDS[cell.status]
    if cell.score is not None:
        finite = math.isfinite(cell.score)
        text = minus(view.table.of(task).scale.number(cell.score)) if finite else "diverged"
    return Entry(cell.status, text, "" if cell.status == "missing" else _link(cell))


def _link(cell: CellRecord) -> str:
    return f"cells/{quote(cell.key)}/"
