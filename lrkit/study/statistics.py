"""The ablation table: every row against the base, with what chance alone would give and what the row costs.

Rows are compared in pairs: the same task, the same seed. With d_i = score of the row - score of the base in pair i:

- the mean difference, and a 95 % interval of it by the bootstrap (BCa: Efron, 1987), which assumes no distribution;
- a two-sided sign-flip permutation test (Fisher, 1935): if row and base were the same, each d_i could as well have
  had the other sign. p is the share of all 2^n sign patterns whose mean is at least as far from zero as the one seen,
  so it can never be below 2/2^n. That is why fewer than six pairs are flagged: five give 0.0625 at best;
- Holm's correction (Holm, 1979) of p over the rows of the table.

Everything random has a fixed seed: the same study gives the same table. pandas, scipy and statsmodels are imported
where they are used, since they are slow to import.
"""

import csv
import io
import math
import re
import statistics
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from lrkit.study.records import CellRecord, StudyRecord
from lrkit.study.sheet import safe_csv

if TYPE_CHECKING:
    import pandas

ENOUGH_PAIRS = 6
"""With six pairs the smallest p is 2/2^6 = 0.031; with five it is 0.0625."""

CONFIDENCE = 0.95
_RESAMPLES = 9_999
_RANDOM_FLIPS = 99_999  # sign patterns are all tried where there are no more than this: up to n = 16
# Differences of rounded scores that are equal in exact arithmetic differ in the last bits. Relative to the mean of
# abs(d), ties must count as ties.
_TIE = 1e-9


# ---- the three procedures -------------------------------------------------------------------------------------------


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % BCa bootstrap interval of the mean.

    Args:
        differences: paired differences [n], finite.

    Returns:
        (low, high). Where all differences are equal every resample has the same mean, and both ends are that value.
        None for fewer than two differences: nothing says how they would vary.
    """
    if len(differences) < 2:
        return None
    scale = max(abs(d) for d in differences)
    spread = max(differences) - min(differences)
    if spread <= _TIE * scale:
        middle = statistics.fmean(differences)
        return middle, middle
    import warnings

    import numpy as np
    from scipy import stats

    data = np.asarray(differences, dtype=np.float64) / scale
    ends = (math.nan, math.nan)
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            # BCa has no value where a tail of the resamples is empty; the percentile interval always has one.
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                (data,),
                np.mean,
                confidence_level=CONFIDENCE,
                n_resamples=_RESAMPLES,
                method=method,
                rng=np.random.default_rng(0),
            ).confidence_interval
        ends = float(found.low) * scale, float(found.high) * scale
        if all(math.isfinite(end) for end in ends):
            break
    return ends


def sign_flip_p(differences: Sequence[float]) -> float:
    """The two-sided p of the sign-flip permutation test on the mean.

    Args:
        differences: paired differences [n], finite, n >= 1.

    Returns:
        The share of the 2^n sign patterns whose mean is at least as far from zero as the one seen: exact up to n = 16.
        Beyond that (1 + such patterns) / (1 + 99,999) over random ones. Always in [2/2^n, 1].
    """
    import numpy as np
    from scipy import stats

    data = np.asarray(differences, dtype=np.float64)
    scale = float(np.abs(data).max())
    if len(data) == 1 or scale == 0.0:
        return 1.0
    data /= scale
    test = stats.permutation_test(
        (data,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RANDOM_FLIPS,
        batch=10_000,
        rng=np.random.default_rng(0),
    )
    # scipy's own p compares with a tolerance of 1e-14, which is too fine for differences of rounded scores.
    near = abs(float(test.statistic)) - _TIE * float(np.abs(data).mean())
    as_far = int((np.abs(test.null_distribution) >= near).sum())
    if len(test.null_distribution) != _RANDOM_FLIPS:  # all patterns
        return as_far / len(test.null_distribution)
    return max((as_far + 1) / (_RANDOM_FLIPS + 1), smallest_p(len(data)))


def smallest_p(pairs: int) -> float:
    """The smallest p that so many pairs can give: all differences of one sign, 2 of the 2^n patterns."""
    return 1.0 if pairs < 1 else math.ldexp(2.0, -pairs)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given: adjusted p, each at least the raw one and at most 1."""
    if not p:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(list(p), method="holm")[1]]


# ---- the table ------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class TaskMean:
    """A row's scores on one task: how many finite ones, their mean, their standard deviation (ddof 1) from two on."""

    task: str
    n: int
    mean: float | None
    sd: float | None


