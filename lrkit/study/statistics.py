"""The ablation table: every row against the base, with what chance alone would give and what the row costs.

Rows are compared in pairs, of the same task and the same seed, by `lrkit.study.paired`. Each task has a table of its own:
what a row does may differ from task to task, so pairs of several tasks are no sample of one thing, and a test on all of
them together rejects far too often. pandas is imported where it is used, since it is slow to import.
"""

import csv
import io
import math
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.study.files import Cost
from lrkit.study.latex import latex, latex_table
from lrkit.study.paired import ENOUGH_PAIRS, LEVEL, enough_pairs, holm, interval, sign_flip_p, smallest_p
from lrkit.study.records import StudyRecord
from lrkit.study.scores import Scale, scale_of
from lrkit.study.sheet import safe_csv
from lrkit.study.sizes import unequal_sizes

if TYPE_CHECKING:
    import pandas

# ---- the table ------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class TableRow:
    """One row of a task's table. None stands for what there is not (yet); no number here is NaN.

    Args:
        index: index into the study's rows.
        label: the row's name.
        task: the task's name.
        is_base: whether it is the row that the others are compared with.
        planned: cells the study asks for.
        done: cells with a result.
        running: cells begun, without a result (they run now, or were interrupted).
        failed: cells whose last attempt failed.
        missing: cells never begun.
        n: finite scores.
        diverged: results whose score is NaN. They are in no mean and no pair; `notes` says so.
        mean: mean over seeds.
        sd: standard deviation (ddof 1) over seeds.
        pairs: seeds with which row and base both have a finite score.
        difference: mean of row minus base over the pairs.
        low: lower end of its 95 % interval (`lrkit.study.paired.interval`); None with fewer than six pairs, where it
            is unbounded.
        high: upper end.
        p: two-sided sign-flip p (`lrkit.study.paired.sign_flip_p`).
        p_holm: Holm-corrected over the rows of the task's table.
        smallest_p: the smallest p that so many pairs can give.
        few_pairs: fewer than six pairs.
        parameters_average: trainable adapter parameters averaged over the run, mean over the done cells.
        parameters_final: the same at the end of the run.
        head: trainable parameters of the task head, which are in neither.
        flops: counted operations of a whole run, mean over the done cells.
        step_ratio: step time over the base's at the start of training.
        step_ratio_end: the same at the end of training.
        peak_memory: bytes.
        effect: effect size: `difference` over the standard deviation of the pairs' differences; None if they are equal.
        guess: the primary score of the best constant guess, mean over the done cells.
        notes: what must be said about this row, a sentence each.
        lr: the adapters' learning rate; those of the tasks where they differ.
    """

    index: int
    label: str
    task: str
    is_base: bool
    planned: int
    done: int
    running: int
    failed: int
    missing: int
    n: int
    diverged: int
    mean: float | None
    sd: float | None
    pairs: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    smallest_p: float | None
    few_pairs: bool
    parameters_average: float | None
    parameters_final: float | None
    head: float | None
    flops: float | None
    step_ratio: float | None
    step_ratio_end: float | None
    peak_memory: float | None
    effect: float | None
    guess: float | None
    notes: tuple[str, ...]
    lr: str = ""

    @property
    def warning(self) -> str:
        """Say in few words that the mean is not above the best constant guess; empty if it is, or if one is not known."""
        known = self.mean is not None and self.guess is not None
        return "not above the constant guess" if known and self.mean <= self.guess else ""  # type: ignore[operator]


