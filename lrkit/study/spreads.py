"""Estimate from a study that has run how much differences vary from seed to seed: `spreads_of`. No torch here."""

import math
import statistics

import attrs

from lrkit.study.comparison import differences_of
from lrkit.study.results import StudyRecord


@attrs.frozen(kw_only=True)
class Spread:
    """How much the differences of a study vary from seed to seed on one task.

    Args:
        task: the task's name.
        spread: their standard deviation, pooled over the rows; None if no row has two pairs, or all are equal.
        pairs: differences that it was estimated from.
        freedom: its degrees of freedom, one fewer than the pairs of each row.
    """

    task: str
    spread: float | None
    pairs: int = 0
    freedom: int = 0

    @property
    def uncertainty(self) -> float | None:
        """Return the relative standard error of the spread itself, 1/√(2 freedom); None if it was not estimated."""
        return 1.0 / math.sqrt(2 * self.freedom) if self.freedom and self.spread is not None else None


def spreads_of(record: StudyRecord) -> list[Spread]:
    """Estimate from a study how much its differences vary, for each task: the root of the rows' mean variance."""
    found = []
    for task in record.tasks:
        rows = [differences_of(record, index, task.name)[0] for index in range(len(record.rows))]
        rows = [differences for differences in rows if len(differences) > 1]
        freedom = sum(len(differences) - 1 for differences in rows)
        squares = sum((len(differences) - 1) * statistics.variance(differences) for differences in rows)
        spread = math.sqrt(squares / freedom) if freedom else 0.0
        largest = max((abs(d) for differences in rows for d in differences), default=0.0)
        varies = spread > 1e-9 * largest
        pairs = sum(map(len, rows))
        found.append(Spread(task=task.name, spread=spread if varies else None, pairs=pairs, freedom=freedom))
    return found