@attrs.frozen(kw_only=True)
class TableRow:
    """One row of the ablation table. None stands for what there is not (yet); no number here is NaN.

    Args:
        index: index into the study's rows.
        label: the row's name.
        is_base: whether it is the row that the others are compared with.
        planned: cells the study asks for.
        done: cells with a result.
        running: cells begun, without a result (they run now, or were interrupted).
        failed: cells whose last attempt failed.
        missing: cells never begun.
        n: finite scores.
        diverged: results whose score is NaN. They are in no mean and no pair; `notes` says so.
        mean: mean of the tasks' means: with one task the mean over seeds.
        sd: standard deviation (ddof 1) over seeds; with several tasks pooled within the tasks, so that what tasks
            differ by does not count.
        tasks: the same for each task.
        pairs: (task, seed) pairs in which row and base both have a finite score.
        difference: mean of row minus base over the pairs.
        low: lower end of its 95 % bootstrap interval (`bootstrap_interval`).
        high: upper end.
        p: two-sided sign-flip p (`sign_flip_p`).
        p_holm: Holm-corrected over the table's rows.
        smallest_p: the smallest p that so many pairs can give.
        few_pairs: fewer than six pairs.
        parameters_average: trainable adapter parameters averaged over the run, mean over the done cells.
        parameters_final: the same at the end of the run.
        head: trainable parameters of the task head, which are in neither.
        flops: counted operations of a whole run, mean over the done cells.
        step_ratio: step time over the base's at the start of training, mean over the tasks measured.
        step_ratio_end: the same at the end of training.
        peak_memory: bytes, mean over the tasks measured.
        notes: what must be said about this row, a sentence each.
        lr: the adapters' learning rate; those of the tasks where they differ.
    """

    index: int
    label: str
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
    tasks: tuple[TaskMean, ...]
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
    notes: tuple[str, ...]
    lr: str = ""


@attrs.frozen(kw_only=True)
class Table:
    """The ablation table of a study.

    Args:
        title: the study's title.
        name: the study's name.
        base: label of the base row.
        score: what the score is: the primary score's name, or that it is the mean over tasks.
        tasks: names of the tasks.
        rows: the rows in the study's order.
        limits: what p cannot show with so few pairs or so many rows, a sentence each.
        notes: further sentences that belong under the table as a whole.
    """

    title: str
    name: str
    base: str
    score: str
    tasks: tuple[str, ...]
    rows: tuple[TableRow, ...]
    limits: tuple[str, ...]
    notes: tuple[str, ...]

    def frame(self) -> "pandas.DataFrame":
        """The table with unrounded numbers, one line for each row; the tasks' means as ``mean.TASK``."""
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
        """A Markdown document: the table, the tasks' means where there are several, notes."""
        blocks = [f"# {_markdown(self.title)}"]
        for columns in (columns_of(self, SCORES + COSTS), columns_of_tasks(self)):
            if len(columns) > 1:
                head = [_markdown(column.header) for column in columns]
                ruler = ["---", *["---:"] * (len(columns) - 1)]
                lines = [
                    [_markdown(row.label), *(column.text(row) or "-" for column in columns[1:])] for row in self.rows
                ]
                blocks.append("\n".join(f"| {' | '.join(line)} |" for line in [head, ruler, *lines]))
        blocks.append("\n".join(f"- {_markdown(note)}" for note in self.all_notes()))
        return "\n\n".join(block for block in blocks if block) + "\n"

    def to_latex(self) -> str:
        r"""A LaTeX ``table``: scores, costs and tasks' means below each other. It needs ``\usepackage{booktabs}``."""
        label = "".join(c for c in self.name if c.isascii() and (c.isalnum() or c in "-."))
        lines = [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{latex(' '.join([_sentence(self.title), *self.all_notes()]))}}}",
            rf"\label{{tab:{label}}}\par\medskip",
        ]
        for columns in (columns_of(self, SCORES), columns_of(self, COSTS), columns_of_tasks(self)):
            if len(columns) == 1:
                continue
            headers = zip(*(_two_lines(column.latex) for column in columns), strict=True)
            lines += [
                rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
                r"\toprule",
                *[" & ".join(header) + r" \\" for header in headers if any(header)],
                r"\midrule",
            ]
            for row in self.rows:
                entries = [_latex_entry(column.text(row)) for column in columns[1:]]
                lines.append(" & ".join([latex(row.label), *entries]) + r" \\")
            lines += [r"\bottomrule", r"\end{tabular}\par\medskip"]
        return "\n".join([*lines, r"\end{table}"]) + "\n"

    def __str__(self) -> str:
        """The table as plain text for a terminal of 100 columns."""
        blocks = [self.title]
        for columns in (columns_of(self, SCORES), columns_of(self, COSTS), columns_of_tasks(self)):
            if len(columns) > 1:
                texts = [[column.header for column in columns]]
                texts += [[column.text(row) or "-" for column in columns] for row in self.rows]
                blocks += _text_tables(texts, 100)
        blocks.append("\n".join(line for note in self.all_notes() for line in textwrap.wrap(note, 100)))
        return "\n\n".join(block for block in blocks if block)

    def all_notes(self) -> list[str]:
        """The limits and notes of the table, then the notes of its rows, with the row named."""
        return [*self.limits, *self.notes, *(f"{row.label}: {note}" for row in self.rows for note in row.notes)]

    def _plain(self) -> list[dict[str, Any]]:
        table = []
        for row in self.rows:
            plain = attrs.asdict(row, recurse=False)
            plain["notes"] = " ".join(row.notes)
            table.append(plain | {"row": row.label} | {f"mean.{task.task}": task.mean for task in row.tasks})
        return table

    def _plain_columns(self) -> list[str]:
        left_out = ("index", "label", "tasks", "notes")
        names = [field.name for field in attrs.fields(TableRow) if field.name not in left_out]
        return ["row", *names, *(f"mean.{task}" for task in self.tasks), "notes"]