@attrs.frozen(kw_only=True)
class Table:
    """The ablation table of a study: one for each task, below each other.

    Args:
        title: the study's title.
        name: the study's name.
        base: label of the base row.
        scores: the primary score's name, for each task.
        tasks: names of the tasks.
        rows: the tasks in the study's order, and within each its rows in the study's order.
        limits: what p cannot show with so few pairs or so many rows, a sentence each.
        notes: further sentences that belong under the table as a whole.
    """

    title: str
    name: str
    base: str
    scores: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: tuple[TableRow, ...]
    limits: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def scale(self) -> Scale:
        """How the scores are written: in percent if they are shares."""
        return scale_of(self.scores, [row.mean for row in self.rows if row.mean is not None])

    def of(self, task: str) -> "Table":
        """The table of one task."""
        at = self.tasks.index(task)
        rows = tuple(row for row in self.rows if row.task == task)
        return attrs.evolve(self, tasks=(task,), scores=(self.scores[at],), rows=rows)

    def frame(self) -> "pandas.DataFrame":
        """The table with unrounded numbers, one line for each task and row."""
        import pandas

        return pandas.DataFrame(self._plain(), columns=self._plain_columns())

    def to_csv(self) -> str:
        """The same numbers as CSV; empty where there is none."""
        out = io.StringIO()
        writer = csv.DictWriter(out, self._plain_columns(), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._plain())
        return safe_csv(out.getvalue())

    def to_markdown(self) -> str:
        """A Markdown document: a table for each task, the means side by side where there are several, notes."""
        blocks = [f"# {_markdown(self.title)}"]
        for name, table, columns in self._tables(SCORES + COSTS):
            blocks += [f"## {_markdown(name)}"] if name else []
            head = [_markdown(column.header) for column in columns]
            ruler = ["---", *["---:"] * (len(columns) - 1)]
            lines = [[_markdown(row.label), *(column.text(row) or "-" for column in columns[1:])] for row in table.rows]
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in [head, ruler, *lines]))
        blocks.append("\n".join(f"- {_markdown(note)}" for note in self.all_notes()))
        return "\n\n".join(block for block in blocks if block) + "\n"

    def to_latex(self) -> str:
        r"""Write a LaTeX ``table``: scores, then costs, for each task. It needs ``\usepackage{booktabs}``."""
        return latex_table(self.title, self.name, list(self._tables(SCORES, COSTS)), self.all_notes())

    def __str__(self) -> str:
        """The table as plain text for a terminal of 100 columns."""
        blocks = [self.title]
        for name, table, columns in self._tables(SCORES, COSTS):
            texts = [[column.header for column in columns]]
            texts += [[column.text(row) or "-" for column in columns] for row in table.rows]
            blocks += [name] if name else []
            blocks += _text_tables(texts, 100)
        blocks.append("\n".join(line for note in self.all_notes() for line in textwrap.wrap(note, 100)))
        return "\n\n".join(block for block in blocks if block)

    def _tables(self, *groups: Sequence[str]) -> "Iterator[tuple[str, Table, list[Column]]]":
        """What is printed below each other: a heading, empty with one task; a task's table; its columns.

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
        """The limits and notes of the table, then the notes of its rows, with row and task named."""
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


def compare(record: StudyRecord) -> Table:
    """Compare every row of a study with its base.

    Args:
        record: a study, finished or still running: what is not there yet is None, and said in the notes.

    Returns:
        The table, in the study's order of rows.

    Raises:
        LrkitError: a cell's result cannot be read.
    """
    costs = record.costs
    tables = {task.name: _corrected(record, task.name, costs) for task in record.tasks}
    limits = {task: _limits(rows) for task, rows in tables.items()}
    same = len({tuple(said) for said in limits.values()}) == 1
    told = [said if same else f"{task}: {said}" for task, found in limits.items() for said in found]
    return Table(
        title=record.title,
        name=record.name,
        base=record.rows[record.base].label,
        scores=tuple(_score_name(record, task.name) for task in record.tasks),
        tasks=tuple(tables),
        rows=tuple(row for rows in tables.values() for row in rows),
        limits=tuple(dict.fromkeys(told)),
        notes=tuple(_table_notes(record, tables)),
    )


_APART = "Each task is tested by itself: p is corrected over the rows of one task's table, not over the tasks."


def _table_notes(record: StudyRecord, tables: Mapping[str, Sequence[TableRow]]) -> Iterator[str]:
    if len(tables) > 1 and any(row.pairs for rows in tables.values() for row in rows):
        yield _APART
    methods = [row.method for row in record.rows]
    for task, rows in tables.items():
        for note in unequal_sizes(methods, [row.label for row in rows], [row.parameters_final for row in rows]):
            yield f"{task}: {note}" if len(tables) > 1 else note


def _score_name(record: StudyRecord, task: str) -> str:
    scored = [cell.result for cell in record.cells if cell.result and cell.task == task]
    names = dict.fromkeys(next(iter(result.scores)) for result in scored)
    return " or ".join(names or [t.metric for t in record.tasks if t.name == task and t.metric]) or "score"


def _corrected(record: StudyRecord, task: str, costs: Mapping[tuple[int, str], Cost]) -> list[TableRow]:
    """The rows of one task's table, with Holm's correction over them."""
    base = {cell.seed: cell.score for cell in record.cells_of(record.base, task)}
    rows = [_row(record, index, task, base, costs.get((index, task))) for index in range(len(record.rows))]
    tested = {row.index: row.p for row in rows if row.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return [attrs.evolve(row, p_holm=adjusted.get(row.index)) for row in rows]


def _row(record: StudyRecord, index: int, task: str, base: Mapping[int, float | None], cost: Cost | None) -> TableRow:
    cells = record.cells_of(index, task)
    is_base = index == record.base
    pairs = [] if is_base else [(cell.score, base.get(cell.seed)) for cell in cells]
    both = [(own, other) for own, other in pairs if own is not None and other is not None]
    differences = [own - other for own, other in both if math.isfinite(own) and math.isfinite(other)]
    ends = interval(differences)
    statuses = [cell.status for cell in cells]
    results = [cell.result for cell in cells if cell.result is not None]
    scores = [cell.score for cell in cells if cell.score is not None]
    finite = [score for score in scores if math.isfinite(score)]
    row = TableRow(
        index=index,
        label=record.rows[index].label,
        task=task,
        is_base=is_base,
        planned=len(cells),
        done=len(results),
        running=statuses.count("running"),
        failed=statuses.count("failed"),
        missing=statuses.count("missing"),
        n=len(finite),
        diverged=len(scores) - len(finite),
        mean=statistics.fmean(finite) if finite else None,
        sd=statistics.stdev(finite) if len(finite) > 1 else None,
        pairs=len(differences),
        difference=statistics.fmean(differences) if differences else None,
        low=ends[0] if ends else None,
        high=ends[1] if ends else None,
        p=sign_flip_p(differences) if differences else None,
        p_holm=None,
        smallest_p=smallest_p(len(differences)) if differences else None,
        few_pairs=not is_base and len(differences) < ENOUGH_PAIRS,
        parameters_average=_mean([result.parameters.average for result in results]),
        parameters_final=_mean([result.parameters.now for result in results]),
        head=_mean([result.parameters.head for result in results]),
        flops=_mean([result.flops.run for result in results if result.flops is not None]),
        step_ratio=_mean([cost.step_ratio if cost else None]),
        step_ratio_end=_mean([cost.step_ratio_end if cost else None]),
        peak_memory=_mean([cost.peak_memory if cost else None]),
        effect=effect_size(differences),
        guess=_mean([result.majority for result in results]),
        notes=(),
        lr=record.rows[index].lr,
    )
    notes = _row_notes(row, left_out=len(both) - len(differences))
    if row.warning and row.guess is not None:
        guess = scale_of([_score_name(record, task)], [row.guess]).text(row.guess)
        notes.append(f"mean not above the best constant guess, {guess} (†).")
    return attrs.evolve(row, notes=(*notes, *([f"cost not measured: {cost.error}."] if cost and cost.error else [])))


def effect_size(differences: Sequence[float]) -> float | None:
    """Return the mean difference over the differences' standard deviation; None for one difference, or if all are equal."""
    if len(differences) < 2:
        return None
    spread = statistics.stdev(differences)
    size = max(map(abs, differences))
    # equal but for the last bits, as differences of rounded scores are
    return statistics.fmean(differences) / spread if spread > 1e-9 * size else None


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _row_notes(row: TableRow, left_out: int) -> list[str]:
    notes = []
    to_come = row.running + row.missing
    if to_come:
        notes.append(f"{to_come} of {row.planned} cells not done yet.")
    if row.failed:
        notes.append(f"{row.failed} of {row.planned} cells failed.")
    if row.diverged:
        notes.append(f"{row.diverged} of {row.done} results diverged (score NaN): in no mean and no pair.")
    if left_out and not row.is_base:
        notes.append(
            f"{left_out} pairs left out, since the row or the base diverged." if left_out > 1 else _ONE_LEFT_OUT
        )
    if row.low is not None and row.low == row.high:
        notes.append(
            f"all {row.pairs} differences are equal, so the interval has no width: that says how coarse the scores are, "
            "and is no certainty."
        )
    return notes


