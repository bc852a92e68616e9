"""Pruning: the oracle's masks over whole runs, the way back for a masked triplet, and the budget never passed."""

from __future__ import annotations

import warnings
from typing import Any

import attrs
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import OPTIMIZERS, Recorder, bert, cores, loss_of, toy

import lrkit
from lrkit.actions import Freeze, Prune
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.metrics import GradientUncertainty, Magnitude, Sensitivity, SensitivityUncertainty
from lrkit.parameterizations import SVD, VectorScaled
from lrkit.schedulers import Constant, Cubic, Linear

# total, warmup, final, interval
SETTINGS = [
    (30, 5, 10, 1),
    (30, 0, 0, 1),
    (40, 8, 12, 5),
    (33, 7, 9, 4),  # the end lies off the interval
    (20, 18, 1, 3),
    (25, 3, 21, 10),  # no multiple of the interval before the end
]
METRICS: dict[str, Any] = {
    "sensitivity": Sensitivity(),
    "sensitivity-smoothed": Sensitivity(smoothed=True),
    "sensitivity-uncertainty": SensitivityUncertainty(),
    "gradient-uncertainty": GradientUncertainty(beta2=0.85),
    "magnitude": Magnitude(),
}


def adalora(
    rank: int = 6,
    target: int | float = 2,
    *,
    times: tuple[int, int, int, int] = (30, 5, 10, 1),
    metric: Any = None,
    gamma: float = 0.1,
) -> lrkit.Method:
    _, warmup, final, interval = times
    return lrkit.Method(
        parameterization=SVD(rank=rank, orthogonality=gamma),
        metric=metric or SensitivityUncertainty(),
        scheduler=Cubic(target=target, warmup=warmup, final=final, interval=interval),
        action=Prune(),
    )


def run_against_oracle(
    rig: Any, method: lrkit.Method, oracle: oracles.AdaLoRARun, total: int, optimizer_name: str, policy: int = 0
) -> int:
    """Trains, and checks every step of one policy. How many triplets came back."""
    metric, scheduler = method.policies[policy].metric, method.policies[policy].scheduler
    model, adapted = rig(method)
    assert list(adapted.adapters) == [n for n, m in model.named_modules() if m in set(adapted.adapters.values())]
    optimizer = OPTIMIZERS[optimizer_name](adapted.parameters())
    recorder = Recorder(adapted, optimizer)
    adapted.bind(optimizer, total_steps=total)
    after_step = metric.measure == "after-step"
    ranks = [adapter.core.numel() for adapter in adapted.adapters.values()]
    assert oracle.ranks == ranks
    kept, returned, decisions = [True] * sum(ranks), 0, 0
    for t in range(1, total + 1):
        loss = loss_of(model, t) + adapted.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decision = oracle.step(recorder.after_step() if after_step else recorder.before)
        updated = torch.cat([part["core"] for part in recorder.after.values()])
        now = cores(adapted)
        if t < total - scheduler.final and oracle.kind != "magnitude":
            np.testing.assert_allclose(
                list(adapted.scores(policy).values()), oracle.scores(), rtol=1e-4, err_msg=str(t)
            )
        for name, adapter in adapted.adapters.items():
            assert torch.equal(adapter.A, recorder.after[name]["A"]), "the mask touched Q"
            assert torch.equal(adapter.B, recorder.after[name]["B"]), "the mask touched P"
        if decision is None:
            if t < total - scheduler.final + (oracle.ending == "released") or oracle.ending == "open":
                assert torch.equal(now, updated), f"λ was masked at step {t}, where no decision is due"
            else:
                assert torch.equal(now, updated * torch.tensor(kept)), "the last mask does not hold"
            continue
        decisions += 1
        budget, scores = decision
        chosen = (now != 0).tolist()
        assert sum(chosen) == budget, (t, sum(chosen), budget)
        assert oracles.choices_agree(chosen, scores, budget), t
        assert torch.equal(now, updated * torch.tensor(chosen)), "a kept λ is not the optimizer's"
        history = [record for record in adapted.history if record.policy == policy]
        record = history[-1]
        assert (record.step, record.budget, record.kept) == (t, budget, budget)
        lost = sum(a and not b for a, b in zip(kept, chosen, strict=True))
        back = sum(b and not a for a, b in zip(kept, chosen, strict=True))
        assert (len(record.lost), len(record.returned)) == (lost, back)
        assert len(history) == decisions
        returned += back
        kept = chosen
    return returned


