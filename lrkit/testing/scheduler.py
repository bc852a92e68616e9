"""The contract of a scheduler."""

from collections.abc import Iterator
from typing import Any

import attrs

from lrkit import parameterizations
from lrkit.errors import LrkitError
from lrkit.method import Method
from lrkit.schedulers import Scheduler
from lrkit.settings import in_units
from lrkit.testing.base import PartContract, calling, clause, decides, expect, method_with, resumes

_SIZES = ((1, 1), (6, 6), (72, 6), (100_000, 72))  # units, layers
_TOTALS = (1, 2, 7, 20, 100, 1000)


class SchedulerContract(PartContract):
    """The contract of a `lrkit.Scheduler`."""

    def _exercise(self, component: Any) -> None:
        for total in self._totals(component):
            for step in range(-1, total + 2):
                component.budget(step, total_steps=total, units=72, layers=6)
                component.due(step, total_steps=total)
                component.observes(step, total_steps=total)
                component.end(total)

    def _host(self, component: Any) -> Method:
        amounts = [a for a in (component.start, component.target) if isinstance(a, int)]
        return method_with(component, parameterization=parameterizations.SVD(rank=max([4, *amounts])))

    def _totals(self, component: Scheduler) -> list[int]:
        """Lengths of runs that its warm-up and final phase fit into."""
        fitting = []
        for total in _TOTALS:
            try:
                component.bounds(total)
            except LrkitError:
                continue
            fitting.append(total)
        expect(fitting, f"no run of up to {_TOTALS[-1]} steps is long enough for it: give the contract shorter phases")
        return fitting

    def _variants(self, component: Scheduler) -> Iterator[Scheduler]:
        """Itself, and itself with other phases, as far as it takes them."""
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

    def _cases(self, component: Scheduler) -> Iterator[tuple[Scheduler, int, dict[str, int], int, int, str]]:
        """Scheduler, steps, the arguments of `budget`, b_0, b_T, and a name for what is told."""
        for scheduler in self._variants(component):
            name = "" if scheduler == component else f"{scheduler!r}, "
            for total in self._totals(scheduler):
                for units, layers in _SIZES if total <= 100 else _SIZES[2:3]:
                    high = min(in_units(scheduler.start, total=units, layers=layers), units)
                    low = min(in_units(scheduler.target, total=units, layers=layers), units)
                    if low <= high:
                        amounts = {"total_steps": total, "units": units, "layers": layers}
                        yield scheduler, total, amounts, high, low, f"{name}{total} steps, {units} units"

    @clause
    def test_budget_never_grows(self, component: Any) -> None:
        """The budget is an int from 0 to all units, and at each step at most what it was before."""
        for scheduler, total, amounts, _, _, name in self._cases(component):
            before = amounts["units"]
            for step in range(-1, total + 3):
                with calling(f"{name}: budget({step})"):
                    budget = scheduler.budget(step, **amounts)
                expect(
                    isinstance(budget, int) and not isinstance(budget, bool),
                    f"{name}: budget({step}) must be an int, not {budget!r}",
                )
                expect(0 <= budget <= amounts["units"], f"{name}: budget({step}) = {budget} is no number of units")
                expect(budget <= before, f"{name}: the budget grows from {before} to {budget} at step {step}")
                before = budget

    @clause
    def test_budget_goes_from_start_to_target(self, component: Any) -> None:
        """All of `start` until t_i; `target`, exactly, from T - t_f on; between the two in between."""
        for scheduler, total, amounts, high, low, name in self._cases(component):
            begin, end = scheduler.bounds(total)
            for step in range(-1, total + 3):
                budget = scheduler.budget(step, **amounts)
                if step >= end:
                    expect(budget == low, f"{name}: after T - t_f, at step {step}, it is {budget}; target is {low}")
                elif step <= begin:
                    expect(budget == high, f"{name}: in the warm-up, at step {step}, it is {budget}; start is {high}")
                expect(low <= budget <= high, f"{name}: at step {step} it is {budget}, not within {low} to {high}")

    @clause
    def test_share_is_the_budget_before_it_was_cut(self, component: Any) -> None:
        """`share` is the budget over all units, in [0, 1], before it was cut to an integer."""
        for scheduler, total, amounts, _, _, name in self._cases(component):
            for step in range(-1, total + 3):
                with calling(f"{name}: share({step})"):
                    share = scheduler.share(step, **amounts)
                budget = scheduler.budget(step, **amounts)
                expect(-1e-9 <= share <= 1 + 1e-9, f"{name}: share({step}) = {share!r} is not in [0, 1]")
                expect(
                    abs(share * amounts["units"] - budget) <= 1 + 1e-6,
                    f"{name}: share({step}) = {share} of {amounts['units']} units is not the budget {budget}",
                )

    @clause
    def test_last_decision_is_due(self, component: Any) -> None:
        """A decision is due at `end`, where the budget is the target; scores are observed at some step up to there."""
        for scheduler, total, amounts, _, low, name in self._cases(component):
            if total < 7:
                continue
            with calling(f"{name}: end, due, observes or decisions"):
                end = scheduler.end(total)
                due = [step for step in range(-1, end + 1) if scheduler.due(step, total_steps=total)]
                seen = [step for step in range(-1, end + 1) if scheduler.observes(step, total_steps=total)]
                told = [step for span in scheduler.decisions(total) for step in span]
            first = scheduler.first_step
            within = [step for step in due if first <= step < first + total]
            expect(told == within, f"{name}: decisions() says {told[:9]}..., and due() is True at {within[:9]}...")
            expect(
                end in due, f"{name}: end() is step {end}, and due({end}) is False: the last decision is never taken"
            )
            # Numbered from 0, the last step of an open run is T - 1, where a budget may still be falling.
            early = scheduler.ending in ("open", "every-step") and scheduler.first_step == 0
            at_target = early or scheduler.budget(end, **amounts) == low
            expect(at_target, f"{name}: the last decision, at step {end}, is not at target")
            expect(seen, f"{name}: no step is observed before the last decision: all scores would be zero")

    @clause
    def test_times_are_steps_or_shares(self, component: Any) -> None:
        """A time as an int is steps, as a float a share of T; an amount as an int is for each layer, as a float a share."""
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
            for step in range(22):
                for name in ("budget", "due"):
                    amounts = {"units": 72, "layers": 6} if name == "budget" else {}
                    a, b = (getattr(s, name)(step, total_steps=20, **amounts) for s in (one, two))
                    expect(
                        a == b,
                        f"{name}({step}) of 20 steps is {a} with {steps} and {b} with {shares}, which are the same",
                    )

    @clause
    def test_is_a_function_of_the_step(self, component: Any) -> None:
        """The same answers in whatever order it is asked: it remembers nothing."""
        for scheduler, total, amounts, _, _, name in self._cases(component):

            def answers(step: int, scheduler: Any = scheduler, amounts: Any = amounts) -> tuple[Any, ...]:
                total = amounts["total_steps"]
                return (
                    scheduler.budget(step, **amounts),
                    scheduler.share(step, **amounts),
                    scheduler.due(step, total_steps=total),
                    scheduler.observes(step, total_steps=total),
                    scheduler.end(total),
                )

            forth = [answers(step) for step in range(-1, total + 3)]
            scheduler.budget(total // 2, **amounts)  # one more, for what alternates
            back = [answers(step) for step in reversed(range(-1, total + 3))]
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
                component.bounds(total)
            except LrkitError:
                continue
            fitting.append(total)
        return fitting
