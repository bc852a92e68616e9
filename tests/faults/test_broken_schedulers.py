"""Faulty schedulers, each found by the clause that is meant."""

from __future__ import annotations

import math
import random

import attrs
import pytest
from faulty import COMMON, NEVER_DUE, Cosine, Specimens, timed, variant

from lrkit.schedulers import Timetable
from lrkit.settings import real

fault = Specimens("scheduler")


BUDGET = "budget goes from start to target"
FALLS = "budget never grows"
SHARE = "share is the budget before it was cut"
DUE = "last decision is due"
TIMES = "times are steps or shares"
PURE = "is a function of the step"
RUN = "trains and resumes exactly"


@fault(FALLS, BUDGET, SHARE, RUN)
def scheduler_that_grows():
    return variant(Cosine, decay=lambda self, progress: (1 - progress) * (1 + 0.5 * math.sin(20 * progress)))


@fault(FALLS)
def scheduler_that_bounces():
    return variant(Cosine, decay=lambda self, progress: abs(math.cos(4.5 * math.pi * progress)))


@fault(FALLS, BUDGET, SHARE, DUE)
def scheduler_above_all_units():
    return timed(budget=lambda times, step: Timetable.budget(times, step) + 1)


@fault(FALLS, RUN)
def scheduler_with_half_units():
    return timed(budget=lambda times, step: float(Timetable.budget(times, step)))


@fault(BUDGET, SHARE)
def scheduler_that_forgets_the_warm_up():
    def budget(times, step):
        plain = attrs.evolve(times.scheduler, warmup=0)
        return Cosine.over(plain, times.total_steps, units=times.units, layers=times.layers).budget(step)

    return timed(budget=budget)


@fault(BUDGET, SHARE, DUE, TIMES)
def scheduler_that_never_arrives():
    def budget(times, step):
        usual, scheduler = Timetable.budget(times, step), times.scheduler
        early = scheduler.target == 0.5 and scheduler.start == 1.0
        return max(usual, math.ceil(0.7 * times.units)) if early else usual

    return timed(budget=budget)


@fault(FALLS, BUDGET, SHARE, DUE, PURE)
def scheduler_that_cannot_have_phases_of_no_length():
    def budget(times, step):
        begin, end = times.bounds
        progress = min(max((times.number(step) - begin) / (end - begin), 0), 1)
        return int(times.units * (1 - progress / 2))

    return timed(budget=budget)


@fault(SHARE)
def scheduler_whose_share_is_of_something_else():
    return timed(share=lambda times, step: 0.5)


@fault(DUE, RUN)
def scheduler_whose_last_decision_is_never_due():
    return timed(**NEVER_DUE)


@fault(DUE)
def scheduler_that_never_observes():
    return timed(observes=lambda times, step: False)


@fault(TIMES)
def scheduler_that_takes_every_time_for_steps():
    def due(times, step):
        (begin, end), number = times.bounds, times.number(step)
        every = max(1, int(times.scheduler.interval))
        return number == end or (begin < number <= end and number % every == 0)

    def last(times):
        return times.bounds[1] + 1 - times.scheduler.first_step

    def decisions(times):
        return [range(step, step + 1) for step in range(1, times.total_steps + 1) if times.due(step)]

    return timed(due=due, last=property(last), decisions=decisions)


@fault(PURE, FALLS, SHARE, TIMES, RUN)
def scheduler_that_counts_calls():
    calls: list[int] = []

    def decay(self, progress):
        calls.append(1)
        return (1 - progress) ** (1 + len(calls) % 2)

    return variant(Cosine, decay=decay)


@fault("amounts read back")
def scheduler_that_takes_units_for_a_share():
    @attrs.frozen(kw_only=True)
    class Broken(Cosine):
        """Broken on purpose: its settings are target and start, Source: this test."""

        target: float = attrs.field(default=1.0, validator=real(0.0, 1.0))

    return Broken()


@fault("leaves global state alone")
def scheduler_that_draws():
    def due(times, step):
        random.random()
        return Timetable.due(times, step)

    return timed(due=due)


@pytest.mark.parametrize("name", fault.made)
def test_found_by_its_clause(name):
    """Each fault is found by the clauses that are meant, and by no other."""
    fault.check(name)


def test_every_clause_finds():
    """Each clause of a scheduler finds a fault, or is one that every kind has."""
    assert fault.missing() <= COMMON