@pytest.mark.parametrize("times", SETTINGS, ids=str)
def test_oracle_in_bert(times: tuple[int, int, int, int]) -> None:
    """In BERT the masks at every step are the oracle's."""
    total, warmup, final, interval = times
    oracle = oracles.AdaLoRARun([4] * 12, 2, total=total, warmup=warmup, final=final, interval=interval)
    run_against_oracle(bert, adalora(4, 2, times=times), oracle, total, "adamw")


@pytest.mark.parametrize("times", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in METRICS if kind != "magnitude"])
def test_oracle_per_metric(kind: str, times: tuple[int, int, int, int]) -> None:
    """With every metric the masks are the oracle's."""
    total, warmup, final, interval = times
    oracle = oracles.AdaLoRARun([4] * 3, 2, total=total, warmup=warmup, final=final, interval=interval, kind=kind)
    run_against_oracle(toy, adalora(4, 2, times=times, metric=METRICS[kind]), oracle, total, "adam")


def test_magnitude_before_step() -> None:
    """S_i = abs(λ_i) of the weights as Algorithm 1 has them: before the update."""
    oracle = oracles.AdaLoRARun([4] * 3, 2, total=33, warmup=7, final=9, interval=4, kind="magnitude")
    run_against_oracle(toy, adalora(4, 2, times=(33, 7, 9, 4), metric=Magnitude()), oracle, 33, "adam")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_oracle_per_optimizer(optimizer: str) -> None:
    """With every optimizer the masks are the oracle's."""
    times = (40, 4, 10, 3)
    oracle = oracles.AdaLoRARun([4] * 3, 2, total=40, warmup=4, final=10, interval=3)
    run_against_oracle(toy, adalora(4, 2, times=times), oracle, 40, optimizer)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.5, 0.9), (0.9, 0.3)], ids=str)
def test_oracle_with_other_betas(betas: tuple[float, float]) -> None:
    """With other β₁ and β₂ the masks are the oracle's."""
    metric = SensitivityUncertainty(beta1=betas[0], beta2=betas[1])
    oracle = oracles.AdaLoRARun([4] * 3, 1, total=30, warmup=5, final=10, interval=1, beta1=betas[0], beta2=betas[1])
    run_against_oracle(toy, adalora(4, 1, metric=metric), oracle, 30, "adam")


@pytest.mark.parametrize("kind", METRICS)
def test_measured_after_step(kind: str) -> None:
    """Scores measured after the step, as in the released code, give the oracle's masks."""
    metric = attrs.evolve(METRICS[kind], measure="after-step")
    for interval in (1, 4):
        oracle = oracles.AdaLoRARun([4] * 3, 2, total=30, warmup=5, final=10, interval=interval, kind=kind)
        run_against_oracle(toy, adalora(4, 2, times=(30, 5, 10, interval), metric=metric), oracle, 30, "adam")


@pytest.mark.parametrize("times", [(30, 5, 10, 1), (33, 7, 9, 4), (40, 8, 12, 5)], ids=str)
@pytest.mark.parametrize("ending", ["fixed", "peft", "released", "open"])
def test_oracle_per_ending(ending: Any, times: tuple[int, int, int, int]) -> None:
    """With every ending the masks are the oracle's, up to the last step."""
    total, warmup, final, interval = times
    method = adalora(4, 2, times=times)
    assert method.scheduler is not None
    method = attrs.evolve(method, scheduler=attrs.evolve(method.scheduler, ending=ending))
    oracle = oracles.AdaLoRARun([4] * 3, 2, total=total, warmup=warmup, final=final, interval=interval, ending=ending)
    run_against_oracle(toy, method, oracle, total, "adam")


