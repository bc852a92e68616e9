"""The table of results, with a forest plot beside the intervals."""

from collections.abc import Iterator, Sequence

import attrs
from markupsafe import Markup, escape

from lrkit.study.charts import interval, minus
from lrkit.study.columns import COSTS, SCORES, columns_of, columns_of_tasks
from lrkit.study.paired import LEVEL
from lrkit.study.report.view import View
from lrkit.study.table import Table
from lrkit.study.table_row import TableRow

_TIPS = {
    "lr": "learning rate of the adapters",
    "n": "finite scores, of the cells asked for",
    "score": "mean ± standard deviation over seeds",
    "published": "as it is printed in its source; in no test",
    "difference": "mean of row minus base over pairs of the same task and seed",
    "interval": "95 % interval of the mean difference: every value that the permutation test does not reject",
    "verdict": "what the tests show at 0.05, after Holm's correction",
    "effect_corrected": "mean difference over the standard deviation of the differences, less its small-sample bias",
    "effect_interval": "95 % interval of the effect size, by the noncentral t distribution",
    "interval_90": "90 % interval of the mean difference: equivalent if it lies inside the margin",
    "p_equivalent_holm": "two one-sided sign-flip tests against the margin, corrected over the rows of this table (Holm)",
    "p": "two-sided sign-flip permutation test",
    "p_holm": "corrected over the rows of this table (Holm)",
    "parameters_average": "trainable adapter parameters, averaged over the run",
    "parameters_final": "trainable adapter parameters at the end of the run",
    "flops": "floating-point operations counted over the whole run",
    "step_ratio": "time of a step over the base's, at the start of training",
    "step_ratio_end": "the same at the end of training",
    "peak_memory": "peak memory of a step",
    "speed": "tokens of training batches per second of the runs' own steps, which share the machine with other runs",
}
_HEADERS = {
    "difference": "Δ",
    "interval": "95 % interval",
    "effect_corrected": "effect<br>size",
    "effect_interval": "its 95 %<br>interval",
    "interval_90": "90 % interval<br>of Δ",
    "p": "<i>p</i>",
    "n": "<i>n</i>",
    "p_holm": "<i>p</i> Holm",
    "parameters_average": "params<br>average",
    "parameters_final": "params<br>end",
    "step_ratio": "step time<br>start",
    "step_ratio_end": "step time<br>end",
    "peak_memory": "peak<br>memory",
}


@attrs.frozen
class Heading:
    """The head of a column: its name, its tooltip, and a second column for the forest plot behind it."""

    name: Markup
    tip: str
    forest: bool


@attrs.frozen
class Entry:
    """One entry: its text, the number that it is sorted by, and the forest plot behind it if there is one."""

    text: str
    value: str
    empty: bool = False
    strong: bool = False
    forest: Markup | None = None


@attrs.frozen
class Line:
    """One row of the table, and a word of warning about it."""

    row: int
    is_base: bool
    warning: str
    entries: list[Entry]


@attrs.frozen
class Results:
    """The tables by task, the means by task, and the texts around them."""

    limits: list[str]
    tables: list[tuple[str, list[Heading], list[Line]]]
    tasks: list[str]
    means: list[tuple[int, list[str]]]
    caption: list[Markup]
    notes: list[str]

    @classmethod
    def of(cls, view: View) -> "Results":
        """Collect them."""
        table = view.table
        columns = columns_of_tasks(table)[1:]
        means = [
            (row.index, [minus(column.text(row)) or "–" for column in columns]) for row in table.of(table.tasks[0]).rows
        ]
        return cls(
            limits=list(table.limits),
            tables=[
                (name, *found)
                for name, found in view.by_task(
                    lambda view, task: tabled(view, task, (*SCORES, "verdict", *COSTS), "interval")
                )
            ],
            tasks=[column.header for column in columns],
            means=means if columns else [],
            caption=list(_meaning(table)),
            notes=[note for note in table.all_notes() if note not in table.limits],
        )


