"""What the loop does with numbers that are none, on a device that nobody waits for, and when it draws."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import oracles
import pytest
import rigs
import torch
from torch import Tensor

import lrkit
from lrkit import layout, native
from lrkit.actions import Ballot, Growth
from lrkit.errors import LrkitWarning
from lrkit.metrics import GradientUncertainty, Magnitude, SensitivityUncertainty
from lrkit.parameterizations import SVD, LoRA
from lrkit.schedulers import Constant, Cubic, Linear


def prune(metric: Any, scheduler: Any, rank: int = 3) -> lrkit.Method:
    return lrkit.Method(
        parameterization=SVD(rank=rank, orthogonality=0.0),
        metric=metric,
        scheduler=scheduler,
        action=lrkit.actions.Prune(),
    )


def give(adapted: Any, size: Any = None, seed: int = 0) -> None:
    """Gradients for every adapter's tensors, drawn from a seed; `size` is a factor for layer m."""
    generator = torch.Generator().manual_seed(seed)
    for m, adapter in enumerate(adapted.adapters.values()):
        for p in (adapter.A, adapter.B, adapter.core):
            if p is not None and p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator) * (1.0 if size is None else size(m))


# ---------------------------------------------------------------- scores that are not numbers


def test_a_component_whose_score_is_not_a_number_loses_first() -> None:
    """λ that has become NaN is worth less than the smallest λ that is a number."""
    _, adapted = rigs.toy(prune(Magnitude(), Constant(target=2)))
    for adapter in adapted.adapters.values():
        with torch.no_grad():
            adapter.core.copy_(torch.tensor([1e-6, torch.nan, 3.0]))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=2)
    give(adapted)
    optimizer.step()
    (decision,) = adapted.history
    assert set(decision.lost) == {f"{name}[1]" for name in rigs.TOY_TARGETS}
    assert decision.threshold == pytest.approx(1e-6)


def test_a_matrix_whose_score_is_not_a_number_freezes_first() -> None:
    """A weight that has diverged to NaN is worth less than the smallest weight that is a number."""

    @attrs.frozen(kw_only=True)
    class Size(lrkit.Metric):
        def score(self, weight: Tensor, state: Any) -> Tensor:
            return weight.abs()

    method = lrkit.Method(
        parameterization=LoRA(rank=2), metric=Size(), scheduler=Constant(target=0.5), action=lrkit.actions.Freeze()
    )
    _, adapted = rigs.toy(method)
    with torch.no_grad():
        for m, adapter in enumerate(adapted.adapters.values()):
            adapter.A.fill_(torch.nan if m == 1 else 1e-6)
            adapter.B.fill_(torch.nan if m != 2 else 1e-6)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=2)
    give(adapted)
    optimizer.step()
    assert set(adapted.history[0].lost) == {"first.B", "second.A", "second.B"}


# ---------------------------------------------------------------- gradients that are not finite


class Away(str):
    """A device that torch takes for the CPU, and lrkit for another: nothing may wait for its values."""

    type = "away"


@pytest.fixture(params=["cpu", "away"])
def place(request: Any) -> Any:
    """Puts the statistics of a run on the CPU, or on a device that is none."""

    def put(adapted: Any) -> None:
        for state in adapted._controller.policies:
            state.layout.device = torch.device("cpu") if request.param == "cpu" else Away("cpu")

    return put


