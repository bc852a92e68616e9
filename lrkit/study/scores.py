"""Write a score: a share as percent, and any other score as it is."""

from collections.abc import Iterable, Sequence

import attrs

from lrkit.errors import LrkitError

_SHARES = {"accuracy", "f1", "precision", "recall", "em", "final_number"}
_WITHIN_ONE = {"pearson", "spearman", "matthews", "explained"}
_GROUPS = ("has_answer_", "no_answer_", "best_")
"""Begin the names of scores of a part of the rows, or at the best threshold."""

MARGIN = ", in the primary score's units (0.01 is one point of accuracy)"
"""Says in errors in which units a margin is."""


@attrs.frozen
class Scale:
    """The way to write the scores of one table.

    Args:
        unit: ``"%"`` for shares, and empty for anything else.
        places: decimals.
        lower: a lower score is the better one, which `heading` says.
    """

    unit: str
    places: int
    lower: bool = False

    def of(self, score: float) -> float:
        """Return a score in this unit: 0.83 is 83 if the unit is percent."""
        return 100 * score if self.unit else score

    def number(self, score: float, sign: str = "") -> str:
        """Write a score without its unit; with ``sign="+"`` a difference of scores, which in percent is in points."""
        return f"{self.of(score):{sign}.{self.places}f}"

    def text(self, score: float) -> str:
        """Write a score with its unit."""
        return f"{self.number(score)} {self.unit}".strip()

    def heading(self, name: str) -> str:
        """Write a score's name with its unit, for example ``accuracy, %``; and which way is better, if it is not up."""
        return ", ".join([name, *([self.unit] if self.unit else []), *(["lower is better"] if self.lower else [])])


def scale_of(names: Iterable[str], values: Iterable[float] = (), *, higher_is_better: bool = True) -> Scale:
    """Choose how scores are written.

    Args:
        names: the scores' names. Accuracy, F1, exact match and ROUGE are shares, also of a second validation set
            (``accuracy_mm``) or of a part of the rows (``has_answer_f1``).
        values: the scores. Up to 10 they have four decimals, two if they are percent; larger ones have fewer. Perplexities
            have three up to 100.
        higher_is_better: as the task says.
    """
    names, size, lower = list(names), max(map(abs, values), default=0.0), not higher_is_better
    if names and size <= 1 and all(map(is_share, names)):
        return Scale("%", 2, lower)
    if names and all(name.startswith("perplexity") for name in names):
        return Scale("", 3 if size < 100 else 2 if size < 10_000 else 0, lower)
    return Scale("", 4 if size < 10 else 2 if size < 1000 else 0, lower)


def check_share(value: float | None, called: str, score: str) -> None:
    """Raise LrkitError for a margin or size that no difference of shares can reach: per cent were meant."""
    if value is not None and value >= 1 and (is_share(score) or score in _WITHIN_ONE):
        what = "is a share" if is_share(score) else "is at most 1"
        raise LrkitError(f"{called} must be below 1{MARGIN}, not {value:g}: {score} {what}")


def margin_words(margin: float, scales: Sequence[Scale]) -> str:
    """Write a margin as the differences of scores are written: in points if all are shares, and else as it was stated."""
    if not scales or any(scale.unit != "%" for scale in scales):
        return f"{margin:g}"
    return f"{100 * margin:g} point{'' if margin == 0.01 else 's'}"


def p_text(p: float) -> str:
    """Write a p: two digits, and a third one where two would hide on which side of 0.05 it lies."""
    return f"{p:.3g}" if f"{p:.2g}" == "0.05" else f"{p:.2g}"


def is_share(name: str) -> bool:
    """Tell by its name if a score is a share, from 0 to 1."""
    for group in _GROUPS:
        name = name.removeprefix(group)
    first = name.partition("_")[0]
    return first.startswith("rouge") or name in _SHARES or first in _SHARES