def tabled(view: View, task: str, keys: Sequence[str], forest: str) -> tuple[list[Heading], list[Line]]:
    """Return one task's table: the columns asked for, with a forest plot behind one of them if it is there.

    Args:
        view: the study.
        task: the task's name.
        keys: of the columns, as `lrkit.study.columns` has them.
        forest: of these, the interval that is plotted: ``"interval"`` or ``"interval_90"``.
    """
    table = view.table.of(task)
    columns = columns_of(table, keys)[1:]
    ends = [v for row in table.rows for v in (*_ends(row, forest), row.difference) if v is not None]
    band = [] if table.margin is None else [-table.margin, table.margin]
    bounds = (min([*ends, *band, 0.0]), max([*ends, *band, 0.0])) if ends else None
    headings = [
        Heading(
            Markup(_HEADERS.get(column.key) or escape(column.header)),
            _TIPS[column.key],
            column.key == forest and bounds is not None,
        )
        for column in columns
    ]
    lines = []
    for row in table.rows:
        entries = []
        for column in columns:
            text = minus(column.text(row))
            empty = "base" if row.is_base and column.key == "difference" else "–"
            plot = Markup(_forest(view, row, forest, bounds)) if column.key == forest and bounds is not None else None
            entries.append(Entry(text or empty, _sort_value(row, column.key), not text, _strong(row, column.key), plot))
        lines.append(Line(row.index, row.is_base, row.warning, entries))
    return headings, lines


def _strong(row: TableRow, key: str) -> bool:
    """Tell if an entry is set in bold: a corrected p below 0.05."""
    p = getattr(row, key) if key in ("p_holm", "p_equivalent_holm") else None
    return p is not None and p < LEVEL


def _ends(row: TableRow, forest: str) -> tuple[float | None, float | None]:
    return (row.low, row.high) if forest == "interval" else (row.low_90, row.high_90)


def _forest(view: View, row: TableRow, forest: str, bounds: tuple[float, float]) -> str:
    if row.difference is None:
        return ""
    low, high = _ends(row, forest)
    return interval(low, row.difference, high, bounds=bounds, style=view.styles[row.index], margin=view.table.margin)


def _sort_value(row: TableRow, key: str) -> str:
    named = {"score": "mean", "interval": "low", "interval_90": "low_90", "effect_interval": "effect_low"}
    named["speed"] = "tokens_per_second"
    value = getattr(row, named.get(key, key))
    return "" if value is None else value if isinstance(value, str) else f"{value:.12g}"


def _meaning(table: Table) -> Iterator[Markup]:
    """Explain the columns that there are, a sentence each."""
    shown = {column.key for column in columns_of(table, SCORES + COSTS)}
    scales = {score: table.of(task).scale for task, score in zip(table.tasks, table.scores, strict=True)}
    scores = " or ".join(f"{score} in {scale.unit}" if scale.unit else score for score, scale in scales.items())
    yield Markup("Score on the validation rows: {}, ± standard deviation over seeds.").format(scores)
    points = ", in percentage points" if any(scale.unit for scale in scales.values()) else ""
    if "difference" in shown:
        yield Markup(
            "Δ: mean difference to {} over pairs of the same seed{}. <i>p</i>: two-sided sign-flip "
            "permutation test on those pairs; its 95 % interval is all that this test does not reject; Holm: <i>p</i> "
            "corrected over the rows of one table."
        ).format(table.base, points)
    heads = [row.head for row in table.rows if row.head]
    if "parameters_average" in shown:
        head = f" (the task head's {max(heads):,.0f} are left out)" if heads else ""
        flops = "; FLOPs: counted over a whole run" if "flops" in shown else ""
        yield Markup("Params: trainable parameters of the adapters{}{}.").format(head, flops)
    if "step_ratio" in shown:
        yield Markup("Step time: over the base's, timed interleaved in one process.")