def buffers(adapted: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in adapted.state_dict()["tensors"].items() if ".buffer." in k}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, -1], ids=["first tensor", "last tensor"])
def test_one_gradient_that_is_not_finite_leaves_all_statistics_alone(
    bad: float, where: int, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the step is cut into pieces, and though every other piece is finite; the next finite step moves them again."""
    monkeypatch.setattr(layout, "_PIECE", 1)
    monkeypatch.setattr(native, "SMALLEST", 1 << 60)
    _, adapted = rigs.toy(prune(SensitivityUncertainty(), Cubic(target=1, warmup=10)))
    place(adapted)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=20)
    oracle = oracles.AdaLoRARun([3, 3, 3], 1, total=20, warmup=10, final=0, interval=1)
    for step in range(4):
        give(adapted, seed=step)
        seen = [
            {"core": (rigs.array(m.core), rigs.array(m.core.grad)), "P": (rigs.array(m.B).T, rigs.array(m.B.grad).T)}
            | {"Q": (rigs.array(m.A), rigs.array(m.A.grad))}
            for m in adapted.adapters.values()
        ]
        before = buffers(adapted)
        if step == 2:
            live = adapted._controller.policies[0].layout.live
            assert len(live) == 9
            live[where].grad.view(-1)[-1] = bad
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", LrkitWarning)
                weights = [p.detach().clone() for p in adapted.parameters()]
                optimizer.step()
                for p, weight in zip(adapted.parameters(), weights, strict=True):
                    p.copy_(weight)  # a rate of 0 times infinity is no number
            assert all(torch.equal(v, before[k]) for k, v in buffers(adapted).items())
        else:
            optimizer.step()
            oracle.step(seen)
            assert not all(torch.equal(v, before[k]) for k, v in buffers(adapted).items())
        scores = torch.tensor(list(adapted.scores().values())).double()
        torch.testing.assert_close(scores, torch.tensor(oracle.scores(), dtype=torch.float64), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("bad_step", [None, 3, 4, 5], ids=str)
def test_a_device_that_is_not_waited_for_tells_at_the_decision(bad_step: int | None) -> None:
    """A gradient that was not finite at any step since the last decision is told of at the next one, and only then."""
    _, adapted = rigs.toy(prune(SensitivityUncertainty(), Cubic(target=1, interval=3)))
    adapted._controller.policies[0].layout.device = Away("cpu")
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=12)
    told: list[int] = []
    for step in range(1, 10):
        give(adapted, seed=step)
        if step == bad_step:
            next(iter(adapted.adapters.values())).A.grad[0, 0] = torch.nan
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", LrkitWarning)
            optimizer.step()
        told += [step for w in seen if "gradients are not finite before step" in str(w.message)]
        with torch.no_grad():
            for adapter in adapted.adapters.values():
                adapter.A.nan_to_num_()
    assert told == ([] if bad_step is None else [3 if bad_step == 3 else 6])


# ---------------------------------------------------------------- what is drawn when a layer grows


@attrs.frozen(kw_only=True)
class OneMore(lrkit.Action):
    """Every layer gets one component more at each decision."""

    reversible: ClassVar[bool] = False
    grows: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    unit = "component"  # type: ignore[assignment]

    def select(self, ballot: Ballot) -> Tensor:
        return ballot.candidates

    def apply(self, blocks: Any, kept: Tensor, optimizer: Any) -> None:
        return

    def grow(self, blocks: Sequence[lrkit.Block], kept: Tensor, ballot: Ballot) -> Growth:
        return Growth(fresh=(1,) * len(blocks))

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int]:
        return 0, layers


def grown(seed: int, policies: int = 1) -> dict[str, Tensor]:
    """A's rows by component, each as it was drawn, after some decisions of a run whose seed is set."""
    policy = lrkit.Policy(
        metric=GradientUncertainty(),
        scheduler=Linear(start=1, target=1 + 3 * policies, interval=1, final=1),
        action=OneMore(),
    )
    method = lrkit.Method(
        parameterization=SVD(rank=1, orthogonality=0.0),
        metric=policy.metric,
        scheduler=policy.scheduler,
        action=policy.action,
        also=(policy,) * (policies - 1),
    )
    torch.manual_seed(seed)
    model = rigs.Toy()
    adapted = lrkit.attach(model, method, targets=rigs.TOY_TARGETS, train_also=())
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrkitWarning)
        adapted.bind(optimizer, total_steps=4)
    for step in range(4):
        give(adapted, seed=step)
        optimizer.step()
    return {f"{name}[{i}]": row for name, m in adapted.adapters.items() for i, row in enumerate(m.A.detach().clone())}


