"""Budgets in what units cost: parameters, or multiply-adds per token."""

import itertools
from typing import ClassVar

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lrkit
from lrkit import accounting
from lrkit.actions import Action, Ballot, Freeze, Prune, Verdict, Zero, best
from lrkit.fit import refusal
from lrkit.loop.costs import Costs
from lrkit.metrics import Random, SensitivityUncertainty
from lrkit.parameterizations import SVD, VectorScaled
from lrkit.schedulers import Constant, Cubic, Linear
from lrkit.testing import ActionContract, SchedulerContract

STEPS = 12
WIDTHS = (3, 8, 20, 5, 2)
"""Layers of unlike size."""


class Uneven(nn.Module):
    """A chain of linear maps of unlike sizes; the last one is the head."""

    def __init__(self, widths=WIDTHS):
        super().__init__()
        for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
            self.add_module(f"layer{i}", nn.Linear(d_in, d_out))
        self.depth = len(widths) - 1

    def forward(self, x):
        for i in range(self.depth):
            x = torch.tanh(self.get_submodule(f"layer{i}")(x))
        return x


def test_a_layer_s_cost_is_rounded_up():
    """One matrix of rank 1 in every layer costs the mean of A's d_in and B's d_out, summed over layers and rounded up."""
    torch.manual_seed(1)
    method = lrkit.Method(
        parameterization=VectorScaled(rank=1, train="both"),
        metric=SensitivityUncertainty(),
        scheduler=Cubic(target=1, warmup=2, final=3, interval=1, amount="parameters"),
        action=Freeze(),
    )
    model, targets = Uneven(), ["layer0", "layer1", "layer2"]
    adapted = lrkit.attach(model, method, targets=targets, train_also=["layer3"])
    widths = list(itertools.pairwise(WIDTHS[:-1]))
    exact = sum(d_in + d_out for d_in, d_out in widths) / 2
    assert exact == 32.0 and adapted.controller.policies[0].costs.layer == 32
    adapted.detach()
    uneven = lrkit.attach(Uneven((3, 8, 20)), method, targets=["layer0"], train_also=["layer1"])
    assert uneven.controller.policies[0].costs.layer == 6  # (3 + 8) / 2 = 5.5


def start(method, seed=0, steps=STEPS):
    torch.manual_seed(1)
    model = Uneven()
    torch.manual_seed(seed)
    adapted = lrkit.attach(model, method, targets=["layer0", "layer1", "layer2"], train_also=["layer3"])
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=steps)
    return model, adapted, optimizer