_ONE_LEFT_OUT = "1 pair left out, since the row or the base diverged."


def _limits(rows: Sequence[TableRow]) -> list[str]:
    limits = []
    few = sorted({row.pairs for row in rows if row.few_pairs and row.pairs})
    if few:
        least = ", ".join(f"2/2^{n} = {smallest_p(n):g} with {n}" if n > 1 else "1 with 1" for n in few)
        limits.append(
            f"Fewer than six pairs: the smallest p that the sign-flip test can give is {least}, whatever the scores, and "
            f"the 95 % interval is unbounded. Only with six or more ({smallest_p(ENOUGH_PAIRS):g}) can p fall below "
            f"{LEVEL}."
        )
    tested = [row.pairs for row in rows if row.pairs]
    # The smallest p of all is multiplied by how many rows are tested.
    least_holm = len(tested) * smallest_p(max(tested, default=0))
    if len(tested) > 1 and not few and least_holm >= LEVEL:
        limits.append(
            f"With {len(tested)} rows tested and at most {max(tested)} pairs, no p can be below {least_holm:.2g} after "
            f"Holm's correction, whatever the scores; {enough_pairs(len(tested))} pairs could bring it below {LEVEL}."
        )
    return limits


# ---- numbers as text ------------------------------------------------------------------------------------------------