def compare(record: StudyRecord) -> Table:
    """Compare every row of a study with its base.

    Args:
        record: a study, finished or still running: what is not there yet is None, and said in the notes.

    Returns:
        The table, in the study's order of rows.

    Raises:
        LrkitError: a cell's result cannot be read.
    """
    base = {(cell.task, cell.seed): cell.score for cell in record.cells_of(record.base)}
    rows = [_row(record, index, base) for index in range(len(record.rows))]
    tested = [row for row in rows if row.p is not None]
    corrected = holm([row.p for row in tested if row.p is not None])
    adjusted = {row.index: p for row, p in zip(tested, corrected, strict=True)}
    rows = [attrs.evolve(row, p_holm=adjusted.get(row.index)) for row in rows]
    return Table(
        title=record.title,
        name=record.name,
        base=record.rows[record.base].label,
        score=_score_name(record),
        tasks=tuple(task.name for task in record.tasks),
        rows=tuple(rows),
        limits=tuple(_limits(rows)),
        notes=(_TOGETHER,) if len(record.tasks) > 1 and any(row.pairs for row in rows) else (),
    )


def _score_name(record: StudyRecord) -> str:
    names = dict.fromkeys(next(iter(cell.result.scores)) for cell in record.cells if cell.result)
    found = " or ".join(names or dict.fromkeys(task.metric for task in record.tasks if task.metric)) or "score"
    return found if len(record.tasks) == 1 else f"{found}, mean over {len(record.tasks)} tasks"


