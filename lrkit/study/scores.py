"""Write a score: a share as percent, and any other score as it is."""

from collections.abc import Iterable

import attrs

_SHARES = ("accuracy", "f1")


@attrs.frozen
class Scale:
    """The way to write the scores of one table.

    Args:
        unit: ``"%"`` for shares, and empty for anything else.
        places: decimals.
    """

    unit: str
    places: int

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
        """Write a score's name with its unit, for example ``accuracy, %``."""
        return f"{name}, {self.unit}" if self.unit else name


def scale_of(names: Iterable[str], values: Iterable[float] = ()) -> Scale:
    """Choose how scores are written.

    Args:
        names: the scores' names. Accuracy and F1 are shares, also of a second validation set (``accuracy_mm``).
        values: the scores. Up to 10 they have four decimals, two if they are percent; larger ones have fewer.
    """
    names, size = list(names), max(map(abs, values), default=0.0)
    if names and size <= 1 and all(name.partition("_")[0] in _SHARES for name in names):
        return Scale("%", 2)
    return Scale("", 4 if size < 10 else 2 if size < 1000 else 0)
