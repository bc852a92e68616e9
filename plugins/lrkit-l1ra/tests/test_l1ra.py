"""L1RA: its step against the minimisation that defines it, its moves against the released rule, whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import lrkit_l1ra
import models
import numpy as np
import pytest
import rigs
import torch
from command_line import ask
from hypothesis import given, settings
from hypothesis import strategies as st
from lrkit_l1ra import RankVectorLoRA, Reassign, Shrink

import lrkit
from lrkit.actions import Ballot
from lrkit.registry import Registry
from lrkit.testing import ActionContract, MethodContract, ParameterizationContract, only, resumes


@pytest.fixture(autouse=True)
def registry() -> Iterator[Registry]:
    with only(lrkit_l1ra, distribution="lrkit-l1ra 0.2.0") as made:
        yield made


class TestRankVectorLoRA(ParameterizationContract):
    component = RankVectorLoRA(rank=3, dropout=0.1)


class TestShrink(ActionContract):
    component = Shrink(strength=20.0)
    exact = False


class TestReassign(ActionContract):
    component = Reassign()
    exact = False


class TestL1RA(MethodContract):
    component = staticmethod(lrkit_l1ra.l1ra)


# ---- the L1 step ----

number = st.floats(-2, 2, allow_nan=False, width=32)


@settings(deadline=None)
@given(st.lists(number, min_size=4, max_size=4), st.floats(0, 2), st.floats(0.05, 2))
def test_shrinks_to_the_minimum(values: list[float], strength: float, most: float) -> None:
    """argmin of (x - v)² / 2 + η λ x over 0 ≤ x ≤ most: no point of a fine grid is better."""
    core = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
    module = torch.nn.Module()
    module.core = core
    block = lrkit.Block("layer", module, (lrkit.Part("core", axis=0, core=True),), 4, "component")
    optimizer = torch.optim.SGD([core], lr=0.5)
    stands = Shrink(strength=strength, most=most).proximal([block], 1.0, optimizer)
    grid = np.linspace(0, most, 2001)
    for v, found, there in zip(values, core.tolist(), stands.tolist(), strict=True):

        def objective(x: Any, v: float = v) -> Any:
            return (np.asarray(x) - v) ** 2 / 2 + 0.5 * strength * np.asarray(x)

        assert 0 <= found <= most and there == (found != 0)
        assert objective(found) <= objective(grid).min() + 1e-9


# ---- who moves ----


def ballot_of(scores: list[list[float]]) -> Ballot:
    flat = torch.tensor([s for layer in scores for s in layer])
    where = torch.tensor([i for i, layer in enumerate(scores) for _ in layer])
    everyone = torch.ones(len(flat), dtype=torch.bool)
    ones = torch.ones(len(flat), dtype=torch.long)
    return Ballot(flat, everyone, len(flat), 1.0, flat, ones, where, layers=len(scores))


def released(scores: list[list[float]], exclude: bool) -> tuple[list[list[int]], list[int]]:
    """``update_ranks`` of the released code, on plain lists: what each layer keeps, and what it gets."""
    ranks, spare, least, pruned = [list(range(len(layer))) for layer in scores], 0, [], []
    for i, layer in enumerate(scores):
        go = [j for j, c in enumerate(layer) if c < 1e-10]
        least.append(min(layer))
        if go:
            pruned.append(i)
            if len(go) == len(layer):
                go = go[:-1]
            spare += len(go)
        for j in reversed(go):
            del ranks[i][j]
    grow = sorted(range(len(scores)), key=lambda i: least[i], reverse=True)
    if exclude:
        grow = [i for i in grow if i not in pruned]
    fresh, i = [0] * len(scores), 0
    if grow:
        for _ in range(spare):
            if i >= len(grow):
                i = 0
            fresh[grow[i]] += 1
            i += 1
    return ranks, fresh


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=4), min_size=1, max_size=5),
    st.booleans(),
)
def test_moves_as_released_code(scores: list[list[float]], exclude: bool) -> None:
    """What is zero goes, a layer's last stays, and as many come to the layers with the highest smallest c."""
    verdict = Reassign(exclude_pruned=exclude).decide(ballot_of(scores))
    ranks, fresh = released(scores, exclude)
    kept = torch.split(verdict.kept, [len(layer) for layer in scores])
    assert [mask.nonzero().flatten().tolist() for mask in kept] == ranks
    assert list(verdict.fresh) == fresh and verdict.cut


