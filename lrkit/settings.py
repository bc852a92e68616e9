"""Checks for settings: one clear line for a value that cannot be meant, used as attrs validators.

Settings that are times follow one rule everywhere: an ``int`` is a number of optimizer steps, a ``float`` in [0, 1] is
a share of the run's ``total_steps``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from lrkit.errors import LrkitError, nearest, shown

Time = int | float
"""An ``int`` is steps, a ``float`` in [0, 1] is a share of the total steps."""

Amount = int | float
"""An ``int`` is units for each adapted matrix on average, a ``float`` in [0, 1] is a share of all units."""

MOST_STEPS = 2**31 - 1
"""The longest run."""

OWN = {"own": True}
"""Metadata of a setting whose default belongs to the component: a swap does not carry its value over from another."""

_Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _fail(instance: object, name: str, value: object, expected: str) -> LrkitError:
    return LrkitError(f"{type(instance).__name__}.{name} must be {expected}, not {shown(value)}")


def whole(minimum: int, maximum: int = 2**31 - 1) -> _Validator:
    """An ``int`` from `minimum` to `maximum` (a ``bool`` is none)."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise _fail(instance, attribute.name, value, f"an int of at least {minimum}")
        if value > maximum:
            raise _fail(instance, attribute.name, value, f"an int of at most {maximum}")

    return check


def real(minimum: float, maximum: float = math.inf, *, above: bool = False, below: bool = False) -> _Validator:
    """A finite number from `minimum` to `maximum`; `above` and `below` leave the ends out."""
    low = f"above {minimum:g}" if above else f"at least {minimum:g}"
    high = "" if maximum == math.inf else f" and {'below' if below else 'at most'} {maximum:g}"

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        good = isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
        good = good and (value > minimum if above else value >= minimum)
        good = good and (value < maximum if below else value <= maximum)
        if not good:
            raise _fail(instance, attribute.name, value, f"a number {low}{high}")

    return check


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def count_or_share(minimum: int = 0) -> _Validator:
    """An ``int`` from `minimum` to 2^31 - 1, or a ``float`` share in [0, 1]. For `Time` and `Amount`."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        good = isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= MOST_STEPS
        good = good or (isinstance(value, float) and 0.0 <= value <= 1.0)
        if not good:
            expected = f"an int of at least {minimum} (a count) or a float in [0, 1] (a share)"
            raise _fail(instance, attribute.name, value, expected)

    return check


def one_of(choices: Sequence[object]) -> _Validator:
    """One of a few values."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            listed = ", ".join(repr(choice) for choice in choices)
            hint = nearest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
            raise _fail(instance, attribute.name, value, f"one of {listed}{hint}")

    return check


def flag() -> _Validator:
    """True or False."""
    return one_of((True, False))


def in_steps(value: Time, total_steps: int) -> int:
    """A `Time` in optimizer steps: an ``int`` as it is, a share rounded to the nearest step."""
    return value if isinstance(value, int) else round(value * total_steps)


def in_units(value: Amount, *, total: int, layers: int) -> int:
    """An `Amount` in units: an ``int`` times the number of adapted matrices, a share of `total` rounded."""
    return value * layers if isinstance(value, int) else round(value * total)
