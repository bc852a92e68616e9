"""Test all tasks of a study together, for each row: stratified sign flips. No torch here.

Pairs of several tasks are no sample of one thing: effects, units and spreads differ from task to task. So signs are flipped
within each task, and the statistic is the mean over tasks of each task's *standardized* mean: its mean difference over the
root mean square of its differences. A task with wide differences, or of another unit, then weighs no more than any other;
and since flipping a sign leaves the root mean square as it is, the test stays exact, which a division by the standard
deviation would not keep so simple: with w_i = d_i / (n_t rms_t) it is the sign-flip test of `lrkit.study.paired` on all w_i.

It tests that *no task has a difference*: that each d_i of each task could as well have had the other sign, each by itself.
It rejects if the differences point one way over the tasks; those of two tasks that point opposite ways cancel out. It says
nothing about tasks that are not in the study, since these tasks are no random sample of any.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

import attrs

from lrkit.study.comparison import gains_between, over_rows
from lrkit.study.paired import sign_flip_p
from lrkit.study.results import StudyRecord

ASSUMES = (
    "All tasks together: signs are flipped within each task, and the statistic is the mean over tasks of each task's mean "
    "difference in units of its root mean square. It tests that no task has a difference, and says nothing about tasks that "
    "are not here."
)
"""The sentence that goes with the numbers."""


@attrs.frozen(kw_only=True)
class Combined:
    """One row against the base on all tasks together.

    Args:
        index: index into the study's rows.
        label: the row's name.
        tasks: how many tasks have a pair.
        higher: on how many of them the row is ahead.
        pairs: pairs of all tasks.
        standardized: the statistic, between -1 and 1: the mean over tasks of mean difference / root mean square.
        p: two-sided p of the stratified sign-flip test.
        p_holm: Holm-corrected over the rows.
    """

    index: int
    label: str
    tasks: int
    higher: int
    pairs: int
    standardized: float
    p: float
    p_holm: float


def combined_p(differences: Sequence[Sequence[float]]) -> float:
    """Compute the two-sided p of the stratified sign-flip test.

    Args:
        differences: of each task [n_t], finite, n_t >= 1. Tasks may have different numbers of pairs.

    Returns:
        The share of sign patterns whose statistic is at least as far from zero as the one seen; exact up to 16 pairs in
        all, and of 99,999 random patterns with a fixed seed beyond. Tasks whose differences are all zero count as zero.
    """
    return sign_flip_p([d / (len(task) * _size(task)) for task in differences for d in task])


def standardized(differences: Sequence[Sequence[float]]) -> float:
    """Return the test's statistic: the mean over tasks of mean difference / root mean square."""
    return statistics.fmean(statistics.fmean(task) / _size(task) for task in differences)


def _size(task: Sequence[float]) -> float:
    """Return the root mean square of a task's differences; 1 if all are zero."""
    return math.hypot(*task) / math.sqrt(len(task)) or 1.0


def combine(record: StudyRecord) -> tuple[Combined, ...]:
    """Test each row that has pairs on two tasks or more, in the study's order of rows."""
    found: dict[int, list[list[float]]] = {}
    for index in range(len(record.rows)):
        others = [] if index == record.base else record.tasks
        tasks = [gains_between(record, index, record.base, task.name)[0] for task in others]
        tasks = [differences for differences in tasks if differences]
        if len(tasks) > 1:
            found[index] = tasks
    p: Mapping[int, float] = {index: combined_p(tasks) for index, tasks in found.items()}
    # A row without pairs, or not yet, counts as well: no p rises later.
    adjusted = over_rows({index: p.get(index, 1.0) for index in range(len(record.rows)) if index != record.base})
    return tuple(
        Combined(
            index=index,
            label=record.rows[index].label,
            tasks=len(tasks),
            higher=sum(statistics.fmean(task) > 0 for task in tasks),
            pairs=sum(map(len, tasks)),
            standardized=standardized(tasks),
            p=p[index],
            p_holm=adjusted[index],
        )
        for index, tasks in found.items()
    )


__all__ = ["ASSUMES", "Combined", "combine", "combined_p", "standardized"]