def test_released_ties_lose() -> None:
    """With score <= kthvalue nothing is kept if all scores are equal, and the best b if none are."""
    method = attrs.evolve(adalora(4, 2, times=(12, 2, 2, 1), gamma=0.0), action=Prune(ties="threshold"))
    _, adapted = toy(method)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=12)
    for _ in range(12):
        step_with(adapted, optimizer, lambda m, i: 0.0)
    assert [record.kept for record in adapted.history] == [0] * 8
    oracle = oracles.AdaLoRARun([4] * 3, 2, total=30, warmup=5, final=10, interval=2)
    method = attrs.evolve(adalora(4, 2, times=(30, 5, 10, 2)), action=Prune(ties="threshold"))
    run_against_oracle(toy, method, oracle, 30, "adam")


@pytest.mark.parametrize("final", [0, 1, 6])
def test_steps_from_zero(final: int) -> None:
    """The n-th step is number n - 1: the same choices by number, and the budget is reached or said to be out of reach."""
    total, warmup, interval = 20, 3, 4
    method = adalora(4, 1, times=(total, warmup, final, interval))
    assert method.scheduler is not None
    method = attrs.evolve(method, scheduler=attrs.evolve(method.scheduler, first_step=0))
    model, adapted = toy(method)
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.01)
    if not binds(adapted, optimizer, total):
        assert final == 0, "T - t_f = 20 is the number of no step; 19 and 14 are"
        return
    when = {"total": total, "warmup": warmup, "final": final}
    for n in range(1, total + 1):
        optimizer.zero_grad()
        (loss_of(model, n) + adapted.penalty()).backward()
        optimizer.step()
        if oracles.is_due(n - 1, **when, interval=interval):
            assert adapted.history[-1].step == n
            assert (cores(adapted) != 0).sum() == oracles.budget(n - 1, **when, b0=12, bT=3)
    due = [n for n in range(1, total + 1) if oracles.is_due(n - 1, **when, interval=interval)]
    assert [record.step for record in adapted.history][: len(due)] == due
    assert (cores(adapted) != 0).sum() == 3, "the run ended above its target, and nothing was said"


def test_final_phase_only() -> None:
    """If T - t_f = 0 the budget is b_T at every step, or the schedule is refused."""
    model, adapted = toy(adalora(4, 1, times=(10, 0, 10, 1)))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.01)
    if not binds(adapted, optimizer, 10):
        return
    for n in range(1, 11):
        optimizer.zero_grad()
        (loss_of(model, n) + adapted.penalty()).backward()
        optimizer.step()
        assert (cores(adapted) != 0).sum() == 3, n


