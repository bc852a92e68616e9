"""Questions to a policy before a run: does its schedule fit, what will it miss, what would another length change."""

from collections.abc import Iterator

from lrkit.errors import LrkitError, shown
from lrkit.loop.course import course, is_known
from lrkit.method import Policy
from lrkit.schedulers import Timetable
from lrkit.settings import MOST_STEPS


def capacity(policy: Policy, units: int, layers: int) -> int:
    """Return what a schedule's amounts are of: all units, those still to come included if the action adds some."""
    amounts = (policy.scheduler.start, policy.scheduler.target) if policy.action.grows else ()
    return max([units, *(amount * layers for amount in amounts if isinstance(amount, int))])


def timetable(policy: Policy, total_steps: int, units: int, layers: int) -> Timetable:
    """Bind a policy's schedule to a run.

    Raises:
        LrkitError: more steps than any run has, phases that do not fit, or a budget that would grow.
    """
    if total_steps > MOST_STEPS:
        raise LrkitError(f"total_steps must be at most {MOST_STEPS:,}, not {shown(total_steps)}")
    scheduler = policy.scheduler
    times = scheduler.over(total_steps, units=units, layers=layers)
    first, last = times.budget(-1), times.budget(total_steps + 1)
    if last > first and not policy.action.grows:
        raise LrkitError(
            f"{type(scheduler).__name__}: target {scheduler.target!r} is {last} of {units} units, "
            f"above start {scheduler.start!r}, which is {first}: a budget never grows"
        )
    return times


def forewarnings(policy: Policy, times: Timetable, units: int) -> Iterator[tuple[str, str]]:
    """Yield a key and a message for each thing that a run will not reach by its schedule.

    Args:
        policy: the policy.
        times: its schedule, bound to the run.
        units: its units at first.
    """
    scheduler, action = policy.scheduler, policy.action
    name, end = type(scheduler).__name__, times.number(times.last)
    if not 1 <= times.last <= times.total_steps:
        first = times.number(1)
        yield (
            "end",
            f"{name}: the last decision is due at step {end}, and the run's steps are numbered {first} to "
            f"{times.number(times.total_steps)}: the budget will not be reached",
        )
        return
    budget = times.budget(times.last)
    if action.unit == "component" and action.fate in ("masked", "removed") and is_known(action) and not budget:
        yield (
            "nothing",
            f"{name}.target = {scheduler.target!r}: after the last decision, at step {end}, no component is left, and the "
            "model is the one before fine-tuning but for its head",
        )
    there = course(times, action, units)[-1][1] if action.grows else budget
    if there != budget:
        yield (
            "short",
            f"{action!r}: after the last decision, at step {end}, there will be {there} components of a budget of {budget}: "
            "give it more decisions, or more at each",
        )


def change(step: int, before: Timetable, after: Timetable) -> str:
    """Say what another number of total steps would change after `step` steps."""
    ends = [times.number(times.last) for times in (after, before)]
    budgets = [times.budget(step) for times in (after, before)]
    return (
        f"last decision at step {ends[0]} instead of {ends[1]}, budget at step {before.number(step)} {budgets[0]} instead "
        f"of {budgets[1]} of {before.units} units"
    )
