"""Compare the rows of a study with its base, in numbers: `rows_of` one task's table. No torch here.

Rows are compared in pairs, of the same task and the same seed, by `lrkit.study.paired`. Each task has a table of its own:
the effect of a row may differ from task to task, so pairs of several tasks are no sample of one thing, and a test on all
of them together rejects far too often.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import attrs

from lrkit.study.effects import corrected, effect_interval, effect_size
from lrkit.study.equivalence import equivalence_p, verdict_of, why_open
from lrkit.study.files import Cost
from lrkit.study.paired import ENOUGH_PAIRS, LEVEL, all_equal, enough_pairs, holm, interval, sign_flip_p, smallest_p
from lrkit.study.results import StudyRecord
from lrkit.study.scores import Scale, scale_of
from lrkit.study.table_row import TableRow
from lrkit.study.tuned import lr_of


def score_name(record: StudyRecord, task: str) -> str:
    """Return the name of a task's primary score; several, joined by "or", if its cells differ."""
    scored = [cell.result for cell in record.cells if cell.result and cell.task == task]
    names = dict.fromkeys(next(iter(result.scores)) for result in scored)
    return " or ".join(names or [t.metric for t in record.tasks if t.name == task and t.metric]) or "score"


def scale_on(record: StudyRecord, task: str, values: Iterable[float] = ()) -> Scale:
    """Choose how a task's scores are written, as `lrkit.study.scores.scale_of` does."""
    return scale_of([score_name(record, task)], values, higher_is_better=record.higher_is_better(task))


def rows_of(record: StudyRecord, task: str, costs: Mapping[tuple[int, str], Cost]) -> list[TableRow]:
    """Compare the rows of one task's table with the base, with Holm's correction over them.

    Args:
        record: the study.
        task: name of the task.
        costs: (row, task) to cost.
    """
    rows = [_row(record, index, task, costs.get((index, task))) for index in range(len(record.rows))]
    different = _over_all(rows, {row.index: row.p for row in rows})
    equivalent = _over_all(rows, {row.index: row.p_equivalent for row in rows})
    scale = scale_on(record, task, [row.mean for row in rows if row.mean is not None])
    return [_judged(row, different.get(row.index), equivalent.get(row.index), scale) for row in rows]


def over_rows(p: Mapping[int, float]) -> dict[int, float]:
    """Correct p by Holm's method, by the row's index."""
    return dict(zip(p, holm(list(p.values())), strict=True))


def _over_all(rows: Sequence[TableRow], p: Mapping[int, float | None]) -> dict[int, float]:
    """Correct p over all rows but the base: one without a pair, or not yet, counts with p = 1, so that no p rises later."""
    counted = {row.index: 1.0 if (value := p[row.index]) is None else value for row in rows if not row.is_base}
    return {index: value for index, value in over_rows(counted).items() if p[index] is not None}


def _judged(row: TableRow, p_holm: float | None, p_equivalent_holm: float | None, scale: Scale) -> TableRow:
    """Add what depends on the other rows: the corrected p, and the verdict."""
    verdict = "" if p_holm is None else verdict_of(p_holm, p_equivalent_holm)
    row = attrs.evolve(row, p_holm=p_holm, p_equivalent_holm=p_equivalent_holm, verdict=verdict)
    told = [why_open(row, scale)] if row.margin is not None and verdict == "open" else []
    return attrs.evolve(row, notes=(*told, *row.notes))


def differences_between(record: StudyRecord, row: int, other: int, task: str) -> tuple[list[float], int]:
    """Return a row's differences to another one on a task, by seed, and how many pairs are left out as one score is NaN.

    A seed of which either cell has no result yet is not a pair.
    """
    scores = {cell.seed: cell.score for cell in record.cells_of(other, task)}
    pairs = [(cell.score, scores.get(cell.seed)) for cell in record.cells_of(row, task)]
    both = [(own, its) for own, its in pairs if own is not None and its is not None]
    differences = [own - its for own, its in both if math.isfinite(own) and math.isfinite(its)]
    return differences, len(both) - len(differences)


