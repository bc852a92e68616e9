"""Schedules: monotone, exact at both ends, and integer for integer the papers' formulas."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import attrs
import oracles
import pytest
import schedules
from hypothesis import given, settings
from hypothesis import strategies as st

import lrkit
from lrkit.errors import LrkitError
from lrkit.schedulers import Constant, Cubic, Linear, Once, Quadratic, Scheduler

QUICK = settings(max_examples=150)
POWER = {Constant: None, Linear: 1, Cubic: 3}
BUILT_IN = list(POWER)


def registered() -> list[type[Scheduler]]:
    from lrkit.registry import Registry

    return [offer.value for offer in Registry(discover=False).offers("scheduler")]  # plug-ins test their own


def phased() -> list[type[Scheduler]]:
    """Return those whose phases can be set."""
    return [kind for kind in registered() if kind is not Once]


@st.composite
def timings(draw: st.DrawFn, most: int = 1_000_000) -> dict[str, int]:
    """total, warmup and final with warmup < total - final, and any interval."""
    total = draw(st.integers(1, most))
    end = draw(st.integers(1, total))
    return {
        "total": total,
        "warmup": draw(st.integers(0, end - 1)),
        "final": total - end,
        "interval": draw(st.integers(1, max(1, total // 2))),
    }


def make(kind: type[Scheduler], timing: dict[str, int], **more: Any) -> Scheduler:
    return kind(warmup=timing["warmup"], final=timing["final"], interval=timing["interval"], **more)


def steps_of(timing: dict[str, int], draw: st.DataObject) -> list[int]:
    """The corners of a schedule and some steps between, in order."""
    total, warmup, end = timing["total"], timing["warmup"], timing["total"] - timing["final"]
    corners = {1, warmup - 1, warmup, warmup + 1, (warmup + end) // 2, end - 1, end, end + 1, total}
    more = draw.draw(st.lists(st.integers(1, total), max_size=20))
    return sorted(t for t in corners | set(more) if 1 <= t <= total)


@given(timings(), st.integers(1, 24), st.integers(1, 100), st.data())
@QUICK
def test_cubic_budget_is_the_papers_integer(
    timing: dict[str, int], rank: int, layers: int, data: st.DataObject
) -> None:
    target = data.draw(st.integers(0, rank))
    scheduler = make(Cubic, timing, target=target)
    units = rank * layers
    when = {key: timing[key] for key in ("total", "warmup", "final")}
    for t in steps_of(timing, data):
        got = scheduler.budget(t, total_steps=timing["total"], units=units, layers=layers)
        assert type(got) is int
        assert got == oracles.budget(t, **when, b0=units, bT=target * layers), t
        exact = oracles.budget_exact(t, **when, b0=units, bT=target * layers)
        assert got == int(exact) or (abs(exact - round(exact)) < 1e-6 and got == round(exact) - 1), t


def test_cubic_budget_over_every_step_of_small_schedules() -> None:
    for total in (1, 2, 5, 12):
        for end in range(1, total + 1):
            for warmup in range(end):
                scheduler = Cubic(target=2, warmup=warmup, final=total - end)
                for t in range(1, total + 1):
                    got = scheduler.budget(t, total_steps=total, units=36, layers=3)
                    want = oracles.budget(t, total=total, warmup=warmup, final=total - end, b0=36, bT=6)
                    assert got == want, (total, warmup, end, t)


def test_published_settings_to_the_step() -> None:
    """AdaLoRA on RTE (ΔT = 1) and MNLI in DeBERTaV3-base: 72 matrices, rank 12 to 8."""
    for total, warmup, final in ((3900, 600, 1800), (85_900, 8000, 50_000)):
        scheduler = Cubic(target=8, warmup=warmup, final=final)
        when = {"total": total, "warmup": warmup, "final": final}
        got = [scheduler.budget(t, total_steps=total, units=864, layers=72) for t in range(1, total + 1)]
        assert got == [oracles.budget(t, **when, b0=864, bT=576) for t in range(1, total + 1)]
        assert got[0] == got[warmup - 1] == 864
        assert got[total - final - 1] == got[-1] == 576


@given(timings(), st.integers(1, 2000), st.data())
@QUICK
def test_cubic_is_aflora_s_fraction_in_its_other_use(
    timing: dict[str, int], matrices: int, data: st.DataObject
) -> None:
    scheduler = make(Cubic, timing, target=0.0, start=1.0)
    when = {key: timing[key] for key in ("total", "warmup", "final")}
    for t in steps_of(timing, data):
        kept = scheduler.budget(t, total_steps=timing["total"], units=matrices, layers=matrices // 2)
        share = 1 - oracles.freezing_fraction(t, **when)
        assert kept == int(share * matrices) or abs(kept - share * matrices) < 1e-6, t
    assert scheduler.budget(timing["total"], total_steps=timing["total"], units=matrices, layers=1) == 0


@given(st.sampled_from([Linear, Cubic]), timings(), st.integers(1, 3000), st.data())
@QUICK
def test_exact_between_the_ends_in_rational_arithmetic(
    kind: type[Scheduler], timing: dict[str, int], units: int, data: st.DataObject
) -> None:
    power = POWER[kind]
    assert power is not None
    scheduler = make(kind, timing, target=0.0)
    when = {key: timing[key] for key in ("total", "warmup", "final")}
    for t in steps_of(timing, data):
        exact = oracles.budget_exact(t, **when, b0=units, bT=0, power=power)
        got = scheduler.budget(t, total_steps=timing["total"], units=units, layers=1)
        assert got == int(exact) or (abs(exact - round(exact)) < 1e-6 and got == round(exact) - 1), t


@given(timings(), st.integers(1, 3000), st.data())
@QUICK
def test_quadratic_is_aflora_s_code(timing: dict[str, int], units: int, data: st.DataObject) -> None:
    """Between the ends 1 - u² of the units are kept, as AFLoRA's code for GSM8K has it."""
    scheduler = make(Quadratic, timing, target=0.0)
    total, warmup, end = timing["total"], timing["warmup"], timing["total"] - timing["final"]
    for t in steps_of(timing, data):
        u = Fraction(min(max(t - warmup, 0), end - warmup), end - warmup)
        exact = units * (1 - u**2)
        got = scheduler.budget(t, total_steps=total, units=units, layers=1)
        assert got == int(exact) or (abs(exact - round(exact)) < 1e-6 and got == round(exact) - 1), t


