"""A choice that decides a result is a setting, with a name and two tested positions."""

from __future__ import annotations

import math
from fractions import Fraction

import attrs
import models
import oracles
import pytest
import schedules
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrkit
from lrkit.parameterizations import SVD
from lrkit.schedulers import Cubic, Linear


@given(st.integers(1, 400), st.integers(0, 400), st.sampled_from([(Linear, 1), (Cubic, 3)]), st.integers(0, 9))
def test_budget_rounds_both_ways(units, low, kind, place):
    """Between two whole numbers the budget is the lower or the higher one, at eighths of the way, which floats hold."""
    cls, power = kind
    low = min(low, units)
    place = min(place, 8)
    exact = low + (units - low) * (1 - Fraction(place, 8)) ** power
    for rounding, whole in (("down", math.floor), ("up", math.ceil)):
        scheduler = cls(target=low / units, rounding=rounding)
        assert scheduler.budget(place, total_steps=8, units=units, layers=1) == whole(exact)


@pytest.mark.parametrize("rounding", ["down", "up"])
def test_growing_budgets_round(rounding):
    """A budget that rises is cut or raised alike."""
    scheduler = Linear(start=1, target=3, rounding=rounding)
    found = [scheduler.budget(t, total_steps=8, units=9, layers=3) for t in range(9)]
    exact = [3 + Fraction(6 * t, 8) for t in range(9)]
    assert found == [(math.ceil if rounding == "up" else math.floor)(value) for value in exact]


@pytest.mark.parametrize("rounding", ["down", "up"])
def test_last_matrix_freezes_then(rounding):
    """AFLoRA's last matrix freezes where N (1 - r) falls below one, or at T - t_f: in a run as the fraction says."""
    total, warmup, final = 40, 4, 12
    method = lrkit.methods.aflora(rank=2, warmup=warmup, final=final)
    method = attrs.evolve(method, scheduler=attrs.evolve(method.scheduler, rounding=rounding))
    model = models.make("bert")
    adapted = lrkit.attach(model, method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
    adapted.bind(optimizer, total_steps=total)
    matrices = [m.get_parameter(k) for m in adapted.adapters.values() for k in "AB" if m.get_parameter(k).requires_grad]
    frozen = []
    for step in range(total):
        model(**models.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        frozen.append(sum(not p.requires_grad for p in matrices))
    count = len(matrices)
    whole = math.ceil if rounding == "down" else math.floor
    shares = [oracles.freezing_fraction(t, total=total, warmup=warmup, final=final) for t in range(1, total + 1)]
    assert frozen == [whole(round(count * share, 9)) for share in shares]
    assert (frozen.index(count) + 1 < total - final) == (rounding == "down")


def test_default_penalty_is_mean():
    """AdaLoRA, SVD-LoRA and the SVD form take the mean norm; "paper" takes Eq. 4, and nothing else differs."""
    for make in (lrkit.methods.adalora, lrkit.methods.svd_lora):
        default, paper = make(), make(variant="paper")
        assert default == make(variant="default")
        assert default.parameterization.orthogonality_norm == "mean" == SVD().orthogonality_norm
        assert paper.parameterization.orthogonality_norm == "squared"
        same = attrs.evolve(paper.parameterization, orthogonality_norm="mean")
        assert attrs.evolve(paper, parameterization=same) == default
    for variant in ("released", "peft"):
        assert lrkit.methods.adalora(variant=variant).parameterization.orthogonality_norm == "mean"


def test_penalties_are_the_oracle_s():
    """The default's penalty is the mean of the norms, the paper's the sum of their squares: numbers of a real model."""
    for variant, oracle in (("default", oracles.orthogonality_mean), ("paper", oracles.orthogonality_squared)):
        adapted = lrkit.attach(
            models.make("bert").double(), lrkit.methods.adalora(rank=3, target_rank=2, variant=variant)
        )
        factors = [m.B.detach().numpy().T for m in adapted.adapters.values()]
        factors += [m.A.detach().numpy() for m in adapted.adapters.values()]
        assert adapted.penalty().item() == pytest.approx(0.1 * oracle(factors))


def test_unknown_variants_are_refused():
    """A variant that does not exist is told with those that do."""
    with pytest.raises(lrkit.LrkitError, match='variant must be "default", "paper", "released" or "peft"'):
        lrkit.methods.adalora(variant="papers")
    with pytest.raises(lrkit.LrkitError, match='variant must be "default" or "paper"'):
        lrkit.methods.svd_lora(variant="peft")


@given(st.integers(1, 500), st.floats(0, 1), st.integers(0, 40))
def test_shares_stay_exact(units, target, step):
    """A share is the formula's, whatever whole number of units its ends round to; the budget is within one unit of it."""
    scheduler = Cubic(target=target, warmup=4, final=10)
    place = min(max((step - 4) / 26, 0.0), 1.0)
    wanted = target + (1.0 - target) * (1.0 - place) ** 3
    amounts = {"total_steps": 40, "units": units, "layers": 1}
    assert schedules.share(scheduler, step, **amounts) == wanted
    assert abs(scheduler.budget(step, **amounts) - wanted * units) <= 1
