"""The course of a whole run as its schedule alone has it, without walking through its steps."""

from collections.abc import Callable

from lrkit.actions import Action
from lrkit.schedulers import Timetable

Span = tuple[int, int, int, int]
"""After how many steps the state is this one, units that there are, cut by then, and added by then."""


def is_known(action: Action) -> bool:
    """Say whether it is known before a run how many units a decision removes."""
    return action.turnover(1, 1, 1) is not None


def course(times: Timetable, action: Action, units: int) -> list[Span]:
    """Return a run as spans of equal states, in order.

    The first numbers of all spans count the steps 0, 1, ..., T. Once all units there were at first have been cut, spans
    that differ in the last two numbers alone are one. For an action that does not know beforehand how many units go (see
    `is_known`), they go by the budget.

    Args:
        times: the policy's schedule.
        action: its action.
        units: its units at first.
    """
    there, cut, added, since = units, 0, 0, 0
    found: list[Span] = []
    for span in times.decisions():
        at = 0
        while at < len(span):
            allowed = times.budget(span[at])
            last = _last_equal(times.budget, span, at)
            while at <= last:
                moved = action.turnover(there, allowed, times.layers)
                goes, comes = (max(0, there - allowed), 0) if moved is None else moved
                if not goes and not comes:
                    break
                if span[at]:  # no step trains in the state before a decision at step 0
                    found.append((span[at] - since, there, cut, added))
                repeats = last - at + 1 if goes == comes and cut >= units else 1
                since, there = span[at], there - goes + comes
                cut, added, at = cut + goes * repeats, added + comes * repeats, at + repeats
            at = last + 1
    return [*found, (times.total_steps + 1 - since, there, cut, added)]


def _last_equal(function: Callable[[int], int], span: range, first: int) -> int:
    """Return the last index in a span up to which a function is what it is at `first`; it only ever rises, or only falls."""
    value, low, step = function(span[first]), first, 1
    while low + step < len(span) and function(span[low + step]) == value:
        low, step = low + step, 2 * step
    high = min(low + step, len(span))  # not the same there, or beyond the end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if function(span[middle]) == value else (low, middle)
    return low
