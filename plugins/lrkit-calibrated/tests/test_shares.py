"""Shares of a budget: sums, bounds and proportions; and the author's own rule by hand."""

import math

import lrkit_calibrated
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lrkit_calibrated import Allocate, ShareOut
from lrkit_calibrated.shares import filled, saturated

import lrkit
from lrkit.actions import Ballot
from lrkit.testing import ActionContract, only


@pytest.fixture(autouse=True)
def registry():
    with only(lrkit_calibrated, distribution="lrkit-calibrated 0.1.0") as made:
        yield made


class TestAllocate(ActionContract):
    component = Allocate()


class TestShareOut(ActionContract):
    component = (ShareOut(), ShareOut(rule="rounded", least=2, most=4))
    exact = False


weights = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=12)


@given(weights, st.integers(0, 80), st.integers(0, 3), st.integers(3, 12))
def test_filled_is_the_clipped_share(importance, budget, least, most):
    """The sum is exact, and each number is next to clip(λ w) for the λ that fills the budget, found by bisection."""
    numbers = filled(importance, budget, least, most)
    count = len(importance)
    wanted = min(max(budget, least * count), most * count)
    assert sum(numbers) == wanted
    assert all(least <= n <= most for n in numbers)
    w = np.array(importance) if sum(importance) else np.ones(count)
    if 0 < (w > 0).sum() < count and least == 0:
        return  # those that matter may all be full: the rest is shared out equally
    low, high = 0.0, 1e12
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * w, least, most).sum() < wanted else (low, middle)
    ideal = np.clip(high * w, least, most)
    if abs(ideal.sum() - wanted) < 1e-6:
        assert np.abs(np.array(numbers) - ideal).max() <= 1 + 1e-6


@given(weights, st.integers(1, 8))
def test_higher_importance_gets_no_less(importance, rank):
    numbers = filled(importance, rank * len(importance), 1, 2 * rank)
    order = np.argsort(importance, kind="stable")
    ranked = np.array(numbers)[order]
    values = np.array(importance)[order]
    assert all(a <= b for a, b, v, w in zip(ranked, ranked[1:], values, values[1:], strict=False) if v < w)


def released(importance, base, least, most):
    """``allocate_ranks`` of FIM-LoRA's released code, in its own steps: saturate, round, enforce the minimum."""
    scores = {at: max(value, 1e-10) for at, value in enumerate(importance)}
    ranks, free, budget = {}, list(scores), float(base * len(scores))
    while free:
        parts = {at: scores[at] / sum(scores[i] for i in free) * budget for at in free}
        over = [at for at in free if math.floor(parts[at]) >= most]
        if not over:
            break
        ranks |= dict.fromkeys(over, most)
        budget -= len(over) * most
        free = [at for at in free if at not in over]
    if free:
        floors = {at: math.floor(parts[at]) for at in free}
        remainders = sorted(free, key=lambda at: parts[at] - floors[at], reverse=True)
        for at in remainders[: int(budget) - sum(floors.values())]:
            floors[at] += 1
        lack = sum(max(0, least - floors[at]) for at in free)
        ranks |= {at: max(least, rank) for at, rank in floors.items()}
        for at in sorted((at for at in free if ranks[at] > least), key=scores.__getitem__):
            gives = min(ranks[at] - least, lack)
            ranks[at] -= gives
            lack -= gives
    return [ranks[at] for at in scores]


@given(weights, st.integers(1, 12), st.integers(0, 3), st.integers(1, 3))
def test_saturated_is_the_released_rule(importance, base, least, times):
    """The same ranks as the released code's steps give; and above the budget only if nobody has more than the least."""
    least, most = min(least, base), base * times
    numbers = saturated(importance, base * len(importance), least, most)
    assert numbers == released(importance, base, least, most)
    assert all(least <= n <= most for n in numbers)
    assert sum(numbers) <= base * len(importance) or set(numbers) <= {least, most}


def test_saturated_by_hand():
    """40 to share, at most 16; 90 % fills the first, then 24 go 1:1:0, and the last one's 1 is taken from the second."""
    assert saturated([90.0, 5.0, 5.0, 0.0], 40, 1, 16) == [16, 11, 12, 1]
    assert filled([90.0, 5.0, 5.0, 0.0], 40, 1, 16) == [16, 12, 11, 1]
    assert saturated([1.0, 1.0, 1.0], 8, 1, 16) == [3, 3, 2]
    assert saturated([3.0, 2.0, 1.0], 12, 1, 16) == [6, 4, 2]


def ballot(scores, blocks, budget, sizes):
    blocks, ones = torch.tensor(blocks), torch.ones(len(blocks), dtype=torch.bool)
    return Ballot(
        torch.tensor(scores),
        ones,
        budget,
        1.0,
        torch.tensor(scores),
        ones.long(),
        blocks,
        torch.tensor(sizes),
        layers=3,
    )


@pytest.mark.parametrize("rule", ["rounded", "floored"])
def test_gora_rules_follow_the_formula(rule):
    """Layers of 10 and 40 entries per component, and one without components, which gets none."""
    given = ballot([1.0, 3.0, 5.0, 5.0], [0, 0, 2, 2], 4, [10, 10, 40, 40])
    f = {"rounded": (math.sqrt(10), math.sqrt(40)), "floored": (10, 40)}[rule]
    total = sum(f) * 4 / 2
    exact = [total * share / each for share, each in zip((2 / 7, 5 / 7), f, strict=True)]
    wanted = [round(x) for x in exact] if rule == "rounded" else [math.floor(x) for x in exact]
    verdict = ShareOut(rule=rule, least=1, most=99).decide(given)
    assert verdict.fresh == (wanted[0], 0, wanted[1])
    assert not verdict.kept.any()


def test_importance_is_the_components_mean():
    """A layer with three components that score 1 matters a third as much as one with a single component that scores 3."""
    verdict = ShareOut().decide(ballot([1.0, 1.0, 1.0, 3.0], [0, 0, 0, 2], 8, [1] * 4))
    assert verdict.fresh == (2, 0, 6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(lrkit.LrkitError, match="least 5 is above most 4"):
        ShareOut(least=5, most=4)
    with pytest.raises(lrkit.LrkitError, match=r"Allocate.* does not fit .*SVD.*core value"):
        lrkit.Method(
            parameterization=lrkit.parameterizations.SVD(),
            metric=lrkit_calibrated.ExplainedVariance(),
            scheduler=lrkit.schedulers.Once(),
            action=Allocate(),
        )
