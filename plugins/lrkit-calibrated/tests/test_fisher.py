"""FIM-LoRA: its share against the released rule, its scores and ranks against batches by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lrkit_calibrated
import pytest
import rigs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lrkit_calibrated import Apportion, Fisher, shared

import lrkit
from lrkit.registry import Registry
from lrkit.testing import ActionContract, MethodContract, MetricContract, only


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with only(lrkit_calibrated, distribution="lrkit-calibrated 0.1.0") as made:
        yield made


class TestFisher(MetricContract):
    component = Fisher()


class TestApportion(ActionContract):
    component = Apportion()
    exact = False


class TestFimLoRA(MethodContract):
    component = staticmethod(lrkit_calibrated.fim_lora)


def released(importance: dict[str, float], base: int, least: int, most: int) -> dict[str, int]:
    """``allocate_ranks`` of the released code, in its own steps: saturate, round, enforce the minimum."""
    scores = {name: max(value, 1e-10) for name, value in importance.items()}
    given: dict[str, int] = {}
    free, budget = list(scores), float(base * len(scores))
    while free:
        parts = {name: scores[name] / sum(scores[other] for other in free) * budget for name in free}
        over = [name for name in free if math.floor(parts[name]) >= most]
        if not over:
            break
        given |= dict.fromkeys(over, most)
        budget -= len(over) * most
        free = [name for name in free if name not in given]
    if free:
        floors = {name: math.floor(parts[name]) for name in free}
        order = sorted(free, key=lambda name: parts[name] - floors[name], reverse=True)
        for name in order[: int(budget) - sum(floors.values())]:
            floors[name] += 1
        given |= floors
        lacks = sum(max(0, least - given[name]) for name in free)
        for name in free:
            given[name] = max(least, given[name])
        for name in sorted((n for n in free if given[n] > least), key=lambda n: scores[n]):
            gives = min(given[name] - least, lacks)
            given[name] -= gives
            lacks -= gives
    return given


@settings(max_examples=300, deadline=None)
@given(
    scores=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=8),
    base=st.integers(1, 12),
    least=st.integers(1, 3),
)
def test_shares_as_released_code(scores: list[float], base: int, least: int) -> None:
    """The same ranks; together the budget, and each within its bounds, where the bounds allow it."""
    least, most = min(least, base), 2 * base
    ranks = shared(scores, base * len(scores), least, most)
    told = released({str(i): s for i, s in enumerate(scores)}, base, least, most)
    assert ranks == [told[str(i)] for i in range(len(scores))]
    assert all(least <= rank <= most for rank in ranks)
    assert sum(ranks) == base * len(scores) or least in ranks, "the budget, but where the least of all does not fit"


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    xs = [torch.randn(8, 6, generator=generator) for _ in range(count)]
    return [(x, torch.sin(3 * x[:, :4])) for x in xs]


def test_ranks_by_hand() -> None:
    """Ranks from the mean of B's squared gradients, in float64; one record, at step 0; no output changes."""
    model, adapted = rigs.toy(lrkit_calibrated.fim_lora(rank=4, alpha=8.0))
    seen: dict[str, float] = dict.fromkeys(adapted.adapters, 0.0)
    for x, y in batches(8):
        (model(x) - y).square().mean().backward()
        for name, module in adapted.adapters.items():
            assert not module.A.grad.any()
            seen[name] += module.B.grad.double().square().mean().item() / 8
            module.A.grad = module.B.grad = None
    wanted = released(seen, 4, 1, 8)

    def loss(batch: Any) -> torch.Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01)
    with pytest.raises(lrkit.LrkitError, match=r"adapted.calibrate\(batches\)"):
        adapted.bind(optimizer, total_steps=10)
    x = torch.randn(5, 6)
    before = model(x)
    adapted.calibrate(batches(8), loss)
    assert {name: module.rank for name, module in adapted.adapters.items()} == wanted
    assert len(set(wanted.values())) > 1 and sum(wanted.values()) == 12
    assert torch.equal(model(x), before)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=10)
    for batch in batches(10):
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    (decision,) = adapted.history
    assert decision.step == 0 and decision.kept == decision.budget == 12