@pytest.mark.parametrize("kind", phased(), ids=lambda kind: kind.__name__)
@given(timings(), st.integers(1, 24), st.integers(1, 100), st.data())
@settings(max_examples=60)
def test_every_schedule_falls_from_start_to_target(
    kind: type[Scheduler], timing: dict[str, int], rank: int, layers: int, data: st.DataObject
) -> None:
    target = data.draw(st.integers(0, rank))
    scheduler = make(kind, timing, target=target)
    total, units = timing["total"], rank * layers
    steps = steps_of(timing, data)
    budgets = [scheduler.budget(t, total_steps=total, units=units, layers=layers) for t in steps]
    assert all(type(b) is int for b in budgets)
    assert all(a >= b for a, b in itertools.pairwise(budgets)), list(zip(steps, budgets, strict=True))
    assert all(target * layers <= b <= units for b in budgets)
    end = total - timing["final"]
    assert schedules.end(scheduler, total) == end
    for t, b in zip(steps, budgets, strict=True):
        if t >= end:
            assert b == target * layers
        elif t <= timing["warmup"] and kind is not Constant:
            assert b == units


@pytest.mark.parametrize("kind", phased(), ids=lambda kind: kind.__name__)
@given(timings(most=400), st.integers(1, 200))
@settings(max_examples=60)
def test_monotone_over_every_step(kind: type[Scheduler], timing: dict[str, int], units: int) -> None:
    scheduler = make(kind, timing, target=0.25)
    budgets = [
        scheduler.budget(t, total_steps=timing["total"], units=units, layers=1) for t in range(1, timing["total"] + 1)
    ]
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize("kind", registered(), ids=lambda kind: kind.__name__)
def test_decay_runs_from_one_to_zero(kind: type[Scheduler]) -> None:
    scheduler = kind(target=1)
    if kind is not Constant:
        assert scheduler.decay(0.0) == 1
    assert scheduler.decay(1.0) == 0


