"""What is counted before a run, against every choice that the run could make; and what a schedule may say."""

from __future__ import annotations

import itertools
import statistics
import warnings
from fractions import Fraction
from typing import Any, ClassVar

import attrs
import pytest
import rigs
import schedules
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lrkit
from lrkit import accounting
from lrkit.actions import Fate
from lrkit.metrics import GradientUncertainty, SensitivityUncertainty
from lrkit.parameterizations import SVD, LoRA
from lrkit.schedulers import Constant, Cubic, Linear, Scheduler

# Toy's layers as (d_out, d_in): no two of its matrices are of one size.
SHAPES = {"first": (5, 6), "second": (7, 5), "third": (4, 7)}


def count(method: lrkit.Method, total: int) -> accounting.ParameterCount:
    return accounting.count(method, rigs.Toy(), total_steps=total, targets=rigs.TOY_TARGETS, train_also=())


def gone(scheduler: Scheduler, units: int, total: int, layers: int = 3) -> list[int]:
    """Units that have lost by the beginning of each step, where the schedule decides after every step."""
    lost = [0]
    for step in range(1, total + 1):
        lost.append(units - scheduler.budget(step, total_steps=total, units=units, layers=layers))
    return lost[:-1]


def by_choice(sizes: list[int], lost: int) -> tuple[int, int]:
    """The least and the most parameters that so many units can have, over every choice of them."""
    sums = [sum(chosen) for chosen in itertools.combinations(sizes, lost)]
    return min(sums), max(sums)


# ---------------------------------------------------------------- counted before a run


@pytest.mark.parametrize("kind", ["freeze", "prune"])
def test_the_range_is_that_of_every_choice_of_units(kind: str) -> None:
    """The least and the most that can train, by trying each set of units that may lose; on average, and in the end."""
    total, rank = 9, 2
    scheduler = Linear(target=1 / 3, warmup=1, final=2)
    if kind == "freeze":
        method = lrkit.Method(
            parameterization=LoRA(rank=rank),
            metric=GradientUncertainty(),
            scheduler=scheduler,
            action=lrkit.actions.Freeze(),
        )
        sizes = [rank * side for shape in SHAPES.values() for side in shape]
        start = sum(sizes)
    else:
        method = lrkit.Method(
            parameterization=SVD(rank=rank),
            metric=SensitivityUncertainty(),
            scheduler=scheduler,
            action=lrkit.actions.Prune(),
        )
        sizes = [1 + d_out + d_in for d_out, d_in in SHAPES.values() for _ in range(rank)]
        start = sum(sizes)
    lost = gone(scheduler, len(sizes), total)
    assert lost[0] == 0 < lost[-1] < len(sizes)
    ranges = [by_choice(sizes, n) for n in lost]
    counted = count(method, total)
    assert counted.start == start
    assert counted.end_range == (start - ranges[-1][1], start - ranges[-1][0])
    assert counted.end_range[0] < counted.end_range[1]
    assert counted.average_range == pytest.approx(
        (start - statistics.fmean(most for _, most in ranges), start - statistics.fmean(least for least, _ in ranges))
    )
    mean = [sum(sizes) * n / len(sizes) for n in lost]
    assert counted.end == pytest.approx(start - mean[-1])
    assert counted.average == pytest.approx(start - statistics.fmean(mean))


def hybrid(total: int) -> tuple[lrkit.Method, list[float], list[float]]:
    """Matrices freeze and components are pruned; with the share that each policy has taken before each step."""
    freezing, pruning = Linear(target=1 / 3, warmup=1, final=2), Linear(target=0.5, warmup=2, final=3)
    method = lrkit.Method(
        parameterization=SVD(rank=2),
        metric=GradientUncertainty(),
        scheduler=freezing,
        action=lrkit.actions.Freeze(),
        also=(lrkit.Policy(metric=SensitivityUncertainty(), scheduler=pruning, action=lrkit.actions.Prune()),),
    )
    return method, [n / 6 for n in gone(freezing, 6, total)], [n / 6 for n in gone(pruning, 6, total)]


