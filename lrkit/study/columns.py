"""The columns of an ablation table: for each a header and a row's entry, as text. No torch here."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from lrkit.study.scores import Scale
from lrkit.study.table_row import TableRow
from lrkit.study.texts import compact, latex, memory, probability

if TYPE_CHECKING:
    from lrkit.study.table import Table


@attrs.frozen
class Column:
    """One column as text: a key, a header for plain text, one for LaTeX, and a row's entry (empty if there is none).

    `number` is given if rows can be ranked by the column: so that more is better.
    """

    key: str
    header: str
    latex: str
    text: Callable[[TableRow], str]
    number: Callable[[TableRow], float | None] | None = None


SCORES = ("n", "score", "published", "difference", "interval", "p", "p_holm")
EFFECTS = ("effect_corrected", "effect_interval", "interval_90", "p_equivalent_holm", "verdict")
COSTS = (
    "lr",
    "parameters_average",
    "parameters_final",
    "flops",
    "step_ratio",
    "step_ratio_end",
    "peak_memory",
    "speed",
)


def columns_of(table: "Table", keys: Sequence[str]) -> list[Column]:
    """List the row's label and the columns asked for, less those in which no row has an entry."""
    scale, margin = table.scale, table.margin
    name = " or ".join(dict.fromkeys(table.scores))

    def score(row: TableRow) -> str:
        spread = "" if row.sd is None else f" ± {scale.number(row.sd)}"
        return "" if row.mean is None else f"{scale.number(row.mean)}{spread}{' †' if row.warning else ''}"

    def merit(row: TableRow) -> float | None:
        return row.mean if row.mean is None or row.higher_is_better else -row.mean

    def ends(row: TableRow, low: float | None, high: float | None) -> str:
        if low is None or high is None:
            return "unbounded" if row.pairs else ""
        return "no width" if low == high else f"[{scale.number(low, '+')}, {scale.number(high, '+')}]"

    def effects(row: TableRow) -> str:
        return "" if row.effect_low is None else f"[{row.effect_low:+.2f}, {row.effect_high:+.2f}]"

    def number(key: str, show: Callable[[float], str]) -> Callable[[TableRow], str]:
        return lambda row: "" if getattr(row, key) is None else show(getattr(row, key))

    made = [
        Column("n", "n", "$n$", lambda row: f"{row.n}" if row.n == row.planned else f"{row.n}/{row.planned}"),
        Column(
            "score",
            scale.heading(name if len(name) < 16 else "score"),
            latex(scale.heading("Score")),
            score,
            merit,
        ),
        Column("published", "published", "Published", lambda row: row.published),
        Column("difference", "difference", r"$\Delta$", number("difference", lambda x: scale.number(x, "+"))),
        Column("interval", "95 % interval", r"95\,\% interval", lambda row: ends(row, row.low, row.high)),
        Column("p", "p", "$p$", number("p", probability)),
        Column("p_holm", "p (Holm)", r"$p$|(Holm)", number("p_holm", probability)),
        Column("effect_corrected", "effect size", r"Effect|size", number("effect_corrected", "{:+.2f}".format)),
        Column("effect_interval", "its 95 % interval", r"its 95\,\%|interval", effects),
        Column(
            "interval_90",
            "difference (90 %)",
            r"90\,\% interval|of $\Delta$",
            lambda row: ends(row, row.low_90, row.high_90) if margin else "",
        ),
        Column(
            "p_equivalent_holm",
            f"p within ±{scale.number(margin or 0.0)}",
            rf"$p$ within|$\pm${scale.number(margin or 0.0)}",
            number("p_equivalent_holm", probability),
        ),
        Column("verdict", "verdict", "Verdict", lambda row: row.verdict if margin else ""),
        Column("lr", "lr", "Rate", lambda row: row.lr),
        Column("parameters_average", "params avg", "Param.|average", number("parameters_average", compact)),
        Column("parameters_final", "params end", "Param.|end", number("parameters_final", compact)),
        Column("flops", "FLOPs", "FLOPs", number("flops", compact)),
        Column("step_ratio", "step time", "Step time|start", number("step_ratio", "{:.2f}".format)),
        Column("step_ratio_end", "at the end", "Step time|end", number("step_ratio_end", "{:.2f}".format)),
        Column("speed", "tokens/s", r"Tokens|per s", number("tokens_per_second", compact)),
        Column("peak_memory", "peak memory", "Peak|memory", number("peak_memory", memory)),
    ]
    label = Column("label", "row", "Row", lambda row: " ".join(row.label.split()))
    chosen = [column for column in made if column.key in keys and any(column.text(row) for row in table.rows)]
    return [label, *chosen]


def columns_of_tasks(table: "Table") -> list[Column]:
    """List the row's label and, if there are several tasks, each task's mean and p of all tasks; for a row of any task."""
    means = {(row.task, row.index): row.mean for row in table.rows}
    columns = [columns_of(table, ())[0]]
    for task in table.tasks if len(table.tasks) > 1 else ():
        columns.append(_means_of(task, means, table.of(task).scale))
    together = {each.index: each for each in table.combined}

    def told(key: str) -> Callable[[TableRow], str]:
        return lambda row: probability(getattr(together[row.index], key)) if row.index in together else ""

    if together:
        columns.append(Column("p_tasks", "p of all tasks", r"$p$ of all|tasks", told("p")))
        columns.append(Column("p_tasks_holm", "it (Holm)", r"it|(Holm)", told("p_holm")))
    return columns


def _means_of(task: str, means: Mapping[tuple[str, int], float | None], scale: Scale) -> Column:
    def text(row: TableRow) -> str:
        value = means[task, row.index]
        return "" if value is None else scale.number(value)

    def merit(row: TableRow) -> float | None:
        value = means[task, row.index]
        return -value if value is not None and scale.lower else value

    name = scale.heading(task)
    return Column(f"mean.{task}", name, latex(name), text, merit)