def _row(record: StudyRecord, index: int, base: dict[tuple[str, int], float | None]) -> TableRow:
    cells = record.cells_of(index)
    is_base = index == record.base
    tasks = tuple(_task_mean(task.name, [c for c in cells if c.task == task.name]) for task in record.tasks)
    means = [task.mean for task in tasks if task.mean is not None]
    pairs = [] if is_base else [(cell.score, base.get((cell.task, cell.seed))) for cell in cells]
    both = [(own, other) for own, other in pairs if own is not None and other is not None]
    differences = [own - other for own, other in both if math.isfinite(own) and math.isfinite(other)]
    interval = bootstrap_interval(differences)
    statuses = [cell.status for cell in cells]
    results = [cell.result for cell in cells if cell.result is not None]
    costs = [cost for (row, _), cost in record.costs.items() if row == index]
    scores = [cell.score for cell in cells if cell.score is not None]
    finite = [score for score in scores if math.isfinite(score)]
    row = TableRow(
        index=index,
        label=record.rows[index].label,
        is_base=is_base,
        planned=len(cells),
        done=len(results),
        running=statuses.count("running"),
        failed=statuses.count("failed"),
        missing=statuses.count("missing"),
        n=len(finite),
        diverged=len(scores) - len(finite),
        mean=statistics.fmean(means) if means else None,
        sd=_pooled(tasks),
        tasks=tasks,
        pairs=len(differences),
        difference=statistics.fmean(differences) if differences else None,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        p=sign_flip_p(differences) if differences else None,
        p_holm=None,
        smallest_p=smallest_p(len(differences)) if differences else None,
        few_pairs=not is_base and len(differences) < ENOUGH_PAIRS,
        parameters_average=_mean([result.parameters.average for result in results]),
        parameters_final=_mean([result.parameters.now for result in results]),
        head=_mean([result.parameters.head for result in results]),
        flops=_mean([result.flops.run for result in results if result.flops is not None]),
        step_ratio=_mean([cost.step_ratio for cost in costs]),
        step_ratio_end=_mean([cost.step_ratio_end for cost in costs]),
        peak_memory=_mean([cost.peak_memory for cost in costs]),
        notes=(),
        lr=record.rows[index].lr,
    )
    notes = _row_notes(row, differences, left_out=len(both) - len(differences))
    return attrs.evolve(row, notes=(*notes, *(f"cost on {c.task} not measured: {c.error}." for c in costs if c.error)))


def _task_mean(task: str, cells: Sequence[CellRecord]) -> TaskMean:
    finite = [cell.score for cell in cells if cell.score is not None and math.isfinite(cell.score)]
    return TaskMean(
        task=task,
        n=len(finite),
        mean=statistics.fmean(finite) if finite else None,
        sd=statistics.stdev(finite) if len(finite) > 1 else None,
    )


def _pooled(tasks: Sequence[TaskMean]) -> float | None:
    """√(Σ (n_t - 1) sd_t² / Σ (n_t - 1)); with one task its own standard deviation."""
    spread = [(task.n - 1, task.sd) for task in tasks if task.sd is not None]
    if len(spread) == 1:
        return spread[0][1]
    freedom = sum(weight for weight, _ in spread)
    return math.sqrt(sum(weight * sd * sd for weight, sd in spread) / freedom) if freedom else None


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _row_notes(row: TableRow, differences: Sequence[float], left_out: int) -> list[str]:
    notes = []
    to_come = row.running + row.missing
    if to_come:
        notes.append(f"{to_come} of {row.planned} cells not done yet.")
    if row.failed:
        notes.append(f"{row.failed} of {row.planned} cells failed.")
    if row.diverged:
        notes.append(f"{row.diverged} of {row.done} results diverged (score NaN): in no mean and no pair.")
    empty = [task.task for task in row.tasks if task.n == 0]
    if row.n and empty:
        notes.append(f"no score on {', '.join(empty)}: the mean is over the other tasks.")
    if left_out and not row.is_base:
        notes.append(
            f"{left_out} pairs left out, since the row or the base diverged." if left_out > 1 else _ONE_LEFT_OUT
        )
    if len(differences) == 1:
        notes.append("one pair: no interval.")
    elif differences and row.low == row.high:
        notes.append(f"all {len(differences)} differences are equal: the interval is that one value.")
    return notes


_ONE_LEFT_OUT = "1 pair left out, since the row or the base diverged."


_TOGETHER = "Pairs of all tasks are tested together, each as one independent pair."