def compact(value: float, digits: int = 3) -> str:
    """A large number with its decimal prefix: 331776 is ``332 k``, 1.2e13 is ``12.0 T``; under 1000 as it is."""
    size = abs(value)
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        # 999,950 is 1.00 M, not 1000 k
        if size >= 10**power * (1 - 0.5 * 10**-digits):
            return f"{_significant(value / 10**power, digits)} {prefix}"
    return f"{value:.0f}" if size >= 100 or value == int(value) else _significant(value, digits)


def memory(value: float) -> str:
    """Bytes in binary units: ``512 MiB``, ``1.42 GiB``."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            return f"{_significant(value / 2**power, 3)} {unit}"
    return f"{value:.0f} B"


def _significant(value: float, digits: int) -> str:
    whole = len(str(int(abs(value))))
    return f"{value:.{max(0, digits - whole)}f}"


def probability(p: float) -> str:
    """A p in four decimals, or that it is below 0.0001."""
    return "<0.0001" if p < 0.00005 else f"{p:.4f}"


@attrs.frozen
class Column:
    """One column as text: a key, a header for plain text, one for LaTeX, and a row's entry (empty where there is none)."""

    key: str
    header: str
    latex: str
    text: Callable[[TableRow], str]
    number: Callable[[TableRow], float | None] | None = None
    """Of a column whose highest entry is the best."""


SCORES = ("n", "score", "difference", "interval", "effect", "p", "p_holm")
COSTS = ("lr", "parameters_average", "parameters_final", "flops", "step_ratio", "step_ratio_end", "peak_memory")


