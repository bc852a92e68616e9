"""Test for equivalence, so that "no difference" can be a finding: two one-sided tests against a margin. No torch here.

A margin m says which differences do not matter. Two one-sided tests (Schuirmann, 1987; Lakens, 2017) ask whether the mean
difference is -m or less, and whether it is m or more; if both are rejected at 0.05, the row is equivalent to the base
within ±m. Each is a sign-flip test as in `lrkit.study.paired`, of d_i + m and of d_i - m, so the answer is yes exactly if
the 90 % interval of the mean lies inside ±m. With n pairs no one-sided p is below 1/2^n: four pairs can show nothing.

The margin must be stated before the first test cell: with one chosen afterwards, anything is equivalent.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lrkit.study.paired import LEVEL, sign_flip_p, smallest_p

if TYPE_CHECKING:
    from lrkit.study.scores import Scale
    from lrkit.study.table_row import TableRow

Verdict = Literal["different", "equivalent", "negligible", "open"]

_TIE = 1e-9  # relative: a difference of 0.83 - 0.82 is a margin of 0.01, though not to the last bit


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """Compute the p of the two one-sided tests: the larger of the two.

    Args:
        differences: paired differences [n], finite, n >= 1.
        margin: m > 0, in the same units.

    Returns:
        p of "the mean is not inside ±m", at least 1/2^n. It is below 0.05 exactly if `interval` at 0.9 lies inside ±m.
    """
    return max(below_p(differences, margin), below_p([-d for d in differences], margin))


def below_p(differences: Sequence[float], bound: float) -> float:
    """Compute the one-sided sign-flip p of "the mean is `bound` or more".

    By symmetry as many patterns are far out below as above, so it is half of the two-sided p if the mean is below. If it is
    not, the value is only a bound of 0.5 or more.
    """
    slack = _TIE * max(bound, *map(abs, differences))
    moved = [0.0 if abs(d - bound) <= slack else d - bound for d in differences]
    p = sign_flip_p(moved)
    return p / 2 if math.fsum(moved) < 0 else 1 - p / 2


def verdict_of(p: float, p_equivalent: float | None) -> Verdict:
    """Judge a row by its p of the difference and, if there is a margin, by that of equivalence, both after Holm.

    Returns:
        ``"different"`` (from 0), ``"equivalent"`` (inside the margin), ``"negligible"`` (both: different from 0 and inside
        the margin), or ``"open"`` (neither could be shown).
    """
    equivalent = p_equivalent is not None and p_equivalent < LEVEL
    if p < LEVEL:
        return "negligible" if equivalent else "different"
    return "equivalent" if equivalent else "open"


def why_open(row: "TableRow", scale: "Scale") -> str:
    """Say in one sentence why a row could be shown neither different nor equivalent.

    Args:
        row: with a margin, and the verdict ``"open"``.
        scale: for scores and their differences.
    """
    if smallest_p(row.pairs) / 2 >= LEVEL:
        pairs = "1 pair" if row.pairs == 1 else f"{row.pairs} pairs"
        least = f"1/2^{row.pairs} = {smallest_p(row.pairs) / 2:g}"
        return (
            f"open: with {pairs} no one-sided p is below {least}, so neither a difference nor equivalence can be shown."
        )
    if row.p_equivalent is None:
        return "open: all differences are equal, so that the scores are too coarse to tell."
    margin = f"±{scale.number(row.margin or 0.0)}"
    if row.p_equivalent < LEVEL:
        return f"open: the 90 % interval is inside {margin}, but not so after Holm's correction over the rows."
    return f"open: no difference is shown, and the 90 % interval is not inside {margin}."