# ---- whole runs ----


def test_begins_as_released_code() -> None:
    """A is Gaussian with standard deviation 1/r, B zero, c one; the scale is α/r."""
    method = lrkit_l1ra.l1ra(rank=16, alpha=4.0, pace=5.0)
    adapted = lrkit.attach(models.make("bert"), method)
    a = torch.cat([m.A.flatten() for m in adapted.adapters.values()])
    assert a.std().item() == pytest.approx(1 / 16, rel=0.03) and abs(a.mean().item()) < 0.005
    for module in adapted.adapters.values():
        assert not module.B.any() and torch.equal(module.core, torch.full((16,), 0.2))
        with torch.no_grad():
            module.B.normal_()
        torch.testing.assert_close(module.delta(), 4.0 / 16 * module.B @ module.A)


def trained(method: lrkit.Method, total: int, watch: Any = None, rate: float = 0.02) -> tuple[Any, Any]:
    _, adapted = rigs.toy(method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=rate, weight_decay=0.0)
    if watch is not None:
        optimizer.register_step_post_hook(lambda *_: watch(adapted, optimizer))  # before lrkit's own
    adapted.bind(optimizer, total_steps=total)
    for step in range(total):
        rigs.loss_of(adapted.model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted, optimizer


def test_a_run_against_a_plain_one() -> None:
    """Each step's c, and each move of ranks, follow from what the optimizer left, by the two rules alone."""
    method = lrkit_l1ra.l1ra(rank=4, strength=4.0, pace=1.0, interval=5)
    left: list[dict[str, torch.Tensor]] = []
    adapted, _ = trained(
        method, 30, lambda a, _: left.append({n: m.core.detach().clone() for n, m in a.adapters.items()})
    )
    moves = [d for d in adapted.history if d.policy == 1]
    assert [d.step for d in moves] == [5, 10, 15, 20, 25], "none in the last interval"
    assert any(d.fresh for d in moves), "ranks have moved"
    total = sum(len(c) for c in left[0].values())
    for step, cores in enumerate(left, start=1):
        shrunk = {n: (c - 0.02 * 4.0).clamp(0, 1) for n, c in cores.items()}
        (decision,) = [d for d in adapted.history if d.step == step and d.policy == 0]
        assert decision.kept == sum(int((c != 0).sum()) for c in shrunk.values())
        if step % 5 == 0 and step < 30:
            ranks, fresh = released([c.tolist() for c in shrunk.values()], exclude=True)
            (move,) = [d for d in moves if d.step == step]
            assert len(move.fresh) == sum(fresh) and len(move.lost) == total - sum(map(len, ranks))
            now = [len(c) for c in left[step].values()]
            assert now == [len(r) + f for r, f in zip(ranks, fresh, strict=True)]
            assert sum(now) == total or not any(fresh), "the total stays if any layer can take what is cut"
            total = sum(now)


def test_fresh_ranks_change_no_output() -> None:
    """A fresh component begins with c = 1 and B = 0, after a cut of components whose c is zero: outputs stay."""
    outputs, x = [], torch.randn(5, 6)
    method = lrkit_l1ra.l1ra(rank=4, strength=4.0, pace=1.0, interval=5)

    def watch(adapted: Any, _: Any) -> None:
        with torch.no_grad():
            cores = [m.core.clone() for m in adapted.adapters.values()]
            for m in adapted.adapters.values():  # the step that follows, done beforehand and undone
                m.core.sub_(0.02 * 4.0).clamp_(0, 1)
            outputs.append(adapted.model(x))
            for m, c in zip(adapted.adapters.values(), cores, strict=True):
                m.core.copy_(c)

    _, adapted = rigs.toy(method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.02, weight_decay=0.0)
    optimizer.register_step_post_hook(lambda *_: watch(adapted, optimizer))
    adapted.bind(optimizer, total_steps=30)
    moved = 0
    for step in range(30):
        rigs.loss_of(adapted.model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(adapted.model(x), outputs[-1])
        moved += sum(len(d.fresh) for d in adapted.history if d.step == step + 1)
    assert moved


@pytest.mark.parametrize("restart", [True, False])
def test_optimizer_begins_anew(restart: bool) -> None:
    """When ranks move the adapters' moments and step counts are dropped, or go on."""
    method = lrkit_l1ra.l1ra(rank=4, strength=4.0, pace=1.0, interval=5, restart=restart)
    adapted, optimizer = trained(method, 30)
    last = max(d.step for d in adapted.history if d.policy == 1 and (d.fresh or d.lost))
    counts = {int(s["step"]) for p in adapted.adapter_parameters() if (s := optimizer.state[p])}
    assert counts == {30 - last if restart else 30}


def test_pace_is_a_rate() -> None:
    """With pace k c moves as in a group of its own with k times the rate: the same models, step by step."""
    runs = []
    for pace in (1.0, 8.0):
        _, adapted = rigs.toy(lrkit_l1ra.l1ra(rank=4, strength=0.3, pace=pace, interval=4))
        cores = [m.core for m in adapted.adapters.values()]
        rest = [p for p in adapted.parameters() if all(p is not c for c in cores)]
        groups = [{"params": cores, "lr": 0.02 * 8 / pace}, {"params": rest, "lr": 0.02}]
        optimizer = torch.optim.Adam(groups, eps=1e-30)
        adapted.bind(optimizer, total_steps=16)
        for step in range(16):
            rigs.loss_of(adapted.model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(adapted)
    one, two = runs
    assert one.controller.ranks.now() == two.controller.ranks.now()
    assert [d.fresh for d in one.history] == [d.fresh for d in two.history] and any(d.fresh for d in one.history)
    x = torch.randn(5, 6)
    torch.testing.assert_close(one.model(x), two.model(x), rtol=1e-3, atol=1e-4)


def test_resumes_while_ranks_move() -> None:
    """Saved between two moves, before and at one: the resumed run is the run, bit for bit."""
    ended = resumes(lrkit_l1ra.l1ra(rank=3, strength=1.0, pace=400.0, interval=3), 14, (2, 3, 7))
    assert any(d.fresh for d in ended.adapted.history)


def test_no_strength_moves_nothing() -> None:
    """With λ = 0 and a small rate c stays near one, and no rank moves."""
    adapted, _ = trained(lrkit_l1ra.l1ra(rank=2, strength=0.0, pace=1.0), 20, rate=1e-3)
    assert [d.step for d in adapted.history if d.policy == 1] == list(range(2, 19, 2)), "it decides all the same"
    assert not any(d.fresh or d.lost for d in adapted.history)


def test_command_line_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Counted on DeBERTaV3-base by arithmetic."""
    told = ask(capsys, "params", "l1ra", "--model", "deberta-v3-base")["methods"]["l1ra"]
    assert told["start"] == 8 * (165_888 + 72) == told["end"]


def test_wrong_settings_are_refused() -> None:
    """A parameterization without a core, an optimizer without a rate, and a pace of zero are refused by name."""
    with pytest.raises(lrkit.LrkitError, match=r"Shrink\(.*does not fit .*LoRA.*core value"):
        attrs.evolve(lrkit_l1ra.l1ra(), parameterization=lrkit.parameterizations.LoRA())
    with pytest.raises(lrkit.LrkitError, match="pace"):
        lrkit_l1ra.l1ra(pace=0.0)
    _, adapted = rigs.toy(lrkit_l1ra.l1ra(rank=2))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=4)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(lrkit.LrkitError, match="needs a learning rate"):
        Shrink().proximal(adapted.controller.policies[0].blocks, 1.0, optimizer)


def test_what_peft_trained_goes_on(tmp_path: Path) -> None:
    """After `from_peft`, and after a first step that changes nothing, outputs are PEFT's: gates stay what they are."""
    again, batch, want = rigs.from_peft(lrkit_l1ra.l1ra(rank=4), tmp_path)
    torch.testing.assert_close(again.model(**batch).logits, want, atol=1e-5, rtol=0.0)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.0)
    again.bind(optimizer, total_steps=50)
    again.model(**batch).loss.backward()
    optimizer.step()
    torch.testing.assert_close(again.model(**batch).logits, want, atol=1e-5, rtol=0.0)