def _limits(rows: Sequence[TableRow]) -> list[str]:
    limits = []
    few = sorted({row.pairs for row in rows if row.few_pairs and row.pairs})
    if few:
        least = ", ".join(f"2/2^{n} = {smallest_p(n):g} with {n}" if n > 1 else "1 with 1" for n in few)
        limits.append(
            f"Fewer than six pairs: the smallest p that the sign-flip test can give is {least}, whatever the scores. "
            f"Only with six or more ({smallest_p(ENOUGH_PAIRS):g}) can p fall below 0.05."
        )
    tested = [row.pairs for row in rows if row.pairs]
    # The smallest p of all is multiplied by how many rows are tested.
    least_holm = len(tested) * smallest_p(max(tested, default=0))
    if len(tested) > 1 and not few and least_holm >= 0.05:
        enough = next(n for n in range(1, 100) if len(tested) * smallest_p(n) < 0.05)
        limits.append(
            f"With {len(tested)} rows tested and at most {max(tested)} pairs, no p can be below {least_holm:.2g} after "
            f"Holm's correction, whatever the scores; {enough} pairs could bring it below 0.05."
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


def decimals(table: Table) -> int:
    """How many decimals scores are shown with: four below 10, fewer for larger ones."""
    size = max((abs(task.mean) for row in table.rows for task in row.tasks if task.mean is not None), default=0.0)
    return 4 if size < 10 else 2 if size < 1000 else 0


@attrs.frozen
class Column:
    """One column as text: a key, a header for plain text, one for LaTeX, and a row's entry (empty where there is none)."""

    key: str
    header: str
    latex: str
    text: Callable[[TableRow], str]


SCORES = ("n", "score", "difference", "interval", "p", "p_holm")
COSTS = ("lr", "parameters_average", "parameters_final", "flops", "step_ratio", "step_ratio_end", "peak_memory")


def columns_of(table: Table, keys: Sequence[str]) -> list[Column]:
    """The row's label and the columns asked for, less those in which no row has an entry."""
    places = decimals(table)

    def score(row: TableRow) -> str:
        spread = "" if row.sd is None else f" ± {row.sd:.{places}f}"
        return "" if row.mean is None else f"{row.mean:.{places}f}{spread}"

    def interval(row: TableRow) -> str:
        return "" if row.low is None or row.high is None else f"[{row.low:+.{places}f}, {row.high:+.{places}f}]"

    def number(key: str, show: Callable[[float], str]) -> Callable[[TableRow], str]:
        return lambda row: "" if getattr(row, key) is None else show(getattr(row, key))

    made = [
        Column("n", "n", "$n$", lambda row: f"{row.n}" if row.n == row.planned else f"{row.n}/{row.planned}"),
        Column("score", table.score if len(table.score) < 16 else "score", "Score", score),
        Column("difference", "difference", r"$\Delta$", number("difference", lambda x: f"{x:+.{places}f}")),
        Column("interval", "95 % interval", r"95\,\% interval", interval),
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
    """The row's label and one column for each task's mean, where there are several tasks."""
    places = decimals(table)

    def mean(index: int) -> Callable[[TableRow], str]:
        def text(row: TableRow) -> str:
            value = row.tasks[index].mean
            return "" if value is None else f"{value:.{places}f}"

        return text

    label = columns_of(table, ())[0]
    names = table.tasks if len(table.tasks) > 1 else ()
    return [label, *(Column(f"mean.{name}", name, latex(name), mean(i)) for i, name in enumerate(names))]


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


_MATH = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ±×÷·→≤≥−<>|"
_MATH_NAMES = (
    r"\alpha \beta \gamma \delta \epsilon \zeta \eta \theta \iota \kappa \lambda \mu \nu \xi \pi \rho \sigma \tau "
    r"\upsilon \phi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi \Sigma \Phi \Psi \Omega "
    r"\pm \times \div \cdot \to \le \ge - < > |"
)
_TEXT = '–—…‘’“”"\\~^'
_TEXT_NAMES = r"\textendash{} \textemdash{} \dots{} ` ' `` '' '' \textbackslash{} \textasciitilde{} \^{}"
_LATEX = {
    **{c: "\\" + c for c in "&%$#_{}"},
    **{sign: f"${name}$" for sign, name in zip(_MATH, _MATH_NAMES.split(), strict=True)},
    **dict(zip(_TEXT, _TEXT_NAMES.split(), strict=True)),
}


def latex(text: str) -> str:
    """Text that pdfLaTeX sets as it is, on one line, special characters escaped.

    A letter that needs more than LaTeX's own fonts stands as its code point, [U+4E2D], so that the file compiles.
    """

    def one(c: str) -> str:
        plain = " " <= c <= "~" or ("À" <= c <= "ÿ" and c not in "ÐÞðþ")
        return _LATEX.get(c) or (c if plain else f"[U+{ord(c):04X}]")

    out = "".join(one(c) for c in unicodedata.normalize("NFC", " ".join(text.split())))
    return re.sub("-(?=-)", "-{}", out)  # two hyphens would be set as a dash


def _latex_entry(text: str) -> str:
    """A number as `columns_of` writes it: a sign is a minus, not a hyphen."""
    signed = text.startswith(("+", "-", "["))
    return f"${text}$".replace(", ", r",\,") if signed else latex(text or "–")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _two_lines(header: str) -> tuple[str, str]:
    """A header over two lines of a table, at the bar."""
    over, bar, under = header.partition("|")
    return (over, under) if bar else ("", header)
