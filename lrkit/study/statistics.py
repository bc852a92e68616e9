"""The ablation table: every row against the base, what chance alone would give, and the cost of each row. No torch here.

`compare` makes a `Table`. The numbers are made in `lrkit.study.comparison`, and the texts in `lrkit.study.table`.
"""

from collections.abc import Iterator, Mapping, Sequence

from lrkit.study.combined import ASSUMES, Combined, combine
from lrkit.study.comparison import TableRow, limits_of, rows_of, score_name
from lrkit.study.results import StudyRecord
from lrkit.study.scores import scale_of
from lrkit.study.sizes import unequal_sizes
from lrkit.study.table import Table

_APART = "Each task is tested by itself: p is corrected over the rows of one task's table, not over the tasks."


def compare(record: StudyRecord) -> Table:
    """Compare every row of a study with its base.

    Args:
        record: a study, finished or still running: a number that is not there yet is None, and the notes say so.

    Returns:
        The table, in the study's order of rows.

    Raises:
        LrkitError: a cell's result cannot be read.
    """
    costs = record.costs
    tables = {task.name: rows_of(record, task.name, costs) for task in record.tasks}
    limits = {task: limits_of(rows) for task, rows in tables.items()}
    combined = combine(record)
    same = len({tuple(said) for said in limits.values()}) == 1
    told = [said if same else f"{task}: {said}" for task, found in limits.items() for said in found]
    return Table(
        title=record.title,
        name=record.name,
        base=record.rows[record.base].label,
        scores=tuple(score_name(record, task.name) for task in record.tasks),
        tasks=tuple(tables),
        rows=tuple(row for rows in tables.values() for row in rows),
        limits=tuple(dict.fromkeys(told)),
        notes=tuple(_notes(record, tables, combined)),
        combined=combined,
        margin=record.margin,
        higher_is_better=tuple(record.higher_is_better(task.name) for task in record.tasks),
    )


def _notes(
    record: StudyRecord, tables: Mapping[str, Sequence[TableRow]], combined: Sequence[Combined]
) -> Iterator[str]:
    """Say what the margin is, how several tasks are tested, and which rows of one target are not of one size."""
    lower = [task.name for task in record.tasks if not task.higher_is_better]
    if lower:
        on = f" on {', '.join(lower)}" if len(tables) > 1 else ""
        yield f"Lower is better: a negative difference{on} is a better score than the base's."
    if record.margin is not None:
        yield _margin(record, [row.mean for rows in tables.values() for row in rows if row.mean is not None])
    if len(tables) > 1 and any(row.pairs for rows in tables.values() for row in rows):
        yield _APART
    if combined:
        yield ASSUMES
        for each in combined:
            if each.tasks < len(tables):
                yield f"{each.label}: all tasks together are {each.tasks} of {len(tables)} so far."
    if any(row.published for rows in tables.values() for row in rows) and record.published is not None:
        yield f"Published: as printed in {record.published.source}; it is in no test."
    methods = [row.method for row in record.rows]
    for task, rows in tables.items():
        for note in unequal_sizes(methods, [row.label for row in rows], [row.parameters_final for row in rows]):
            yield f"On {task}: {note}" if len(tables) > 1 else note


def _margin(record: StudyRecord, means: Sequence[float]) -> str:
    """Say what the margin is, and what the verdicts mean."""
    scale = scale_of([score_name(record, task.name) for task in record.tasks], means)
    points = " points" if scale.unit else ""
    return (
        f"Margin: ±{scale.number(record.margin or 0.0)}{points}, stated before the first test cell. A row is different from "
        "the base, equivalent to it within the margin, negligible (both are shown) or open (neither is), by the two p, "
        "which are corrected over the rows (Holm)."
    )


__all__ = ["Table", "TableRow", "compare"]
