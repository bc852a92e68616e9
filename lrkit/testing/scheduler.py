"""Ask what every scheduler must keep: a budget that falls from start to target, at times that follow from the step."""

import json
from collections.abc import Iterator
from typing import Any

import attrs

from lrkit import parameterizations
from lrkit.compose import from_plain, to_plain
from lrkit.errors import LrkitError
from lrkit.method import Method
from lrkit.schedulers import Scheduler, Timetable
from lrkit.settings import in_units
from lrkit.testing.base import PartContract, clause
from lrkit.testing.findings import calling, expect
from lrkit.testing.neighbours import method_with
from lrkit.testing.runs import decides, resumes

_SIZES = ((1, 1), (6, 6), (72, 6), (100_000, 72))  # units, layers
_TOTALS = (1, 2, 7, 20, 100, 1000)


class SchedulerContract(PartContract):
    """The contract of a `lrkit.Scheduler`."""

    def _exercise(self, component: Any) -> None:
        for total in self._totals(component):
            times = component.over(total, units=72, layers=6)
            for step in range(total + 2):
                times.budget(step)
                times.share(step)
                times.due(step)
                times.observes(step)
            times.decisions()

    def _host(self, component: Any) -> Method:
        amounts = [a for a in (component.start, component.target) if isinstance(a, int)]
        return method_with(component, parameterization=parameterizations.SVD(rank=max([4, *amounts])))

    def _totals(self, component: Scheduler) -> list[int]:
        """List lengths of runs that its warm-up and final phase fit into."""
        fitting = []
        for total in _TOTALS:
            try:
                component.over(total, units=1, layers=1)
            except LrkitError:
                continue
            fitting.append(total)
        expect(fitting, f"no run of up to {_TOTALS[-1]} steps is long enough for it: give the contract shorter phases")
        return fitting

    def _variants(self, component: Scheduler) -> Iterator[Scheduler]:
        """Yield it, and it with other phases if it takes them. For example, one without a warm-up."""
        yield component
        for changes in (
            {"warmup": 0, "final": 0},
            {"warmup": 0.5, "final": 0.5},
            {"warmup": 0.1, "final": 0.3, "interval": 3},
            {"warmup": 1, "final": 0.3, "first_step": 0},
            {"warmup": 0, "final": 0.2, "ending": "open"},
            {"warmup": 0.1, "final": 0.2, "interval": 3, "ending": "every-step"},
            {"warmup": 0.1, "final": 0.2, "rounding": "up"},
            {"start": 0.9, "target": 0.0, "warmup": 0.2},
            {"start": 1.0, "target": 1.0},
        ):
            try:
                yield attrs.evolve(component, **changes)
            except LrkitError:
                continue

    def _cases(self, component: Scheduler) -> Iterator[tuple[Timetable, int, int, str]]:
        """Yield a timetable, b_0, b_T, and a name for messages."""
        for scheduler in self._variants(component):
            name = "" if scheduler == component else f"{scheduler!r}, "
            for total in self._totals(scheduler):
                for units, layers in _SIZES if total <= 100 else _SIZES[2:3]:
                    high = min(in_units(scheduler.start, total=units, layers=layers), units)
                    low = min(in_units(scheduler.target, total=units, layers=layers), units)
                    if low <= high:
                        times = scheduler.over(total, units=units, layers=layers)
                        yield times, high, low, f"{name}{total} steps, {units} units"

    @clause
    def test_amounts_read_back(self, component: Any) -> None:
        """A number of units or steps is one after a save as well, and a share a share: an int must not become a float."""
        for name in ("start", "target", "warmup", "final", "interval"):
            for value in (getattr(component, name), 1):
                try:
                    method = self._host(attrs.evolve(component, **{name: value}))
                except LrkitError:
                    continue
                back = getattr(from_plain(json.loads(json.dumps(to_plain(method)))).scheduler, name)
                expect(
                    type(back) is type(value),
                    f"{name}={value!r} is read back as {back!r}, which means another budget: annotate it as "
                    "lrkit.settings.Amount or Time, or refuse an int",
                )

    @clause
    def test_budget_never_grows(self, component: Any) -> None:
        """The budget is an int from 0 to all units, and at each step at most what it was before."""
        for times, _, _, name in self._cases(component):
            before = times.units
            for step in range(times.total_steps + 3):
                with calling(f"{name}: budget({step})"):
                    budget = times.budget(step)
                expect(
                    isinstance(budget, int) and not isinstance(budget, bool),
                    f"{name}: budget({step}) must be an int, not {budget!r}",
                )
                expect(0 <= budget <= times.units, f"{name}: budget({step}) = {budget} is not a number of units")
                expect(budget <= before, f"{name}: the budget grows from {before} to {budget} at step {step}")
                before = budget

    @clause
    def test_budget_goes_from_start_to_target(self, component: Any) -> None:
        """The budget is `start` until t_i, exactly `target` from T - t_f on, and between the two in between."""
        for times, high, low, name in self._cases(component):
            begin, end = times.bounds
            for step in range(times.total_steps + 3):
                budget, number = times.budget(step), times.number(step)
                if number >= end:
                    expect(budget == low, f"{name}: after T - t_f, at step {step}, it is {budget}; target is {low}")
                elif number <= begin:
                    expect(budget == high, f"{name}: in the warm-up, at step {step}, it is {budget}; start is {high}")
                expect(low <= budget <= high, f"{name}: at step {step} it is {budget}, not within {low} to {high}")

    @clause
    def test_share_is_the_budget_before_it_was_cut(self, component: Any) -> None:
        """`share` is the budget over all units, in [0, 1], before it was cut to an integer."""
        for times, _, _, name in self._cases(component):
            for step in range(times.total_steps + 3):
                with calling(f"{name}: share({step})"):
                    share = times.share(step)
                budget = times.budget(step)
                expect(-1e-9 <= share <= 1 + 1e-9, f"{name}: share({step}) = {share!r} is not in [0, 1]")
                expect(
                    abs(share * times.units - budget) <= 1 + 1e-6,
                    f"{name}: share({step}) = {share} of {times.units} units is not the budget {budget}",
                )

    @clause
    def test_last_decision_is_due(self, component: Any) -> None:
        """A decision is due at step `last`, with the target as its budget; scores are observed at some step up to it."""
        for times, _, low, name in self._cases(component):
            total, ending, first = times.total_steps, times.scheduler.ending, times.scheduler.first_step
            if total < 7:
                continue
            with calling(f"{name}: last, due, observes or decisions"):
                last = times.last
                due = [step for step in range(last + 1) if times.due(step)]
                seen = [step for step in range(last + 1) if times.observes(step)]
                told = [step for span in times.decisions() for step in span]
            within = [step for step in due if step <= total]
            expect(told == within, f"{name}: decisions() says {told[:9]}..., and due() is True at {within[:9]}...")
            expect(last in due, f"{name}: last is step {last}, and due({last}) is False: it is never taken")
            # Numbered from 0, the last step of an open run is T - 1, when a budget may still be falling.
            early = ending in ("open", "every-step") and first == 0
            at_target = early or times.budget(last) == low
            expect(at_target, f"{name}: the last decision, at step {last}, is not at target")
            expect(seen, f"{name}: no step is observed before the last decision: all scores would be zero")

    @clause
    def test_times_are_steps_or_shares(self, component: Any) -> None:
        """A time as an int is steps, as a float a share of T; an amount as an int is per layer, as a float a share."""
        for steps, shares in (
            ({"warmup": 5, "final": 5}, {"warmup": 0.25, "final": 0.25}),
            ({"warmup": 4, "final": 4, "interval": 2}, {"warmup": 0.2, "final": 0.2, "interval": 0.1}),
            ({"warmup": 0, "final": 0, "target": 6}, {"warmup": 0.0, "final": 0.0, "target": 0.5}),
        ):
            try:
                one = attrs.evolve(component, start=1.0, **steps)
                two = attrs.evolve(component, start=1.0, **shares)
            except LrkitError:
                continue
            bound = [each.over(20, units=72, layers=6) for each in (one, two)]
            for step in range(22):
                for name in ("budget", "due"):
                    a, b = (getattr(times, name)(step) for times in bound)
                    expect(
                        a == b,
                        f"{name}({step}) of 20 steps is {a} with {steps} and {b} with {shares}, which are the same",
                    )

    @clause
    def test_is_a_function_of_the_step(self, component: Any) -> None:
        """It gives the same answers in whatever order it is asked, so it remembers nothing."""
        for times, _, _, name in self._cases(component):

            def answers(step: int, times: Any = times) -> tuple[Any, ...]:
                return times.budget(step), times.share(step), times.due(step), times.observes(step), times.last

            total = times.total_steps
            forth = [answers(step) for step in range(total + 3)]
            times.budget(total // 2)  # one more, for a schedule that alternates
            back = [answers(step) for step in reversed(range(total + 3))]
            expect(
                forth == back[::-1],
                f"{name}: asked a second time, from the last step to the first, it says something else",
            )

    @clause
    def test_trains_and_resumes_exactly(self, component: Any) -> None:
        """In a run each decision takes its budget, the last one the target; a resumed run is bitwise the run."""
        total = next((t for t in (10, 16, 24, 40, 100, 200) if t in self._fits(component)), None)
        if total is None:
            component, total = attrs.evolve(component, warmup=0.2, final=0.2), 10
        run = resumes(self._host(component), total, (1, total // 2, total - 1))
        decides(run)
        decisions = run.adapted.history
        expect(decisions, "no decision was taken")
        expect(run.adapted.controller.policies[0].ended, "the last decision was not taken")

    def _fits(self, component: Scheduler) -> list[int]:
        fitting = []
        for total in (10, 16, 24, 40, 100, 200):
            try:
                component.over(total, units=1, layers=1)
            except LrkitError:
                continue
            fitting.append(total)
        return fitting