def test_what_two_policies_take_is_taken_once_on_average() -> None:
    """An entry of A or B trains with the product of the shares that both keep; one of λ is pruned alone."""
    total = 10
    method, frozen, pruned = hybrid(total)
    matrices, cores = sum(2 * (a + b) for a, b in SHAPES.values()), 6
    trained = [matrices * (1 - f) * (1 - p) + cores * (1 - p) for f, p in zip(frozen, pruned, strict=True)]
    counted = count(method, total)
    assert 0 < frozen[-1] < 1 and 0 < pruned[-1] < 1
    assert counted.start == matrices + cores
    assert counted.end == pytest.approx(trained[-1])
    assert counted.average == pytest.approx(statistics.fmean(trained))


def test_the_range_of_two_policies_holds_every_choice() -> None:
    """No set of matrices and components that the two may take leaves more, or fewer, than is said; nor fewer than none."""
    total = 10
    method, frozen, pruned = hybrid(total)
    counted = count(method, total)
    cells = []  # (matrix, component) of each entry, and how many there are
    for m, (d_out, d_in) in enumerate(SHAPES.values()):
        for i in range(2):
            cells += [((2 * m, 2 * m + 1)[k], 2 * m + i, side) for k, side in enumerate((d_out, d_in))]
            cells.append((None, 2 * m + i, 1))
    left = []
    for matrices in itertools.combinations(range(6), round(frozen[-1] * 6)):
        for components in itertools.combinations(range(6), round(pruned[-1] * 6)):
            left.append(sum(n for a, c, n in cells if a not in matrices and c not in components))
    assert 0 <= counted.end_range[0] <= min(left) < max(left) <= counted.end_range[1] <= counted.start
    # The most is reached where one policy's losers lie within the other's: the larger of the two least losses.
    least_frozen = by_choice([2 * s for shape in SHAPES.values() for s in shape], round(frozen[-1] * 6))[0]
    least_pruned = by_choice([1 + a + b for a, b in SHAPES.values() for _ in range(2)], round(pruned[-1] * 6))[0]
    assert counted.end_range[1] == counted.start - max(least_frozen, least_pruned)


def test_two_policies_that_take_everything_leave_none() -> None:
    """Both may take nearly all, and what both take is not taken twice: no count falls below zero."""
    method = lrkit.Method(
        parameterization=SVD(rank=2),
        metric=GradientUncertainty(),
        scheduler=Constant(target=1 / 6),
        action=lrkit.actions.Freeze(),
        also=(
            lrkit.Policy(
                metric=SensitivityUncertainty(), scheduler=Constant(target=1 / 6), action=lrkit.actions.Prune()
            ),
        ),
    )
    counted = count(method, 6)
    assert counted.end_range[0] == 0 <= counted.average_range[0] <= counted.average <= counted.average_range[1]


@attrs.frozen(kw_only=True)
class Unforeseen(lrkit.actions.Prune):
    """How many components it keeps is known only after a run."""

    def turnover(self, units: int, budget: int, layers: int) -> None:
        return


def test_where_no_number_is_known_all_may_go_once_a_schedule_has_begun() -> None:
    """Until the first decision everything trains; after it anything from nothing to everything may have gone."""
    method = lrkit.Method(
        parameterization=SVD(rank=2),
        metric=SensitivityUncertainty(),
        scheduler=Constant(target=0.5, warmup=3),
        action=Unforeseen(),
    )
    counted = count(method, 8)
    start = sum(2 * (1 + d_out + d_in) for d_out, d_in in SHAPES.values())
    assert counted.start == counted.end == counted.average == start
    assert counted.end_range == (0, start)
    assert counted.average_range == pytest.approx((start * 4 / 8, start))  # decided after step 4: half of the steps


# ---------------------------------------------------------------- counted in a run


class Tied(nn.Module):
    """Two layers of one weight, with a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))  # type: ignore[no-any-return]


def test_a_weight_of_two_layers_is_counted_once() -> None:
    """The layers' counts add up to the parameters that there are."""
    model = Tied()
    summary = lrkit.attach(model, lrkit.methods.full(), targets=["one", "two"], train_also=()).summary()
    assert summary.start == summary.now == sum(p.numel() for p in model.parameters()) == 16 + 4 + 4
    assert [layer.now for layer in summary.layers] == [20, 4]