def columns_of(table: Table, keys: Sequence[str]) -> list[Column]:
    """The row's label and the columns asked for, less those in which no row has an entry."""
    scale = table.scale
    name = " or ".join(dict.fromkeys(table.scores))
    name = scale.heading(name if len(name) < 16 else "score")

    def score(row: TableRow) -> str:
        spread = "" if row.sd is None else f" ± {scale.number(row.sd)}"
        return "" if row.mean is None else f"{scale.number(row.mean)}{spread}{' †' if row.warning else ''}"

    def ends(row: TableRow) -> str:
        if row.low is None or row.high is None:
            return "unbounded" if row.pairs else ""
        return "no width" if row.low == row.high else f"[{scale.number(row.low, '+')}, {scale.number(row.high, '+')}]"

    def number(key: str, show: Callable[[float], str]) -> Callable[[TableRow], str]:
        return lambda row: "" if getattr(row, key) is None else show(getattr(row, key))

    made = [
        Column("n", "n", "$n$", lambda row: f"{row.n}" if row.n == row.planned else f"{row.n}/{row.planned}"),
        Column("score", name, latex(scale.heading("Score")), score, lambda row: row.mean),
        Column("difference", "difference", r"$\Delta$", number("difference", lambda x: scale.number(x, "+"))),
        Column("interval", "95 % interval", r"95\,\% interval", ends),
        Column("effect", "effect size", r"Effect|size", number("effect", "{:+.2f}".format)),
        Column("p", "p", "$p$", number("p", probability)),
        Column("p_holm", "p (Holm)", r"$p$|(Holm)", number("p_holm", probability)),
        Column("lr", "lr", "Rate", lambda row: row.lr),
        Column("parameters_average", "params avg", "Param.|average", number("parameters_average", compact)),
        Column("parameters_final", "params end", "Param.|end", number("parameters_final", compact)),
        Column("flops", "FLOPs", "FLOPs", number("flops", compact)),
        Column("step_ratio", "step time", "Step time|start", number("step_ratio", "{:.2f}".format)),
        Column("step_ratio_end", "at the end", "Step time|end", number("step_ratio_end", "{:.2f}".format)),
        Column("peak_memory", "peak memory", "Peak|memory", number("peak_memory", memory)),
    ]
    label = Column("label", "row", "Row", lambda row: " ".join(row.label.split()))
    chosen = [column for column in made if column.key in keys and any(column.text(row) for row in table.rows)]
    return [label, *chosen]


def columns_of_tasks(table: Table) -> list[Column]:
    """The row's label and one column for each task's mean, where there are several tasks; for a row of any task."""
    means = {(row.task, row.index): row.mean for row in table.rows}
    scales = {task: table.of(task).scale for task in table.tasks}

    def mean(task: str) -> Callable[[TableRow], str]:
        def text(row: TableRow) -> str:
            value = means[task, row.index]
            return "" if value is None else scales[task].number(value)

        return text

    def number(task: str) -> Callable[[TableRow], float | None]:
        return lambda row: means[task, row.index]

    label = columns_of(table, ())[0]
    columns = [label]
    for task in table.tasks if len(table.tasks) > 1 else ():
        name = scales[task].heading(task)
        columns.append(Column(f"mean.{task}", name, latex(name), mean(task), number(task)))
    return columns


def _text_tables(texts: Sequence[Sequence[str]], width: int) -> list[str]:
    """Rows of text, header first, as aligned tables no wider than `width`: columns that do not fit go to a next one."""
    widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
    first = min(widths[0], max(24, width - sum(2 + w for w in widths[1:])))
    groups: list[list[int]] = [[]]
    for i in range(1, len(widths)):
        if groups[-1] and first + sum(2 + widths[j] for j in [*groups[-1], i]) > width:
            groups.append([])
        groups[-1].append(i)
    tables = []
    for group in groups:
        lines = []
        for line in texts:
            label = textwrap.wrap(line[0], first) or [""]
            lines.append("  ".join([label[0].ljust(first), *(line[i].rjust(widths[i]) for i in group)]))
            lines += ["  " + rest for rest in textwrap.wrap(" ".join(label[1:]), first - 2)]
        rule = "-" * len(lines[0])
        tables.append("\n".join([lines[0].rstrip(), rule, *lines[1:]]))
    return tables


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|~&#" else c for c in " ".join(text.split()))