@given(timings(), st.data())
@QUICK
def test_due_after_the_warmup_on_the_interval_and_at_the_end(timing: dict[str, int], data: st.DataObject) -> None:
    scheduler = make(Cubic, timing, target=1)
    total, end = timing["total"], timing["total"] - timing["final"]
    near = [m * timing["interval"] + d for m in range(1, 6) for d in (-1, 0, 1)]
    for t in [*steps_of(timing, data), *(t for t in near if 1 <= t <= total)]:
        assert schedules.due(scheduler, t, total_steps=total) == oracles.is_due(t, **timing), t
    assert schedules.due(scheduler, end, total_steps=total) is True
    assert not schedules.due(scheduler, timing["warmup"], total_steps=total)


@pytest.mark.parametrize("kind", phased(), ids=lambda kind: kind.__name__)
@given(timings(most=300))
@settings(max_examples=40)
def test_decisions_of_every_schedule(kind: type[Scheduler], timing: dict[str, int]) -> None:
    """None up to the warm-up, one at the end, none past it; between, on multiples of the interval."""
    scheduler = make(kind, timing, target=1)
    total, end = timing["total"], timing["total"] - timing["final"]
    due = [t for t in range(1, total + 1) if schedules.due(scheduler, t, total_steps=total)]
    assert due[-1] == end
    assert all(t > timing["warmup"] for t in due)
    assert all(t % timing["interval"] == 0 for t in due[:-1])
    if kind in (Linear, Cubic):
        assert due == [t for t in range(1, total + 1) if oracles.is_due(t, **timing)]


@given(timings(most=5000), st.integers(1, 500), st.data())
@QUICK
def test_times_as_steps_or_as_shares(timing: dict[str, int], units: int, data: st.DataObject) -> None:
    """k / T is k steps, whatever the rounding of k / T."""
    total = timing["total"]
    whole = make(Cubic, timing, target=0.5)
    share = Cubic(
        target=0.5,
        warmup=timing["warmup"] / total,
        final=timing["final"] / total,
        interval=timing["interval"],
    )
    assert schedules.end(share, total) == schedules.end(whole, total)
    for t in steps_of(timing, data):
        assert share.budget(t, total_steps=total, units=units, layers=1) == whole.budget(
            t, total_steps=total, units=units, layers=1
        )
        assert schedules.due(share, t, total_steps=total) == schedules.due(whole, t, total_steps=total)


@given(timings(most=400), st.sampled_from(["fixed", "peft", "released", "open", "every-step"]), st.data())
@QUICK
def test_endings(timing: dict[str, int], ending: Any, data: st.DataObject) -> None:
    scheduler = make(Cubic, timing, target=1, ending=ending)
    total, final = timing["total"], timing["final"]
    for t in steps_of(timing, data):
        assert schedules.due(scheduler, t, total_steps=total) == oracles.is_due(t, **timing, ending=ending), t
        want = oracles.is_measured(t, total=total, final=final, ending=ending)
        assert schedules.observes(scheduler, t, total_steps=total) == want, t


def test_shares_people_write() -> None:
    """0.29 · 100 is 28.999999999999996 and 0.7 · 10 is 7.0: both mean what they say."""
    assert schedules.end(Cubic(target=1, final=0.29), 100) == 71
    assert schedules.end(Cubic(target=1, final=0.7), 10) == 3
    assert schedules.end(Cubic(target=1, warmup=0.05, final=0.7), 2000) == 600
    assert Cubic(target=1, warmup=0.07).budget(7, total_steps=100, units=100, layers=1) == 100
    assert Cubic(target=1, warmup=0.07).budget(8, total_steps=100, units=100, layers=1) == 96


@given(st.integers(1, 3000), st.data())
@QUICK
def test_shares_of_units_keep_what_they_say(units: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, units))
    assert Constant(target=kept / units).budget(5, total_steps=10, units=units, layers=1) == kept
    assert Cubic(target=kept / units).budget(10, total_steps=10, units=units, layers=1) == kept


def test_whole_targets_are_per_adapted_matrix() -> None:
    assert Cubic(target=2).budget(10, total_steps=10, units=48, layers=6) == 12
    assert Cubic(target=1.0).budget(10, total_steps=10, units=48, layers=6) == 48
    assert Cubic(target=1).budget(10, total_steps=10, units=48, layers=6) == 6
    assert Cubic(target=1, start=3, warmup=5).budget(2, total_steps=10, units=48, layers=6) == 18
    assert Linear(target=1, start=0.5, warmup=5).budget(2, total_steps=10, units=48, layers=6) == 24


