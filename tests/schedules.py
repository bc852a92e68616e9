"""A scheduler looked at by its own numbers of steps, which begin at 0 or 1: papers and oracles count so."""

from lrkit.schedulers import Scheduler, Timetable


def _over(scheduler: Scheduler, total_steps: int, units: int = 1, layers: int = 1) -> Timetable:
    return scheduler.over(total_steps, units=units, layers=layers)


def _step(scheduler: Scheduler, number: int) -> int:
    return number + 1 - scheduler.first_step


def share(scheduler: Scheduler, number: int, *, total_steps: int, units: int, layers: int) -> float:
    """Return the budget's share after the step of this number."""
    return _over(scheduler, total_steps, units, layers).share(_step(scheduler, number))


def due(scheduler: Scheduler, number: int, *, total_steps: int) -> bool:
    """Say whether a decision is due after the step of this number."""
    return _over(scheduler, total_steps).due(_step(scheduler, number))


def observes(scheduler: Scheduler, number: int, *, total_steps: int) -> bool:
    """Say whether scores are measured at the step of this number."""
    return _over(scheduler, total_steps).observes(_step(scheduler, number))


def end(scheduler: Scheduler, total_steps: int) -> int:
    """Return the number of the last decision's step."""
    return _over(scheduler, total_steps).last + scheduler.first_step - 1


def decisions(scheduler: Scheduler, total_steps: int) -> list[int]:
    """Return the numbers of all decisions' steps."""
    return [step + scheduler.first_step - 1 for span in _over(scheduler, total_steps).decisions() for step in span]