@pytest.mark.parametrize("policies", [1, 2])
def test_no_component_is_drawn_as_another_was(policies: int) -> None:
    """Not at another step, in another layer, or by another policy: each fresh row of A is its own."""
    rows = grown(0, policies)
    assert len(rows) == 3 * (1 + 3 * policies)
    for (one, a), (two, b) in itertools.combinations(rows.items(), 2):
        n = min(len(a), len(b))
        assert not torch.allclose(a[:n], b[:n], rtol=1e-3), (one, two)


def test_what_is_drawn_follows_from_the_seed() -> None:
    """The same seed draws the same components, another one others."""
    one, again, other = grown(1), grown(1), grown(2)
    assert all(torch.equal(row, again[name]) for name, row in one.items())
    assert not any(torch.allclose(row, other[name], rtol=1e-3) for name, row in one.items())


# ---------------------------------------------------------------- when it is over


@attrs.frozen(kw_only=True)
class Always(Cubic):
    """Says that a decision is due at every step, after its own end as well."""

    def due(self, step: int, *, total_steps: int) -> bool:
        return True


def test_nothing_is_decided_after_a_schedule_s_end() -> None:
    """What was kept by the last decision stays kept, though a scheduler says that a further one is due."""
    _, adapted = rigs.toy(prune(SensitivityUncertainty(), Always(target=1, final=3)))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=8)
    for step in range(8):
        give(adapted, size=lambda m, step=step: 10.0 ** (step if m == 2 else -step), seed=step)
        optimizer.step()
        if step == 4:
            kept = rigs.cores(adapted) != 0
    assert [d.step for d in adapted.history] == [1, 2, 3, 4, 5]
    assert torch.equal(rigs.cores(adapted) != 0, kept)


@pytest.mark.parametrize("ending", ["fixed", "peft", "released", "open"])
@pytest.mark.parametrize("first_step", [0, 1])
@pytest.mark.parametrize("final", [0, 1, 2])
def test_a_last_decision_that_no_step_reaches_is_said(ending: Any, first_step: Any, final: int) -> None:
    """A run of T steps has those numbered 0 to T - 1, or 1 to T; warned of exactly where the end is not among them."""
    total = 6
    scheduler = Cubic(target=1, ending=ending, first_step=first_step, final=final)
    _, adapted = rigs.toy(prune(SensitivityUncertainty(), scheduler))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", LrkitWarning)
        adapted.bind(optimizer, total_steps=total)
    numbers = range(first_step, first_step + total)
    last = {"fixed": total - final, "peft": total - final, "released": total - final + 1, "open": numbers[-1]}[ending]
    assert any("will not be reached" in str(w.message) for w in seen) is (last not in numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LrkitWarning)
        for step in range(total):
            give(adapted, seed=step)
            optimizer.step()
    assert (adapted.history[-1].step - 1 + first_step == last) is (last in numbers)


def test_a_step_too_many_is_said_once_and_at_that_step() -> None:
    """Not at the last step of the run, but at the one after it."""
    _, adapted = rigs.toy(prune(SensitivityUncertainty(), Cubic(target=1, final=2)))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=4)
    for step in range(4):  # a warning is an error
        give(adapted, seed=step)
        optimizer.step()
    with pytest.warns(LrkitWarning, match="step 5 of a run that was bound for total_steps=4"):
        optimizer.step()
    optimizer.step()


def test_a_run_that_ends_early_names_the_later_of_two_schedules() -> None:
    """Of two policies that have not ended, the one that ends last says until when to train."""
    _, adapted = rigs.toy(
        lrkit.Method(
            parameterization=SVD(rank=3, orthogonality=0.0),
            metric=SensitivityUncertainty(),
            scheduler=Cubic(target=1, final=6),
            action=lrkit.actions.Prune(),
            also=(
                lrkit.Policy(
                    metric=GradientUncertainty(), scheduler=Cubic(target=0.5, final=1), action=lrkit.actions.Freeze()
                ),
            ),
        )
    )
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=10)
    for step in range(3):
        give(adapted, seed=step)
        optimizer.step()
    with pytest.warns(LrkitWarning, match="step 3 of 10.* at step 9"):
        adapted.merge()