def binds(adapted: Any, optimizer: torch.optim.Optimizer, total: int) -> bool:
    """False where bind refuses or warns: it said so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            adapted.bind(optimizer, total_steps=total)
        except (LrkitError, LrkitWarning):
            return False
    return True


def test_gradients_not_finite() -> None:
    """A gradient that is not finite leaves the statistics as they were."""
    _, adapted = toy(adalora(4, 2, times=(20, 10, 2, 1), gamma=0.0))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=20)
    for _ in range(3):
        step_with(adapted, optimizer, lambda m, i: m + i + 1.0)
    before = adapted.scores()
    weights = [p.detach().clone() for p in adapted.parameters()]
    for bad in (float("nan"), float("inf"), float("-inf")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step_with(adapted, optimizer, lambda m, i, bad=bad: bad if (m, i) == (1, 2) else 1.0)
        with torch.no_grad():
            for p, weight in zip(adapted.parameters(), weights, strict=True):
                p.copy_(weight)
        assert adapted.scores() == before
    step_with(adapted, optimizer, lambda m, i: 1.0)
    assert adapted.scores() != before


@pytest.mark.parametrize("measure", ["before-step", "after-step"])
@pytest.mark.parametrize("first", ["prune", "freeze"])
def test_oracle_while_freezing(first: str, measure: Any) -> None:
    """AFLoRA's §8, prune and freeze in one run: a matrix that froze keeps the score of its last gradient."""
    total = 40
    freeze = lrkit.Policy(
        metric=GradientUncertainty(), scheduler=Cubic(target=0.0, warmup=3, final=12), action=Freeze()
    )
    prune = lrkit.Policy(
        metric=SensitivityUncertainty(measure=measure),
        scheduler=Cubic(target=1, warmup=5, final=4, interval=2),
        action=Prune(),
    )
    main, other = (prune, freeze) if first == "prune" else (freeze, prune)
    method = lrkit.Method(
        parameterization=SVD(rank=4),
        metric=main.metric,
        scheduler=main.scheduler,
        action=main.action,
        also=(other,),
    )
    oracle = oracles.AdaLoRARun([4] * 3, 1, total=total, warmup=5, final=4, interval=2)
    run_against_oracle(toy, method, oracle, total, "adam", policy=method.policies.index(prune))


def test_triplets_come_back() -> None:
    """In a real run some triplets come back; otherwise the tests above say nothing about it."""
    times = (60, 5, 10, 4)
    oracle = oracles.AdaLoRARun([4] * 3, 2, total=60, warmup=5, final=10, interval=4)
    assert run_against_oracle(toy, adalora(4, 2, times=times, gamma=0.5), oracle, 60, "adam") > 0


# ---------------------------------------------------------------- hand-made gradients: no forward pass


def step_with(adapted: Any, optimizer: torch.optim.Optimizer, size: Any) -> None:
    """One optimizer step in which component i of adapter m has gradient size(m, i) everywhere."""
    optimizer.zero_grad()
    for m, adapter in enumerate(adapted.adapters.values()):
        row = torch.tensor([float(size(m, i)) for i in range(adapter.core.numel())])
        adapter.core.grad = row.clone()
        adapter.A.grad = row[:, None].expand_as(adapter.A).clone()
        adapter.B.grad = row[None, :].expand_as(adapter.B).clone()
    optimizer.step()


@pytest.mark.parametrize("interval", [1, 3])
def test_rising_score_comes_back(interval: int) -> None:
    """A masked triplet comes back when its score rises above the others'."""
    method = lrkit.Method(
        parameterization=SVD(rank=4, orthogonality=0.0),
        metric=SensitivityUncertainty(),
        scheduler=Constant(target=2, interval=interval),
        action=Prune(),
    )
    _, adapted = toy(method)
    rate, loud = 2.0**-7, 2.0**10  # powers of two: the expected update is exact
    optimizer = torch.optim.SGD(adapted.parameters(), lr=rate)
    adapted.bind(optimizer, total_steps=60)
    name, adapter = next(iter(adapted.adapters.items()))
    quiet = (0, 0)

    for _ in range(12):
        step_with(adapted, optimizer, lambda m, i: 0.0 if (m, i) == quiet else 0.1)
    assert adapter.core[0] == 0, "the triplet without gradients should have lost"
    p, q = adapter.B[:, 0].clone(), adapter.A[0].clone()
    assert p.abs().min() > 0 and q.abs().min() > 0

    back = None
    for t in range(13, 31):
        want_p, want_q = adapter.B[:, 0] - rate * loud, adapter.A[0] - rate * loud
        step_with(adapted, optimizer, lambda m, i: loud if (m, i) == quiet else 0.1)
        assert torch.equal(adapter.B[:, 0], want_p) and torch.equal(adapter.A[0], want_q), "P or Q was masked"
        if back is None and adapter.core[0] != 0 and t % interval == 0:
            back = t
            assert any(name in unit for unit in adapted.history[-1].returned), adapted.history[-1]
    assert back is not None, "its score rose and it did not come back"
    assert (cores(adapted) != 0).sum() == 6


