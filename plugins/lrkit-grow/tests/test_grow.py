"""Who grows, what it leaves alone, that it is counted, and that a growing run is resumed to the bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import lrkit_grow
import models
import numpy as np
import pytest
import rigs
import torch
from command_line import ask
from hypothesis import given, settings
from hypothesis import strategies as st
from lrkit_grow import Exchange, Grow, LateCubic, NormShare
from torch import nn

import lrkit
from lrkit.actions import Ballot
from lrkit.registry import Registry
from lrkit.testing import ActionContract, MethodContract, MetricContract, SchedulerContract, only

RISING = lrkit.schedulers.Linear(start=1, target=4, warmup=2, final=3, interval=2)
FROM_NOTHING = lrkit.Allocation({rigs.TOY_TARGETS[0]: 0, "*": 2}).on(rigs.Toy(), rigs.TOY_TARGETS)
METHODS: dict[str, lrkit.Method] = {
    "increlora": lrkit_grow.increlora(target_rank=4, warmup=2, final=3, interval=2),
    "increlora, h": lrkit_grow.increlora(target_rank=2, modules=2, warmup=1, final=2, interval=1),
    "increlora, one layer from nothing": lrkit_grow.increlora(
        rank=FROM_NOTHING, target_rank=4, warmup=2, final=3, interval=1
    ),
    "elalora": lrkit_grow.elalora(rank=3, count=2, warmup=2, final=3, interval=2),
    "on LoRA": attrs.evolve(
        lrkit.methods.lora(rank=1), metric=lrkit.metrics.Sensitivity(), scheduler=RISING, action=Grow()
    ),
    "on vectors, with freezing": attrs.evolve(
        lrkit.methods.aflora(rank=1, train="both", warmup=5, final=2),
        also=(lrkit.Policy(metric=lrkit.metrics.SensitivityUncertainty(), scheduler=RISING, action=Grow()),),
    ),
    "on vectors, one layer from nothing": attrs.evolve(
        lrkit.methods.aflora(rank=FROM_NOTHING, train="both", warmup=5, final=2),
        also=(lrkit.Policy(metric=lrkit.metrics.SensitivityUncertainty(), scheduler=RISING, action=Grow()),),
    ),
    "with pruning": attrs.evolve(
        lrkit.methods.adalora(rank=2, target_rank=1, warmup=1, final=4, interval=1),
        also=(
            lrkit.Policy(
                metric=lrkit.metrics.GradientUncertainty(), scheduler=attrs.evolve(RISING, start=2), action=Grow()
            ),
        ),
    ),
}
STEPS = 14


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with only(lrkit_grow, distribution="lrkit-grow 0.2.0") as made:
        yield made


class TestGrow(ActionContract):
    component = (Grow(), Grow(modules=2, rank=2, core=0.0, by="sum"))
    exact = False


class TestExchange(ActionContract):
    component = Exchange(count=2)
    exact = False


class TestNormShare(MetricContract):
    component = (NormShare(), NormShare(measure="before-step"))


class TestLateCubic(SchedulerContract):
    component = LateCubic()


class TestIncreLoRA(MethodContract):
    component = staticmethod(lrkit_grow.increlora)


class TestElaLoRA(MethodContract):
    component = staticmethod(lrkit_grow.elalora)


class TestDynamicDoRA(MethodContract):
    component = staticmethod(lrkit_grow.dynamic_dora)


# ---- who grows ----


def ballot_of(scores: list[list[float]], budget: int) -> tuple[Ballot, list[lrkit.Block]]:
    flat = torch.tensor([s for layer in scores for s in layer])
    where = torch.tensor([i for i, layer in enumerate(scores) for _ in layer])
    n = len(flat)
    blocks = [lrkit.Block(f"layer{i}", nn.Module(), (), len(layer), "component") for i, layer in enumerate(scores)]
    everyone = torch.ones(n, dtype=torch.bool)
    ones = torch.ones(n, dtype=torch.long)
    return Ballot(flat, everyone, budget, budget / n, flat, ones, where, layers=len(scores)), blocks


def oracle(scores: list[list[float]], budget: int, cut: int, most: int | None, each: int) -> tuple[Any, list[int]]:
    """Plain Python: cut the lowest one by one, then deal out to the layers by their mean."""
    there = [[(s, i, j) for j, s in enumerate(layer)] for i, layer in enumerate(scores)]
    for _ in range(max(cut, sum(map(len, scores)) - budget)):
        free = [unit for layer in there if len(layer) > 1 for unit in layer]
        if not free:
            break
        worst = min(free, key=lambda u: (u[0], -u[1], -u[2]))
        there[worst[1]].remove(worst)
    room = max(0, budget - sum(map(len, there)))
    if most is not None:
        room = min(room, min(most, len(there)) * each)
    ranking = sorted(range(len(there)), key=lambda i: (-float(np.mean([u[0] for u in there[i]])), i))
    fresh = [0] * len(there)
    while room:
        for i in ranking:
            given_ = min(each, room)
            fresh[i] += given_
            room -= given_
    return [[j for _, _, j in sorted(layer, key=lambda u: u[2])] for layer in there], fresh


@settings(max_examples=200)
@given(
    scores=st.lists(st.lists(st.integers(0, 6).map(float), min_size=1, max_size=4), min_size=1, max_size=5),
    budget=st.integers(1, 20),
    most=st.none() | st.integers(1, 6),
    each=st.integers(1, 3),
    cut=st.none() | st.integers(1, 5),
)
def test_who_goes_and_who_grows(
    scores: list[list[float]], budget: int, most: int | None, each: int, cut: int | None
) -> None:
    action = Grow(modules=most, rank=each) if cut is None else Exchange(count=cut)
    ballot, _ = ballot_of(scores, budget)
    verdict = action.decide(ballot)
    kept = verdict.kept
    stays, fresh = oracle(scores, budget, cut or 0, most if cut is None else None, each if cut is None else 1)
    got = [piece.nonzero().flatten().tolist() for piece in torch.split(kept, [len(layer) for layer in scores])]
    assert (got, list(verdict.fresh)) == (stays, fresh)
    units, layers = int(ballot.candidates.sum()), len(scores)
    assert action.turnover(units, budget, layers) == (units - int(kept.sum()), sum(verdict.fresh))


def test_the_mean_and_the_sum_differ() -> None:
    ballot, _ = ballot_of([[3.0], [2.0, 2.0]], budget=4)
    for action, fresh in ((Grow(), (1, 0)), (Grow(by="sum"), (0, 1))):
        verdict = action.decide(ballot)
        assert verdict.kept.all()
        assert verdict.fresh == fresh


@settings(max_examples=15)
@given(
    rank=st.integers(1, 3),
    target=st.integers(1, 5),
    total=st.integers(4, 12),
    interval=st.integers(1, 3),
    action=st.sampled_from([Grow(), Grow(modules=1), Grow(modules=2, rank=2), Exchange(count=1), Exchange(count=3)]),
)
@pytest.mark.filterwarnings("ignore:.*after the last decision:lrkit.LrkitWarning")
def test_there_are_never_more_than_the_budget(
    rank: int, target: int, total: int, interval: int, action: lrkit.Action
) -> None:
    if rank == 1 and isinstance(action, Exchange):
        return
    method = attrs.evolve(
        lrkit_grow.increlora(rank=rank),
        scheduler=attrs.evolve(RISING, start=rank, target=target, interval=interval, warmup=1, final=1),
        action=action,
    )
    _, adapted = rigs.toy(method)
    optimizer = torch.optim.Adam(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=total)
    spans, before = adapted.controller.policies[0].course(), adapted.controller.ranks.now()
    course = [there for times, there, _, _ in spans for _ in range(times)]
    there_are = set(adapted.scores())
    given = set(there_are)
    for step in range(total):
        (rigs.loss_of(adapted.model, step) + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        there = sum(adapted.controller.ranks.now().values())
        assert there == course[step + 1], "as it was forecast"
        if adapted.history and adapted.history[-1].step == step + 1:
            decision = adapted.history[-1]
            assert decision.kept == there <= max(decision.budget, len(adapted.adapters))
            assert len(decision.fresh) == there - (sum(before.values()) - len(decision.lost))
            assert not given & set(decision.fresh), "no name is given twice"
            given |= set(decision.fresh)
            there_are = there_are - set(decision.lost) | set(decision.fresh)
            assert set(adapted.controller.policies[0].unit_names) == there_are
        before = adapted.controller.ranks.now()


# ---- what it leaves alone ----


def grown(core: float, optimizer_class: Any = torch.optim.AdamW) -> Any:
    """A toy run up to the first growth, and what it was just before."""
    method = attrs.evolve(METHODS["increlora"], action=Grow(core=core))
    model, adapted = rigs.toy(method)
    optimizer = optimizer_class(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(4):
        (rigs.loss_of(model, step) + adapted.penalty()).backward()
        if step == 3:
            # The same step without lrkit's part, on copies.
            adapted._binding._steps._handles[1].remove()
            optimizer.step()
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
            before = {
                "out": model(x).detach(),
                "data": {n: p.detach().clone() for n, p in adapted.named_parameters()},
                "state": {n: copy.deepcopy(optimizer.state[p]) for n, p in adapted.named_parameters()},
                "ids": [id(p) for p in adapted.parameters()],
                "buffers": [b.clone() for b in adapted.controller.policies[0].statistics.buffers.values()],
                "scores": adapted.scores(),
                "x": x,
            }
            adapted._binding._after_step(optimizer)
            return model, adapted, optimizer, before
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adafactor])
def test_what_is_there_stays_and_what_is_new_begins_at_zero(optimizer_class: Any) -> None:
    _model, adapted, optimizer, before = grown(0.0, optimizer_class)
    (decision,) = adapted.history
    assert decision.fresh and not decision.lost
    axes = {"A": 0, "B": 1, "core": 0}
    assert [id(p) for p in adapted.parameters()] == before["ids"]
    changed = 0
    for name, p in adapted.named_parameters():
        old, axis = before["data"][name], axes[name.rpartition(".")[2]]
        n = old.shape[axis]
        assert torch.equal(p.detach().narrow(axis, 0, n), old)
        changed += p.shape[axis] - n
        for key, value in optimizer.state[p].items():
            was = before["state"][name][key]
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                assert torch.equal(value.narrow(axis, 0, n), was)
                assert not value.narrow(axis, n, p.shape[axis] - n).any()
            else:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(was)), "step counts go on"
    assert changed == 3 * len(decision.fresh)
    now = adapted.scores()
    assert {k: now[k] for k in before["scores"]} == pytest.approx(before["scores"])
    assert all(now[name] == 0 for name in decision.fresh)


def test_outputs_change_by_the_new_components_alone() -> None:
    model, _, _, before = grown(0.0)
    torch.testing.assert_close(model(before["x"]), before["out"], rtol=0, atol=0)
    model, adapted, _, before = grown(0.5)
    fresh = {name.split("[")[0] for name in adapted.history[0].fresh}
    for name, adapter in adapted.adapters.items():
        old = [before["data"][f"{name}.{part}"].double() for part in ("B", "core", "A")]
        new = (adapter.B.detach().double() * adapter.core.detach().double()) @ adapter.A.detach().double()
        difference = new - (old[0] * old[1]) @ old[2]
        rank = torch.linalg.matrix_rank(difference, rtol=1e-6).item()
        assert rank == (1 if name in fresh else 0)
        if name in fresh:
            want = 0.5 * torch.outer(adapter.B[:, -1], adapter.A[-1]).double()
            torch.testing.assert_close(difference, want, rtol=1e-5, atol=1e-9)
    assert not torch.equal(model(before["x"]), before["out"])


def test_new_vectors_begin_as_the_first_ones_did() -> None:
    method = attrs.evolve(METHODS["increlora"], parameterization=lrkit.parameterizations.SVD(rank=1, init_std=0.3))
    model = models.make("bert")
    adapted = lrkit.attach(model, method)
    module = next(iter(adapted.adapters.values()))
    new = method.parameterization.fresh(module, 200, torch.Generator().manual_seed(0), {})
    drawn = [new[part.name] for part in method.parameterization.parts[1:]]
    for one in drawn:
        assert one.std().item() == pytest.approx(0.3, rel=0.05) and abs(one.mean().item()) < 0.02
    assert not torch.equal(drawn[0].flatten()[:32], drawn[1].flatten()[:32]) or drawn[0].shape != drawn[1].shape


# ---- resume ----


def run(method: lrkit.Method, seed: int = 0) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = rigs.Toy()
    torch.manual_seed(seed)  # the model is the same, the adapters' start is not
    adapted = lrkit.attach(model, method, targets=rigs.TOY_TARGETS, train_also=())
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.1)
    return model, adapted, optimizer


def steps(model: nn.Module, adapted: Any, optimizer: torch.optim.Optimizer, end: int) -> None:
    for step in range(adapted.step, end):
        loss = rigs.loss_of(model, step)
        (loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:.*after the last decision:lrkit.LrkitWarning")
def test_a_growing_run_resumes_to_the_bit(name: str, bound: bool, tmp_path: Path) -> None:
    model, adapted, optimizer = run(METHODS[name])
    adapted.bind(optimizer, total_steps=STEPS)
    saved = {}
    for at in range(0, STEPS + 1, 3):
        steps(model, adapted, optimizer, at)
        adapted.save(tmp_path / str(at))
        saved[at] = copy.deepcopy(optimizer.state_dict())
    steps(model, adapted, optimizer, STEPS)
    end = adapted.state_dict()
    assert any(decision.fresh for decision in adapted.history)
    fresh = [unit for decision in adapted.history for unit in decision.fresh]
    first = {f"{layer}[{i}]" for layer, rank in adapted.controller.run.ranks.items() for i in range(rank)}
    assert len(first | set(fresh)) == len(first) + len(fresh), "no name is given twice"
    for at, state in saved.items():
        again, other, second = run(METHODS[name], seed=7)
        if bound:
            other.bind(second, total_steps=STEPS)
            steps(again, other, second, 5)  # somewhere else, and of other shapes
        other.load_state_dict(lrkit.adapt.checkpoint.read(tmp_path / str(at)))
        if not bound:
            other.bind(second, total_steps=STEPS)
        second.load_state_dict(copy.deepcopy(state))
        steps(again, other, second, STEPS)
        theirs = other.state_dict()
        assert theirs["meta"] == end["meta"], at
        assert all(torch.equal(t, theirs["tensors"][key]) for key, t in end["tensors"].items()), at
        for one, two in zip(
            optimizer.state_dict()["state"].values(), second.state_dict()["state"].values(), strict=True
        ):
            assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one)


def test_the_trainer_resumes_to_the_bit(tmp_path: Path) -> None:
    from test_trainer import trainer

    method = lrkit_grow.increlora(target_rank=3, warmup=2, final=4, interval=2)
    t, adapted = trainer("bert", method, tmp_path, max_steps=14, save_strategy="steps", save_steps=4)
    t.train()
    for at in (4, 8):
        again, other = trainer("bert", method, tmp_path, max_steps=14)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert other.history == adapted.history
        theirs = other.state_dict()["tensors"]
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in adapted.state_dict()["tensors"].items())


# ---- the whole ----


@pytest.mark.parametrize("name", ["increlora", "elalora"])
def test_it_trains_is_counted_saved_and_merged(name: str, tmp_path: Path) -> None:
    # Ten steps between decisions, as the card says: a component that is exchanged at once has learnt nothing.
    scheduler = attrs.evolve(METHODS[name].scheduler, interval=10)  # type: ignore[type-var]
    method = attrs.evolve(METHODS[name], scheduler=scheduler)
    model, adapted, optimizer = run(method)
    start = adapted.summary().now
    sizes = {n: m.d_in + m.d_out + 1 for n, m in adapted.adapters.items()}
    adapted.bind(optimizer, total_steps=120)
    seen = []

    def mean_loss() -> float:
        with torch.no_grad():
            return float(np.mean([rigs.loss_of(model, step).item() for step in range(60)]))

    untrained = mean_loss()
    for step in range(120):
        seen.append(sum(sizes[n] * r for n, r in adapted.controller.ranks.now().items()))
        steps(model, adapted, optimizer, step + 1)
    summary = adapted.summary()
    assert mean_loss() < 0.95 * untrained
    assert summary.now == sum(p.numel() for p in adapted.adapter_parameters())
    assert summary.average == pytest.approx(np.mean(seen))
    assert (summary.now > 2 * start) == (name == "increlora")
    assert {x.name: x.rank for x in summary.layers} == adapted.controller.ranks.now()
    assert sum(x.rank or 0 for x in summary.layers) == (12 if name == "increlora" else 9)
    x = torch.randn(5, 6)
    out = model(x)
    adapted.save(tmp_path)
    _, fresh = rigs.toy(method)
    torch.testing.assert_close(lrkit.load(fresh.detach(), tmp_path).model(x), out)
    torch.testing.assert_close(adapted.merge()(x), out, rtol=1e-4, atol=1e-6)


def test_the_command_line_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = ask(capsys, "params", "increlora", "--model", "deberta-v3-base")["methods"]["increlora"]
    # 72 matrices, one component 165,888 parameters over all of them, and 72 core values.
    assert told["start"] == 165_888 + 72
    assert told["end"] == pytest.approx(8 * (165_888 + 72))
    # From one to eight in a straight line between 0.1 and 0.6 of the run: 0.1 x 1 + 0.5 x 4.5 + 0.4 x 8.
    assert told["average"] / (165_888 + 72) == pytest.approx(5.55, rel=0.02)


def test_what_cannot_grow_is_refused() -> None:
    full = attrs.evolve(lrkit.methods.lora(rank=1), metric=lrkit.metrics.Sensitivity(), scheduler=RISING, action=Grow())
    for parameterization in (
        lrkit.parameterizations.Full(),
        lrkit.parameterizations.VectorScaled(train="none", shared=True),
    ):
        with pytest.raises(lrkit.LrkitError, match=r"Grow\(.*does not say how a new one begins"):
            attrs.evolve(full, parameterization=parameterization)
    with pytest.raises(lrkit.LrkitError, match="nothing to exchange at rank 1"):
        lrkit_grow.elalora(rank=1)
    with pytest.raises(lrkit.LrkitError, match=r"above start = 1.*Prune\(.*adds no units"):
        attrs.evolve(lrkit_grow.increlora(), action=lrkit.actions.Prune())
    with pytest.raises(lrkit.LrkitError, match=r"whole components.*matrix"):
        attrs.evolve(lrkit_grow.dynamic_dora(), action=lrkit.actions.Freeze())


def test_ranks_without_sizes_are_refused() -> None:
    """IncreLoRA's budget begins with all components that there are, which a table of patterns does not know."""
    assert lrkit_grow.increlora(rank=FROM_NOTHING, target_rank=4).scheduler.start == FROM_NOTHING.total / 12
    with pytest.raises(lrkit.LrkitError, match="does not know its layers"):
        lrkit_grow.increlora(rank={"*": 1})
    with pytest.raises(lrkit.LrkitError, match="begins with 4 components, above the target of 3"):
        lrkit_grow.increlora(rank=FROM_NOTHING, target_rank=1)