def mixed_pairs(record: StudyRecord, row: int, other: int, task: str) -> int:
    """Count the pairs of which one cell is of the code that the study was last run with, and the other of older code."""
    old = {cell.seed: cell.old for cell in record.cells_of(other, task) if cell.result is not None}
    return sum(
        old.get(cell.seed, cell.old) != cell.old for cell in record.cells_of(row, task) if cell.result is not None
    )


def gains_between(record: StudyRecord, row: int, other: int, task: str) -> tuple[list[float], int]:
    """Return `differences_between` so that more is better: a lower perplexity is a gain."""
    differences, left_out = differences_between(record, row, other, task)
    return (differences if record.higher_is_better(task) else [-each for each in differences]), left_out


def differences_of(record: StudyRecord, index: int, task: str) -> tuple[list[float], int]:
    """Return a row's differences to the base, as `differences_between`; the base has none to itself."""
    return ([], 0) if index == record.base else differences_between(record, index, record.base, task)


def _row(record: StudyRecord, index: int, task: str, cost: Cost | None) -> TableRow:
    cells = record.cells_of(index, task)
    is_base = index == record.base
    differences, left_out = differences_of(record, index, task)
    ends = interval(differences)
    ends_90 = interval(differences, 0.9)
    effects = effect_interval(differences)
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
        lr=lr_of(record, index, task),
        higher_is_better=record.higher_is_better(task),
        tokens_per_second=_mean([cell.tokens_per_second for cell in cells]),
        published="" if record.published is None else record.published.of(record.rows[index].label, task),
        effect_corrected=corrected(differences),
        effect_low=effects[0] if effects else None,
        effect_high=effects[1] if effects else None,
        low_90=ends_90[0] if ends_90 else None,
        high_90=ends_90[1] if ends_90 else None,
        margin=None if is_base else record.margin,
        p_equivalent=_equivalence(differences, record.margin),
    )
    notes = _row_notes(row, left_out, all_equal(differences))
    if mixed := 0 if is_base else mixed_pairs(record, index, record.base, task):
        notes.append(f"{mixed} of {row.pairs} pairs are of a cell of older code beside one of newer code.")
    if row.warning and row.guess is not None:
        guess = scale_on(record, task, [row.guess]).text(row.guess)
        notes.append(f"mean {row.warning.replace('the', 'the best')}, {guess} (†).")
    return attrs.evolve(row, notes=(*notes, *([f"cost not measured: {cost.error}."] if cost and cost.error else [])))


def _equivalence(differences: Sequence[float], margin: float | None) -> float | None:
    """Return the p of equivalence; None without a margin, and if all differences are equal: such scores are too coarse."""
    return None if margin is None or not differences or all_equal(differences) else equivalence_p(differences, margin)


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def _row_notes(row: TableRow, left_out: int, equal: bool) -> list[str]:
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
    if equal:
        notes.append(
            f"all {row.pairs} differences are equal{', so the interval has no width' if row.low is not None else ''}: that "
            "says how coarse the scores are, and is no certainty."
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
    # The smallest p of all is multiplied by how many rows there are beside the base, those without a pair as well.
    many, most = sum(not row.is_base for row in rows), max((row.pairs for row in rows), default=0)
    least_holm = many * smallest_p(most)
    if many > 1 and most and not few and least_holm >= LEVEL:
        limits.append(
            f"With {many} rows beside the base and at most {most} pairs, no p can be below {least_holm:.2g} after "
            f"Holm's correction, whatever the scores; {enough_pairs(many)} pairs could bring it below {LEVEL}."
        )
    return limits


__all__ = ["TableRow", "differences_of", "effect_size", "limits_of", "over_rows", "rows_of", "scale_on", "score_name"]