def test_lambda_regrows() -> None:
    """Magnitude sees nothing but λ: with ΔT = 1 a masked λ has one step to regrow, and a large gradient is enough."""
    method = lrkit.Method(
        parameterization=SVD(rank=3, orthogonality=0.0),
        metric=Magnitude(measure="after-step"),
        scheduler=Constant(target=1, interval=4),
        action=Prune(),
    )
    _, adapted = toy(method)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=20)
    winner = [(m, 0) for m in range(3)]
    for _ in range(4):
        step_with(adapted, optimizer, lambda m, i: 1.0 if (m, i) in winner else 0.1)
    assert [a.core.ne(0).tolist() for a in adapted.adapters.values()] == [[True, False, False]] * 3
    for _ in range(4):  # now the third of each layer moves fastest, from zero
        step_with(adapted, optimizer, lambda m, i: {0: 0.0, 1: 0.0, 2: 9.0}[i])
    assert [a.core.ne(0).tolist() for a in adapted.adapters.values()] == [[False, False, True]] * 3
    assert len(adapted.history[-1].returned) == 3


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("gradient", [0.0, 1.0], ids=["all zero", "all one"])
def test_ties_keep_budget(interval: int, gradient: float) -> None:
    """If all scores are equal, exactly the budget is kept. (score <= kthvalue would keep none.)"""
    total, warmup, final = 24, 4, 6
    method = adalora(4, 1, times=(total, warmup, final, interval), gamma=0.0)
    _, adapted = toy(method)
    # as momentum never moves them apart, entries stay equal within a part
    with torch.no_grad():
        for adapter in adapted.adapters.values():
            adapter.A.fill_(1.0), adapter.B.fill_(1.0), adapter.core.fill_(5.0)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.0)
    adapted.bind(optimizer, total_steps=total)
    when = {"total": total, "warmup": warmup, "final": final}
    seen = []
    for t in range(1, total + 1):
        if not oracles.is_due(t, **when, interval=interval):
            step_with(adapted, optimizer, lambda m, i: gradient)
            continue
        before = cores(adapted)
        step_with(adapted, optimizer, lambda m, i: gradient)
        budget = oracles.budget(t, **when, b0=12, bT=3)
        decision = adapted.history[-1]
        assert (decision.step, decision.budget, decision.kept) == (t, budget, budget)
        active = cores(adapted) != 0
        assert active.sum() <= budget
        if gradient == 0.0:  # every score is zero: the lower index is kept first
            assert active.tolist() == [True] * budget + [False] * (12 - budget)
        elif torch.equal(before != 0, torch.ones(12, dtype=torch.bool)):
            assert active.sum() == budget
        seen.append(t)
    assert seen and len(adapted.history) == len(seen)


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(2, 30),
    st.sampled_from(["zero", "one", "few", "random"]),
    st.data(),
)
@settings(max_examples=40)
def test_budget_is_the_most(seed: int, rank: int, total: int, kind: str, data: st.DataObject) -> None:
    """Whatever the schedule, never more components are active than the budget allows."""
    end = data.draw(st.integers(1, total))
    warmup, interval = data.draw(st.integers(0, end - 1)), data.draw(st.integers(1, 6))
    target = data.draw(st.integers(0, rank))
    when = {"total": total, "warmup": warmup, "final": total - end}
    _, adapted = toy(adalora(rank, target, times=(total, warmup, total - end, interval), gamma=0.0), seed)
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.01)
    recorder = Recorder(adapted, optimizer)
    adapted.bind(optimizer, total_steps=total)
    oracle = oracles.AdaLoRARun([rank] * 3, target, **when, interval=interval)
    random = np.random.default_rng(seed)
    for t in range(1, total + 1):
        sizes = {
            "zero": np.zeros((3, rank)),
            "one": np.ones((3, rank)),
            "few": random.integers(0, 2, (3, rank)),
            "random": random.normal(size=(3, rank)),
        }[kind]
        step_with(adapted, optimizer, lambda m, i, sizes=sizes: sizes[m, i])
        decision = oracle.step(recorder.before)
        active = (cores(adapted) != 0).tolist()
        if decision is not None:
            budget, scores = decision
            assert sum(active) <= budget
            assert adapted.history[-1].budget == adapted.history[-1].kept == budget
            moving = [bool(x) for x in torch.cat([p["core"] for p in recorder.after.values()])]
            chosen = oracles.keep_top(scores, budget)
            if kind == "random" and sum(active) == budget:
                assert oracles.choices_agree(active, scores, budget), t
            elif kind == "zero":
                assert active == [a and b for a, b in zip(chosen, moving, strict=True)]
        if t >= end:
            assert sum(active) <= target * 3
    assert adapted.history[-1].step == end