def go(started, until=STEPS):
    model, adapted, optimizer = started
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 3, generator=generator), torch.randint(2, (16,), generator=generator)
    while adapted.step < until:
        (F.cross_entropy(model(x), y) + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


def adalora(rank=4, target=1, amount="parameters", cls=Cubic, metric=None, action=None):
    return lrkit.Method(
        parameterization=SVD(rank=rank),
        metric=metric or SensitivityUncertainty(),
        scheduler=cls(target=target, warmup=2, final=3, interval=1, amount=amount),
        action=action or Prune(),
    )


def sizes_of(adapted):
    """Parameters of one component, by layer, from the layers' shapes."""
    return {name: sum(layer.base.weight.shape) + 1 for name, layer in adapted.adapters.items()}


def greedy(scores, costs, candidates, budget, by="score"):
    """The definition, one unit after another: of all that still fit the best, of equals the first."""
    kept = [False] * len(scores)
    while True:
        fits = [i for i in range(len(scores)) if candidates[i] and not kept[i] and costs[i] <= budget]
        if not fits:
            return kept
        worth = [scores[i] / costs[i] if by == "score-per-cost" else scores[i] for i in fits]
        first = fits[worth.index(max(worth))]
        kept[first], budget = True, budget - costs[first]


def ballot(scores, candidates, budget, costs=None):
    n = len(scores)
    scores = torch.tensor(scores, dtype=torch.float32)
    may = torch.tensor(candidates, dtype=torch.bool)
    nothing = torch.zeros(n, dtype=torch.long)
    costs = None if costs is None else torch.tensor(costs)
    scores = scores.masked_fill(~may, -torch.inf)
    return Ballot(scores, may, budget, 0.5, scores, nothing + 1, nothing, layers=1, costs=costs)


@st.composite
def choices(draw):
    n = draw(st.integers(1, 12))
    scores = draw(st.lists(st.sampled_from([0.0, 0.125, 0.5, 1.0, 3.0, 7.0, 1e-30]), min_size=n, max_size=n))
    candidates = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    costs = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    return scores, costs, candidates, draw(st.integers(0, 60))


# ---- the choice ------------------------------------------------------------------------------------------------------


@given(choices(), st.sampled_from(["score", "score-per-cost"]))
def test_choice_is_the_greedy_one(choice, by):
    """`best` is the definition's choice; it never passes the budget, and nothing that was left out would fit."""
    scores, costs, candidates, budget = choice
    kept = best(ballot(scores, candidates, budget, costs), by).tolist()
    exact = [float(torch.tensor(s, dtype=torch.float32)) for s in scores]
    assert kept == greedy(exact, costs, candidates, budget, by)
    room = budget - sum(c for c, k in zip(costs, kept, strict=True) if k)
    assert room >= 0
    assert all(c > room for c, k, may in zip(costs, kept, candidates, strict=True) if may and not k)


@given(choices(), st.integers(1, 50), st.sampled_from(["score", "score-per-cost"]))
def test_equal_costs_change_nothing(choice, cost, by):
    """If all units cost the same, all actions choose as they do in units, ties included."""
    scores, _, candidates, budget = choice
    in_units = ballot(scores, candidates, min(budget, len(scores)))
    in_costs = ballot(scores, candidates, in_units.budget * cost + cost - 1, [cost] * len(scores))
    assert torch.equal(best(in_units), best(in_costs, by))
    everyone = [True] * len(scores)
    both = ballot(scores, everyone, in_units.budget), ballot(scores, everyone, in_costs.budget, [cost] * len(scores))
    for kind in (Prune, Zero, Freeze):
        assert torch.equal(kind().decide(both[0]).kept, kind(by=by).decide(both[1]).kept)
    loose = [Prune(ties="threshold", by=each).decide(one).kept for each, one in zip(("score", by), both, strict=True)]
    assert torch.equal(*loose)


def test_threshold_stops_at_the_first_too_dear():
    """With ties="threshold" nothing at or below the first score without room is kept, whatever would still fit."""
    one = ballot([9.0, 8.0, 7.0, 7.0, 1.0], [True] * 5, 7, [4, 2, 3, 1, 1])
    assert Prune(ties="threshold").decide(one).kept.tolist() == [True, True, False, False, False]
    assert Prune().decide(one).kept.tolist() == [True, True, False, True, False]
    assert Prune(by="score-per-cost").decide(one).kept.tolist() == [False, True, True, True, True]
    two = ballot([9.0, 8.0, 7.0], [True] * 3, 3, [3, 1, 1])
    assert Prune().decide(two).kept.tolist() == [True, False, False]
    assert Prune(by="score-per-cost").decide(two).kept.tolist() == [False, True, True]


# ---- the costs -------------------------------------------------------------------------------------------------------


def test_costs_are_entries():
    """A component costs d_in + d_out + 1; where A and B do not train, 1 in parameters and all of it in multiply-adds."""
    for amount in ("parameters", "flops"):
        _, adapted, _ = start(adalora(amount=amount))
        (state,) = adapted.controller.policies
        each = list(sizes_of(adapted).values())
        assert list(state.costs.each) == each == [3 + 8 + 1, 8 + 20 + 1, 20 + 5 + 1]
        assert (state.costs.whole, state.costs.layer) == (4 * sum(each), sum(each))
    frozen = VectorScaled(rank=4, train="none")
    for amount, want in (("parameters", [1, 1, 1]), ("flops", [12, 29, 26])):
        _, adapted, _ = start(attrs.evolve(adalora(amount=amount), parameterization=frozen))
        assert list(adapted.controller.policies[0].costs.each) == want


def test_matrices_cost_their_entries():
    """A matrix costs its entries; one in every layer costs the mean of A and B, rounded up over all layers."""
    scheduler = Cubic(target=1, amount="flops")
    method = attrs.evolve(adalora(action=Freeze(), metric=SensitivityUncertainty()), scheduler=scheduler)
    for action in (Freeze(), Freeze(together=True)):
        _, adapted, _ = start(attrs.evolve(method, action=action))
        costs = adapted.controller.policies[0].costs
        matrices = [4 * 8, 4 * 3, 4 * 20, 4 * 8, 4 * 5, 4 * 20]
        assert sorted(costs.each) == sorted([44, 112, 100] if action.together else matrices)
        assert costs.whole == sum(matrices)
        assert costs.layer == sum(matrices) // (1 if action.together else 2)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["score", "score-per-cost"])
@pytest.mark.parametrize("amount", ["parameters", "flops"])
def test_run_is_the_oracle(amount, by):
    """At each decision the mask is the definition's, from scores and costs of the run; the last ends at uniform rank 1."""
    started = start(adalora(amount=amount, action=Prune(by=by)))
    _, adapted, _ = started
    costs = [size for size in sizes_of(adapted).values() for _ in range(4)]
    (state,) = adapted.controller.policies
    low, high = sum(costs) // 4, sum(costs)
    seen, choose = [], state.decide

    def decide(*arguments):
        seen.append((choose(*arguments), state.scores(0).double().tolist()))
        return seen[-1][0]

    state.decide = decide
    for step in range(1, STEPS + 1):
        go(started, step)
        if seen and len(seen) == len(adapted.history):
            decided, scores = seen[-1]
            budget = adapted.history[-1].budget
            assert decided.verdict.kept.tolist() == greedy(scores, costs, [True] * 12, budget, by)
    for d in adapted.history:
        progress = min(1.0, (d.step - 2) / (STEPS - 5))
        assert d.budget == int(low + (high - low) * (1 - progress) ** 3 + 1e-9)
        assert d.amount == amount
        assert d.budget - max(costs) < d.spent <= d.budget <= d.whole == high
        assert d.units == 12
    assert adapted.history[-1].budget == low == sum(sizes_of(adapted).values())
    if amount == "parameters":
        trained = adapted.summary().now
        assert trained == adapted.history[-1].spent


def test_metrics_end_at_one_budget():
    """Two metrics end at unlike parameters in units, and within one component of one number in parameters."""
    spent = {}
    for amount in ("units", "parameters"):
        ends = [go(start(adalora(amount=amount, metric=metric))) for metric in (SensitivityUncertainty(), Random())]
        spent[amount] = [a.summary().now for a in ends]
    budget = 12 + 29 + 26
    assert spent["units"][0] != spent["units"][1]
    assert all(budget - 29 < each <= budget for each in spent["parameters"])


def test_unlike_ranks_cost_alike():
    """If layers begin with unlike ranks, none included, a component costs the same, and so does one in every layer."""
    _, adapted, _ = start(adalora())
    blocks = adapted.controller.policies[0].blocks
    for counts in ((4, 4, 4), (1, 6, 2), (0, 3, 3)):
        given = [attrs.evolve(block, count=n) for block, n in zip(blocks, counts, strict=True)]
        for amount in ("parameters", "flops"):
            costs = Costs.of(amount, given, SVD(rank=4).parts, sum(counts))
            assert costs.each == (12, 29, 26)
            assert costs.layer == 12 + 29 + 26
            assert costs.first == costs.whole == 12 * counts[0] + 29 * counts[1] + 26 * counts[2]
        assert Costs.of("units", given, SVD(rank=4).parts, 99) == Costs(None, sum(counts), 99, 3, costs.sizes)


def test_cut_components_end_at_the_budget():
    """What is cut at once ends within one component of the budget too, and no more is stored than that."""
    model, adapted, _ = start(adalora(rank=4, action=Prune(cut="always")))
    go((model, adapted, _))
    budget = adapted.history[-1].budget
    assert budget == 12 + 29 + 26
    stored = sum(p.numel() for p in adapted.adapter_parameters())
    assert budget - 29 < adapted.history[-1].spent == stored <= budget


@pytest.mark.parametrize(
    "action", [Prune(), Prune(cut="end"), Prune(cut="always", by="score-per-cost"), Zero(once=True)]
)
@pytest.mark.parametrize("cls", [Constant, Linear, Cubic])
def test_resumed_run_is_the_run(action, cls):
    """A run that counts parameters and is resumed in the middle is bitwise the undisturbed one."""
    method = adalora(action=action, cls=cls)
    whole, half = start(method), start(method)
    go(whole)
    go(half, 6)
    again = start(method, seed=9)
    again[1].load_state_dict(half[1].state_dict())
    again[2].load_state_dict(half[2].state_dict())
    go(again)
    assert whole[1].history == again[1].history
    mine, theirs = whole[0].state_dict(), again[0].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_record_without_costs_loads():
    """A state of before there were costs has units' numbers in their place."""
    begun = start(adalora(amount="units"))
    go(begun, 6)
    state = begun[1].state_dict()
    for record in state["meta"]["history"]:
        for name in ("amount", "spent", "whole"):
            del record[name]
    again = start(adalora(amount="units"))
    again[1].load_state_dict(state)
    assert again[1].history == begun[1].history
    assert {(d.amount, d.spent == d.kept, d.whole == d.units) for d in again[1].history} == {("units", True, True)}
    state["meta"]["history"][0]["spent"] = 1
    with pytest.raises(lrkit.LrkitError, match="lacks"):
        again[1].load_state_dict(state)


# ---- beforehand ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [Prune(), Prune(cut="always"), Zero()])
@pytest.mark.parametrize("amount", ["parameters", "flops"])
def test_counted_beforehand(action, amount):
    """A run that is counted beforehand holds the run: its end and its average lie within the ranges that are told."""
    method = adalora(action=action, amount=amount)
    counted = accounting.count(
        method, Uneven(), total_steps=STEPS, targets=["layer0", "layer1", "layer2"], train_also=["layer3"]
    )
    adapted = go(start(method))
    end = adapted.summary().now
    average = adapted.summary().average
    assert counted.end_range[0] <= end <= counted.end_range[1]
    assert counted.average_range[0] <= average <= counted.average_range[1]
    assert counted.end == counted.end_range[1] == 12 + 29 + 26
    assert counted.end_range[1] - counted.end_range[0] == 28


def test_messages_name_what_is_counted():
    """A refusal and a warning say in what the budget is counted."""
    method = adalora()
    rising = attrs.evolve(method, scheduler=Cubic(start=0.2, target=1, amount="parameters"))
    with pytest.raises(lrkit.LrkitError, match=r"is 67 of 268 parameters, .* 54: a budget never grows"):
        start(rising)
    begun = start(method)
    go(begun, 4)
    with pytest.warns(lrkit.LrkitWarning, match="not reached"):
        begun[1].unbind()
    with pytest.raises(lrkit.LrkitError, match=r"of 268 parameters"):
        begun[1].bind(begun[2], total_steps=2 * STEPS)
    tiny = attrs.evolve(method, scheduler=Cubic(target=0.03, amount="parameters"))
    with pytest.warns(lrkit.LrkitWarning, match="no component is left"):
        start(tiny)


# ---- what fits -------------------------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Counts(Prune):
    """Keeps a number of units, whatever they cost."""

    def decide(self, ballot: Ballot) -> Verdict:
        order = ballot.scores.argsort(descending=True)[: ballot.budget]
        kept = torch.zeros_like(ballot.candidates)
        kept[order] = True
        return Verdict(kept)


@attrs.frozen(kw_only=True)
class Grows(Prune):
    """Adds components."""

    grows: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (Counts(), "whatever they cost"),
        (Grows(), "adds units"),
        (Freeze(rule="quantile"), "goes by no budget"),
    ],
)
@pytest.mark.parametrize("amount", ["parameters", "flops"])
def test_what_cannot_keep_to_costs_is_refused(action, words, amount):
    """An action that goes by numbers alone is refused with a budget in costs, in one line that names both settings."""
    with pytest.raises(lrkit.LrkitError) as caught:
        adalora(action=action, amount=amount)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert f'Cubic.amount = "{amount}"' in str(caught.value) and repr(action) in str(caught.value)
    assert refusal(SVD(), SensitivityUncertainty(), Cubic(), action) is None


def test_cost_needs_costs():
    """To rank by cost where every unit costs one is refused, and by a rule that ranks nothing as well."""
    with pytest.raises(lrkit.LrkitError, match=r'by = "score-per-cost", and Cubic\.amount is "units"'):
        adalora(amount="units", action=Prune(by="score-per-cost"))
    with pytest.raises(lrkit.LrkitError, match=r'rule = "quantile".* by must be "score"'):
        Freeze(rule="quantile", by="score-per-cost")


def test_overspending_is_noticed():
    """An action that passes the budget after all is stopped at its decision."""
    one = ballot([3.0, 2.0], [True, True], 3, [3, 1])
    assert "cost 4, and the budget is 3" in lrkit.actions.unsound(Prune(), Verdict(torch.tensor([True, True])), one, 2)


class TestParameters(SchedulerContract):
    """The contract of schedulers, counted in parameters."""

    component: ClassVar = (Cubic(target=2, amount="parameters"), Linear(target=0.25, amount="flops"))


class TestAction(ActionContract):
    """The contract of actions for those that rank by cost."""

    component: ClassVar[tuple[Action, ...]] = (Prune(by="score-per-cost"), Freeze(by="score-per-cost"))