def test_a_budget_that_will_not_be_reached_is_said() -> None:
    _, adapted, optimizer = run(METHODS["increlora, h"])
    with pytest.warns(lrkit.LrkitWarning, match="there will be 5 components of a budget of 6"):
        adapted.bind(optimizer, total_steps=4)


# ---- norm share ----


@pytest.mark.parametrize("measure", ["before-step", "after-step"])
def test_shares_are_the_norms_of_the_products(measure: Any) -> None:
    method = attrs.evolve(lrkit_grow.dynamic_dora(rank=3, target_rank=2), metric=NormShare(measure=measure))
    model, adapted = rigs.toy(method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    adapted.bind(optimizer, total_steps=100)
    for step in range(3):
        before = {n: [p.detach().double() for p in (m.B, m.core, m.A)] for n, m in adapted.adapters.items()}
        before = {n: [p.clone() for p in ps] for n, ps in before.items()}
        rigs.loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = adapted.scores()
    for name, adapter in adapted.adapters.items():
        now = [p.detach().double() for p in (adapter.B, adapter.core, adapter.A)]
        b, core, a = before[name] if measure == "before-step" else now
        whole = torch.linalg.norm((b * core) @ a)
        for i in range(3):
            share = torch.linalg.norm(core[i] * torch.outer(b[:, i], a[i])) / whole
            assert scores[f"{name}[{i}]"] == pytest.approx(share.item(), rel=1e-5)


def test_the_late_cubic_is_late() -> None:
    late = LateCubic(target=0.0)
    budgets = [late.budget(t, total_steps=8, units=512, layers=1) for t in (0, 4, 7, 8)]
    assert budgets == [512, 512 - 64, 512 - 343, 0]


def test_a_ballot_that_is_read_after_the_run_is_that_of_its_decision():
    kept = []

    @attrs.frozen(kw_only=True)
    class Keeps(type(lrkit_grow.increlora().action)):
        def decide(self, ballot):
            kept.append(ballot)
            return super().decide(ballot)

    method = lrkit_grow.increlora(rank=1, target_rank=3)
    settings = {f.name: getattr(method.action, f.name) for f in attrs.fields(type(method.action))}
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    adapted = lrkit.attach(model, attrs.evolve(method, action=Keeps(**settings)), targets=["0", "1"])
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=12)
    for _ in range(12):
        (model(torch.randn(4, 6)).square().sum() + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    sizes = [len(ballot.scores) for ballot in kept]
    assert len(set(sizes)) > 1
    assert [len(ballot.parts) for ballot in kept] == [len(ballot.blocks) for ballot in kept] == sizes