@pytest.mark.parametrize("kind", ["prune", "freeze", "both", "two masks"])
def test_the_average_is_the_mean_of_what_each_step_trained(kind: str) -> None:
    """Counted by hand before each step of a run: entries that have a gradient and lie under no mask."""
    total = 12
    both, _, _ = hybrid(total)
    freeze, pruning = both.policies
    alone = {"freeze": freeze, "prune": pruning}
    method = both
    if kind in alone:
        p = alone[kind]
        method = attrs.evolve(both, metric=p.metric, scheduler=p.scheduler, action=p.action, also=())
    if kind == "two masks":
        last = attrs.evolve(pruning, metric=GradientUncertainty(), scheduler=Linear(target=2 / 3, warmup=1, final=1))
        method = attrs.evolve(method, metric=pruning.metric, scheduler=pruning.scheduler, action=pruning.action)
        method = attrs.evolve(method, also=(last,))
    model, adapted = rigs.toy(method)
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=total)
    masks: dict[int, set[str]] = {0: set(), 1: set()}
    trained = []
    for step in range(total):
        now, masked = 0, masks[0] | masks[1]
        for name, m in adapted.adapters.items():
            live = sum(f"{name}[{i}]" not in masked for i in range(2))
            now += sum(live * p.numel() // 2 for p in (m.A, m.B, m.core) if p.requires_grad)
        assert adapted.summary().now == now
        trained.append(now)
        (rigs.loss_of(model, step) + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for decision in adapted.history:
            if decision.step == adapted.step:
                masks[decision.policy] |= {n for n in decision.lost if "[" in n}
                masks[decision.policy] -= set(decision.returned)
        assert adapted.summary().average == pytest.approx(statistics.fmean(trained))
        gone = {f"{layer.name}.{matrix}" for layer in adapted.summary().layers for matrix in layer.frozen}
        assert gone == {name for d in adapted.history for name in d.lost if "[" not in name}
    assert trained[-1] < trained[0]
    if kind == "two masks":
        assert masks[0] != masks[1]


# ---------------------------------------------------------------- schedules


@given(
    kind=st.sampled_from([Constant, Linear, Cubic]),
    start=st.integers(0, 30) | st.floats(0, 1),
    target=st.integers(0, 30) | st.floats(0, 1),
    units=st.integers(1, 40),
    layers=st.integers(1, 10),
    total=st.integers(1, 20),
    data=st.data(),
)
@settings(max_examples=200)
def test_no_budget_is_below_nothing_or_above_all_units(
    kind: Any, start: Any, target: Any, units: int, layers: int, total: int, data: Any
) -> None:
    """Not even where an average for each layer is asked for that there are not units enough for."""
    warmup = data.draw(st.integers(0, total))
    scheduler = kind(start=start, target=target, warmup=warmup, final=data.draw(st.integers(0, total - warmup)))
    for step in range(total + 2):
        budget = scheduler.budget(step, total_steps=total, units=units, layers=layers)
        share = schedules.share(scheduler, step, total_steps=total, units=units, layers=layers)
        assert 0 <= budget <= units
        assert 0 <= share <= 1
        assert abs(budget - share * units) < 1.5  # cut to an integer, or an end that was rounded


def test_layers_with_too_few_units_give_all_that_they_have() -> None:
    """A target of 8 for each of 3 layers, of which there are 12 units: 12 are kept, at the start and to the end."""
    scheduler = Linear(start=8, target=8, warmup=1)
    assert [scheduler.budget(t, total_steps=6, units=12, layers=3) for t in range(8)] == [12] * 8
    assert [schedules.share(scheduler, t, total_steps=6, units=12, layers=3) for t in range(8)] == [1.0] * 8


@given(
    kind=st.sampled_from([Constant, Linear, Cubic]),
    ends=st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted),
    units=st.integers(1, 40),
    layers=st.integers(1, 4),
    total=st.integers(1, 12),
    data=st.data(),
)
@settings(max_examples=200)
def test_a_share_is_the_exact_budget_over_all_units(
    kind: Any, ends: list[int], units: int, layers: int, total: int, data: Any
) -> None:
    """In rational arithmetic, for whole amounts: (b_T + (b_0 - b_T) (1 - u)^p) / n; and the budget is its integer part."""
    warmup = data.draw(st.integers(0, total - 1))
    final = data.draw(st.integers(0, total - warmup - 1))
    scheduler = kind(start=ends[1], target=ends[0], warmup=warmup, final=final)
    low, high = (min(end * layers, units) for end in ends)
    for step in range(total + 2):
        along = min(max(Fraction(step - warmup, total - final - warmup), Fraction(0)), Fraction(1))
        left = {Constant: Fraction(along <= 0), Linear: 1 - along, Cubic: (1 - along) ** 3}[kind]
        exact = low + (high - low) * left
        sizes = {"total_steps": total, "units": units, "layers": layers}
        assert schedules.share(scheduler, step, **sizes) == pytest.approx(float(exact / units), abs=1e-12)
        assert scheduler.budget(step, **sizes) in {int(exact), int(float(exact) - 1e-9), int(float(exact) + 1e-9)}


@given(
    total=st.integers(1, 30),
    interval=st.integers(1, 9) | st.floats(0, 0.4),
    first_step=st.sampled_from([0, 1]),
    ending=st.sampled_from(["fixed", "peft", "released", "open", "every-step"]),
    data=st.data(),
)
@settings(max_examples=200)
def test_what_is_listed_as_decisions_is_what_is_due(
    total: int, interval: Any, first_step: Any, ending: Any, data: Any
) -> None:
    """Step by step through the run: each step that is due once and in order, and none beside it or beyond the run."""
    warmup = data.draw(st.integers(0, total))
    final = data.draw(st.integers(0, total - warmup))
    scheduler = Cubic(warmup=warmup, final=final, interval=interval, first_step=first_step, ending=ending)
    listed = schedules.decisions(scheduler, total)
    numbers = range(first_step, first_step + total)
    assert listed == [step for step in numbers if schedules.due(scheduler, step, total_steps=total)]


@pytest.mark.parametrize("kind", [Constant, Linear, Cubic])
def test_no_progress_is_all_of_the_start(kind: Any) -> None:
    """A decay is 1 at no progress and 0 at the end of it, the constant one included."""
    assert (kind().decay(0.0), kind().decay(1.0)) == (1.0, 0.0)
    assert 0 <= kind().decay(0.25) < 1


# ---------------------------------------------------------------- a run that grows


@attrs.frozen(kw_only=True)
class Exchange(lrkit.Action):
    """Counted, not run: each decision cuts `cut` components and adds `fresh`, wherever they may be."""

    fate: ClassVar[Fate] = "removed"
    final: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    unit = "component"  # type: ignore[assignment]
    cut: int = 0
    fresh: int = 0

    def apply(self, blocks: Any, kept: Tensor, optimizer: Any) -> None:
        raise NotImplementedError

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int]:
        return self.cut, self.fresh