def test_warmup_and_final_may_meet() -> None:
    """Nothing between them: all up to the end, the target from it on, one decision."""
    scheduler = Cubic(target=1, warmup=6, final=4)
    budgets = [scheduler.budget(t, total_steps=10, units=30, layers=3) for t in range(1, 11)]
    assert budgets == [30] * 5 + [3] * 5
    assert [t for t in range(1, 11) if schedules.due(scheduler, t, total_steps=10)] == [6]


@pytest.mark.parametrize("kind", registered(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "bad",
    [
        {"warmup": -1},
        {"final": -1},
        {"interval": -1},
        {"interval": 0},
        {"warmup": -0.1},
        {"final": -0.1},
        {"warmup": 1.5},
        {"final": 1.01},
        {"interval": 1.5},
        {"target": -1},
        {"target": -0.5},
        {"target": 1.5},
        {"start": 1.5},
        {"start": -1},
        {"warmup": float("nan")},
        {"target": float("nan")},
        {"first_step": 2},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(kind: type[Scheduler], bad: dict[str, Any]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(LrkitError) as caught:
        kind(**{"target": 1, **bad})
    assert name in str(caught.value)
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("times", [(6, 5), (0.6, 0.5), (0.6, 5), (6, 0.5), (11, 0), (0, 11)], ids=str)
def test_warmup_and_final_longer_than_training_are_refused(times: tuple[float, float]) -> None:
    scheduler = Cubic(target=1, warmup=times[0], final=times[1])
    with pytest.raises(LrkitError, match=r"warmup.*final.*10"):
        scheduler.budget(5, total_steps=10, units=8, layers=2)


@given(st.integers(1, 2000), st.data())
@QUICK
def test_refused_exactly_when_they_do_not_fit(total: int, data: st.DataObject) -> None:
    warmup, final = data.draw(st.integers(0, total)), data.draw(st.integers(0, total))
    scheduler = Cubic(target=1, warmup=warmup, final=final)
    if warmup + final > total:
        with pytest.raises(LrkitError):
            scheduler.budget(1, total_steps=total, units=8, layers=2)
    else:
        scheduler.budget(1, total_steps=total, units=8, layers=2)


@pytest.mark.parametrize("amounts", [(0.8, 0.2), (8, 2)], ids=str)
def test_a_target_above_the_start_is_refused(amounts: tuple[float, float]) -> None:
    """A budget only falls, unless the action adds units."""
    with pytest.raises(LrkitError, match=r"Cubic\.target = .* is above start = .*Prune\(.* adds no units"):
        attrs.evolve(lrkit.methods.adalora(), scheduler=Cubic(target=amounts[0], start=amounts[1]))


def test_schedulers_are_frozen_and_keyword_only() -> None:
    for kind in registered():
        with pytest.raises(TypeError):
            kind(1)  # type: ignore[misc]
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            kind(target=1).target = 2  # type: ignore[misc]


@given(st.integers(1, 2000), st.integers(1, 24), st.integers(1, 100), st.data())
@QUICK
def test_once_decides_at_step_zero(total: int, rank: int, layers: int, data: st.DataObject) -> None:
    """Its one decision is before the first step, at the target, whatever the length of the run."""
    target = data.draw(st.integers(0, rank) | st.floats(0, 1))
    times = Once(target=target).over(total, units=rank * layers, layers=layers)
    assert [step for step in range(min(total, 50) + 2) if times.due(step)] == [0]
    assert times.decisions() == [range(1)]
    assert times.last == 0
    whole = target * layers if isinstance(target, int) else round(target * rank * layers)
    assert {times.budget(step) for step in (0, 1, total)} == {whole}
    assert times.observes(0)
    assert not times.observes(1)


@pytest.mark.parametrize(
    "other", [{"warmup": 1}, {"final": 0.5}, {"first_step": 0}, {"ending": "open"}, {"calibration": -1}], ids=str
)
def test_once_has_no_phases(other: dict[str, Any]) -> None:
    """A setting that would mean nothing is refused; a swap for another schedule's does not carry it over."""
    with pytest.raises(LrkitError, match=rf"Once\.{next(iter(other))} must be"):
        Once(target=1, **other)
    plain = lrkit.with_component(lrkit.to_plain(lrkit.methods.adalora(target_rank=2)), "scheduler", "once")
    assert lrkit.from_plain(plain).scheduler == Once(target=2, interval=plain["scheduler"]["interval"])
