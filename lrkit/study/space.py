"""The values that tuning tries: lists, ranges and their combinations. No torch here."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import attrs

from lrkit.errors import LrkitError, shown

_LOG = re.compile(r"log\(\s*([^,()]+?)\s*,\s*([^,()]+?)\s*(?:,\s*(\d+)\s*)?\)")


@attrs.frozen
class Log:
    """A range of positive numbers, even in their logarithm: ``log(1e-4,1e-2,5)``.

    Args:
        low: the lower end.
        high: the upper end.
        points: how many values a grid takes, the ends among them; None if it is for a sampler alone.
    """

    low: float
    high: float
    points: int | None = None

    def values(self) -> list[float]:
        """Return a grid's values, to three digits. Raise LrkitError if their number is not given."""
        if self.points is None:
            raise LrkitError(f"{self} has no number of values for a grid: log({self.low:g},{self.high:g},5)")
        steps = [index / (self.points - 1) for index in range(self.points)]
        return [float(f"{self.low ** (1 - at) * self.high**at:.3g}") for at in steps]

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"log({self.low:g},{self.high:g}" + (f",{self.points})" if self.points else ")")


Domain = Log | list[Any]


def domain(value: Any, path: str) -> Domain:
    """Read the values of a setting: a list, or ``"log(low,high,points)"``.

    Raises:
        LrkitError: it is neither, or values repeat.
    """
    if isinstance(value, str) and (found := _LOG.fullmatch(value.strip())):
        try:
            low, high = float(found[1]), float(found[2])
        except ValueError:
            low = high = math.nan
        points = None if found[3] is None else int(found[3])
        if not 0 < low < high < math.inf or (points is not None and not 2 <= points <= 1000):
            raise LrkitError(
                f"tune {path}: {value} must be log(LOW,HIGH,POINTS) with 0 < LOW < HIGH and 2 points or more"
            )
        return Log(low, high, points)
    if not isinstance(value, list) or not value:
        raise LrkitError(f'tune {path}: must be a list of values to try, or "log(1e-4,1e-2,5)", not {shown(value)}')
    for each in value:
        if not isinstance(each, str | int | float | None) or (isinstance(each, float) and not math.isfinite(each)):
            raise LrkitError(f"tune {path}: {shown(each)} is no value of a setting: a number, a text, true or false")
    if len({repr(each) for each in value}) < len(value):
        raise LrkitError(f"tune {path}: a value is there twice: {shown(value)}")
    return value


def grid(space: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List every combination of a row's space: path to value each; the last setting changes fastest."""
    domains = [domain(value, path) for path, value in space.items()]
    values = [each.values() if isinstance(each, Log) else each for each in domains]
    return [dict(zip(space, each, strict=True)) for each in itertools.product(*values)]