@pytest.mark.parametrize("total", [4, 12])  # in the longer run all the first components may have gone
@pytest.mark.parametrize("kind", [Constant, Linear])
@pytest.mark.parametrize(("cut", "fresh"), [(0, 1), (0, 2), (1, 1), (1, 2), (2, 2), (3, 3)])
def test_the_range_of_a_run_that_grows_is_that_of_every_choice(kind: Any, cut: int, fresh: int, total: int) -> None:
    """By trying each set of first components that may have gone, and each layer in which a new one may stand."""
    sizes = [1 + d_out + d_in for d_out, d_in in SHAPES.values() for _ in range(2)]
    method = lrkit.Method(
        parameterization=SVD(rank=2),
        metric=SensitivityUncertainty(),
        scheduler=kind(start=2, target=4, final=1, interval=1),
        action=Exchange(cut=cut, fresh=fresh),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lrkit.LrkitWarning)
        counted = count(method, total)
    ranges, means = [], []
    for decisions in range(total):  # one after each step but the last
        gone, there = min(cut * decisions, 6), 6 + (fresh - cut) * decisions
        new = there - (6 - gone)
        totals = [
            sum(sizes) - sum(out) + sum(come)
            for out in itertools.combinations(sizes, gone)
            for come in itertools.combinations_with_replacement(sorted(set(sizes)), new)
        ]
        ranges.append((min(totals), max(totals)))
        means.append(sum(sizes) * there / 6)
    assert counted.start == sum(sizes)
    assert counted.end_range == ranges[-1]
    assert counted.average_range == pytest.approx(
        (statistics.fmean(low for low, _ in ranges), statistics.fmean(high for _, high in ranges))
    )
    assert counted.end == pytest.approx(means[-1])
    assert counted.average == pytest.approx(statistics.fmean(means))


# ---------------------------------------------------------------- operations


def test_all_operations_are_those_of_both_passes() -> None:
    """A total is forward and backward together."""
    counted = accounting.flops(rigs.Toy(), {"x": torch.randn(3, 6)})
    assert counted.forward == 2 * 3 * sum(d_out * d_in for d_out, d_in in SHAPES.values())
    assert counted.total == counted.forward + counted.backward > counted.forward
