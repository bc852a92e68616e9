"""Compare the rows of a study with its base, in numbers: `rows_of` one task's table. No torch here.

Rows are compared in pairs, of the same task and the same seed, by `lrkit.study.paired`. Each task has a table of its own:
the effect of a row may differ from task to task, so pairs of several tasks are no sample of one thing, and a test on all
of them together rejects far too often.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import attrs

from lrkit.study.files import Cost
from lrkit.study.paired import ENOUGH_PAIRS, LEVEL, enough_pairs, holm, interval, sign_flip_p, smallest_p
from lrkit.study.results import StudyRecord
from lrkit.study.scores import scale_of


@attrs.frozen(kw_only=True)
class TableRow:
    """One row of a task's table. None stands for a number that there is not (yet); no number here is NaN.

    Args:
        index: index into the study's rows.
        label: the row's name.
        task: the task's name.
        is_base: it is the row that the others are compared with.
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
        low: lower end of its 95 % interval (`lrkit.study.paired.interval`); None with fewer than six pairs: it is
            unbounded then.
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
        notes: sentences that belong to this row.
        lr: the adapters' learning rate; those of the tasks if they differ.
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
        if self.mean is None or self.guess is None or self.mean > self.guess:
            return ""
        return "not above the constant guess"


def score_name(record: StudyRecord, task: str) -> str:
    """Return the name of a task's primary score; several, joined by "or", if its cells differ."""
    scored = [cell.result for cell in record.cells if cell.result and cell.task == task]
    names = dict.fromkeys(next(iter(result.scores)) for result in scored)
    return " or ".join(names or [t.metric for t in record.tasks if t.name == task and t.metric]) or "score"


def rows_of(record: StudyRecord, task: str, costs: Mapping[tuple[int, str], Cost]) -> list[TableRow]:
    """Compare the rows of one task's table with the base, with Holm's correction over them.

    Args:
        record: the study.
        task: name of the task.
        costs: (row, task) to cost.
    """
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
        guess = scale_of([score_name(record, task)], [row.guess]).text(row.guess)
        notes.append(f"mean not above the best constant guess, {guess} (†).")
    return attrs.evolve(row, notes=(*notes, *([f"cost not measured: {cost.error}."] if cost and cost.error else [])))


def effect_size(differences: Sequence[float]) -> float | None:
    """Return the mean difference over the differences' standard deviation; None for one difference, or if all are equal."""
    if len(differences) < 2:
        return None
    spread = statistics.stdev(differences)
    # equal but for the last bits, as differences of rounded scores are
    return statistics.fmean(differences) / spread if spread > 1e-9 * max(map(abs, differences)) else None


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _row_notes(row: TableRow, left_out: int) -> list[str]:
    """Say how far a row is, and which pairs were left out of its difference."""
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


def limits_of(rows: Sequence[TableRow]) -> list[str]:
    """Say what p cannot show with so few pairs or so many rows, a sentence each."""
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
