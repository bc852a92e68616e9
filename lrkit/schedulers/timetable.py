"""A schedule bound to a run: when a decision is due, and how much may be kept then.

Steps here are 1, 2, ..., whatever number a scheduler gives the first one (`Scheduler.first_step`); 0 is before the first.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from lrkit.errors import LrkitError
from lrkit.settings import Amount, in_steps, in_units

if TYPE_CHECKING:
    from lrkit.schedulers.base import Scheduler


@attrs.frozen
class Timetable:
    """A scheduler's budget over one run, made by ``scheduler.over(total_steps, units=, layers=)``.

    Between t_i and T - t_f the budget is b(t) = b_T + (b_0 - b_T) · decay((t - t_i) / (T - t_i - t_f)), made a whole number
    as `Scheduler.rounding` says, and exact at both ends. With ``decay = (1 - u)³`` it is AdaLoRA's budget (arXiv 2303.10512,
    Eq. 14, whose printed numerator t - t_i - t_f is a misprint: it gives neither end) and one minus AFLoRA's freezing
    fraction (arXiv 2403.13269, section 4).

    Args:
        scheduler: the schedule.
        total_steps: T, optimizer steps of the whole run.
        units: what the amounts are of: all units of a policy, those that its action may still add included. If the
            scheduler counts costs (`Scheduler.amount`), what all units cost.
        layers: adapted matrices, for amounts that are given as an average. If it counts costs, what one unit in every
            layer costs.

    Raises:
        LrkitError: warm-up and final phase do not fit into the run.
    """

    scheduler: "Scheduler"
    total_steps: int
    units: int
    layers: int

    def __attrs_post_init__(self) -> None:
        """Refuse a schedule that does not fit."""
        begin, final = self._begin, in_steps(self.scheduler.final, self.total_steps)
        if begin + final > self.total_steps:
            raise LrkitError(
                f"{type(self.scheduler).__name__}: warmup {begin} + final {final} steps are more than total_steps "
                f"{self.total_steps}"
            )

    @functools.cached_property
    def _begin(self) -> int:
        return in_steps(self.scheduler.warmup, self.total_steps)

    @functools.cached_property
    def _end(self) -> int:
        return self.total_steps - in_steps(self.scheduler.final, self.total_steps)

    @functools.cached_property
    def _last(self) -> int:
        """The last decision, by the scheduler's own number."""
        run_end = self.scheduler.first_step - 1 + self.total_steps
        ends = {"fixed": self._end, "peft": self._end, "released": self._end + 1}
        return ends.get(self.scheduler.ending, run_end)

    @property
    def _decides_at_end(self) -> bool:
        return self.scheduler.ending not in ("released", "every-step")

    @functools.cached_property
    def _every(self) -> int:
        return max(1, in_steps(self.scheduler.interval, self.total_steps))

    def number(self, step: int) -> int:
        """Return the scheduler's own number of a step: the same, or one less if it counts from 0."""
        return step - 1 + self.scheduler.first_step

    @property
    def bounds(self) -> tuple[int, int]:
        """(t_i, T - t_f), by the scheduler's own numbers."""
        return self._begin, self._end

    @property
    def at_start(self) -> bool:
        """Whether a decision is taken at step 0."""
        return decides_at_start(self.scheduler)

    @property
    def last(self) -> int:
        """The step after which the last decision is taken; nothing changes sides after it."""
        return self._last + 1 - self.scheduler.first_step

    def due(self, step: int) -> bool:
        """Say whether a decision is taken after a step: every `interval` steps after t_i until the last one.

        At step 0 one is taken if the scheduler says so (`Scheduler.at_start`).
        """
        if step == 0:
            return self.at_start
        number = self.number(step)
        if number == self._last or (number == self._end and self._decides_at_end):
            return True
        if self.scheduler.ending == "every-step" and self._end < number <= self._last:
            return True
        return self._begin < number <= self._last and number % self._every == 0

    def decisions(self) -> Sequence[range]:
        """Return the steps of the run after which `due` is true, in order.

        They come as ranges, so that a long run is counted without walking through it. For example a decision after every
        tenth step of 100 is ``[range(10, 101, 10)]``.
        """
        begin, end, final, every = self._begin, self._end, self._last, self._every
        first = self.scheduler.first_step
        alone = sorted({final} | ({end} if self._decides_at_end else set()))
        found, at = [], begin // every * every + every
        if self.scheduler.ending == "every-step":
            found, at, alone = [range(at, min(end + 1, final), every), range(end + 1, final)], final + 1, [final]
        for stop in alone:
            found += [range(at, stop, every), range(stop, stop + 1)]
            at = max(at, stop // every * every + every)
        last, back = first + self.total_steps - 1, 1 - first
        cut = (range(max(r.start, first + (r.start - first) % r.step), min(r.stop, last + 1), r.step) for r in found)
        begun = [range(1)] if self.at_start else []
        return begun + [range(each.start + back, each.stop + back, each.step) for each in cut if each]

    def observes(self, step: int) -> bool:
        """Say whether scores are measured at a step."""
        number, ending = self.number(step), self.scheduler.ending
        if ending in ("open", "every-step"):
            return True
        return number < self._end or (number == self._end and ending == "fixed")

    def budget(self, step: int) -> int:
        """Return how many units may be kept after a step, or what they may cost, from 0 to `units`. Step 0 is the start."""
        share, ends = self._between(step), []
        for amount in (self.scheduler.target, self.scheduler.start):
            ends.append(min(in_units(amount, total=self.units, layers=self.layers), self.units))
        low, high = ends
        if share in (0.0, 1.0):
            return low if share == 0.0 else high
        budget = self._amount(share)
        whole = math.ceil(budget) if self.scheduler.rounding == "up" else int(budget)
        # An end that is a share has been rounded to whole units, which a budget beside it must not pass.
        return min(max(whole, min(ends)), max(ends)) if 0.0 < share < 1.0 else whole

    def share(self, step: int) -> float:
        """Return the budget as a share of all units in [0, 1], before anything is made a whole number."""
        share, target, start = self._between(step), self.scheduler.target, self.scheduler.start
        if isinstance(target, float) and isinstance(start, float):
            return target + (start - target) * share
        return self._amount(share) / self.units

    def _amount(self, share: float) -> float:
        """Return the budget, before it is made a whole number, so far between b_T (0) and b_0 (1)."""

        def units(amount: Amount) -> float:
            return min(amount * self.layers, self.units) if isinstance(amount, int) else amount * self.units

        low = units(self.scheduler.target)
        return low + (units(self.scheduler.start) - low) * share

    def _between(self, step: int) -> float:
        """Return where the budget is between b_T (0) and b_0 (1)."""
        number, begin, end = self.number(step), self._begin, self._end
        if number >= end:
            return 0.0
        return 1.0 if number <= begin else self.scheduler.decay((number - begin) / (end - begin))


def decides_at_start(scheduler: "Scheduler") -> bool:
    """Say whether a scheduler takes a decision at step 0, whatever the length of the run."""
    return scheduler.at_start or scheduler.calibration > 0


def over(scheduler: "Scheduler", total_steps: int, *, units: int, layers: int) -> Timetable:
    """Bind a scheduler to a run. Arguments and errors as in `Timetable`.

    For example ``Cubic(target=1).over(100, units=36, layers=3).budget(100)`` is 3.
    """
    return Timetable(scheduler, total_steps, units, layers)


def budget(scheduler: "Scheduler", step: int, *, total_steps: int, units: int, layers: int) -> int:
    """Look up one budget, by the scheduler's own number of the step. Arguments and errors as in `Timetable`."""
    return over(scheduler, total_steps, units=units, layers=layers).budget(step + 1 - scheduler.first_step)