def test_masked_components_are_silent() -> None:
    """P and Q of a masked component change no output, however large they are."""
    _, adapted = toy(adalora(4, 1, times=(10, 0, 0, 1)))
    model, optimizer = adapted.model, torch.optim.Adam(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=10)
    for t in range(1, 11):
        optimizer.zero_grad()
        (loss_of(model, t) + adapted.penalty()).backward()
        optimizer.step()
    x = torch.randn(3, 6)
    out = model(x)
    for adapter in adapted.adapters.values():
        dead = adapter.core == 0
        with torch.no_grad():
            adapter.A[dead] = 1e6
            adapter.B[:, dead] = 1e6
    assert torch.equal(model(x), out)


def test_prune_drops_no_state() -> None:
    """Prune drops no optimizer state and freezes nothing: masked components go on training."""
    model, adapted = toy(adalora(4, 1, times=(12, 0, 2, 1)))
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=12)
    for t in range(1, 13):
        optimizer.zero_grad()
        (loss_of(model, t) + adapted.penalty()).backward()
        optimizer.step()
    assert not Prune.final
    for adapter in adapted.adapters.values():
        for p in (adapter.A, adapter.B, adapter.core):
            assert p.requires_grad and p in optimizer.state


def test_penalty_is_equation_four() -> None:
    """The penalty is γ times Eq. 4, or γ times the mean norm."""
    for norm, oracle in (("squared", oracles.orthogonality_squared), ("mean", oracles.orthogonality_mean)):
        method = lrkit.Method(parameterization=SVD(rank=3, orthogonality=0.3, orthogonality_norm=norm))
        _, adapted = toy(method)
        factors = []
        for adapter in adapted.adapters.values():
            factors += [adapter.B.detach().double().numpy().T, adapter.A.detach().double().numpy()]
        assert float(adapted.penalty().detach()) == pytest.approx(0.3 * oracle(factors), rel=1e-5)
    _, adapted = toy(attrs.evolve(method, parameterization=SVD(rank=3, orthogonality=0.0)))
    assert float(adapted.penalty().detach()) == 0


def test_other_cores() -> None:
    """Prune masks any core, under any schedule: AFLoRA's d too."""
    total = 20
    method = lrkit.Method(
        parameterization=VectorScaled(rank=4, train="both"),
        metric=GradientUncertainty(),
        scheduler=Linear(target=1, warmup=2, final=4),
        action=Prune(),
    )
    model, adapted = bert(method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=total)
    for t in range(1, total + 1):
        optimizer.zero_grad()
        (loss_of(model, t) + adapted.penalty()).backward()
        optimizer.step()
        if t > 2:
            assert (cores(adapted) != 0).sum() == int(48 + (12 - 48) * min(1.0, (t - 2) / 14)), t
