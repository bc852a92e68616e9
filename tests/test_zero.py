"""Zero: what loses is zero in every tensor, with the optimizer's state for it; what that means for what may come back."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import rigs
import torch

import lrkit
from lrkit.actions import Freeze, Prune, Zero
from lrkit.metrics import GradientUncertainty, SensitivityUncertainty
from lrkit.parameterizations import SVD, LoRA
from lrkit.schedulers import Cubic
from lrkit.testing import ActionContract, resumes
from lrkit.units import blocks_of, present

STEPS = 16


def pruned(action: Zero, parameterization: Any = None, **others: Any) -> lrkit.Method:
    return lrkit.Method(
        parameterization=parameterization or LoRA(rank=4),
        metric=SensitivityUncertainty(),
        scheduler=Cubic(target=0.4, warmup=2, final=4, interval=2),
        action=action,
        **others,
    )


class TestZero(ActionContract):
    component = (Zero(), Zero(once=True))


def test_exactly_the_losers_and_their_momentum_are_zero() -> None:
    model, adapted = rigs.toy(lrkit.Method(parameterization=SVD(rank=3, orthogonality=0)))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01, amsgrad=True)
    for step in range(3):
        rigs.loss_of(model, step).backward()
        optimizer.step()
    tensors = [p for adapter in adapted.adapters.values() for p in (adapter.core, adapter.B, adapter.A)]
    with torch.no_grad():
        for p in tensors:
            p.normal_()
    before = [p.detach().clone() for p in tensors]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in tensors]
    blocks = blocks_of(adapted.adapters, SVD(rank=3).parts, "component", {id(p) for p in adapted.parameters()})
    kept = torch.tensor([True, False, True, False, False, False, True, True, True])
    Zero().apply(blocks, kept, optimizer)
    for index, p in enumerate(tensors):
        layer, part = divmod(index, 3)
        for unit in range(3):
            for now, then in (
                (p, before[index]),
                *((optimizer.state[p][k], moments[index][k]) for k in moments[index]),
            ):
                if now.ndim == 0 and now.shape != p.shape:
                    assert torch.equal(now, then), "the step count goes on"
                    continue
                here, there = (t[:, unit] if part == 1 else t[unit] for t in (now, then))
                assert torch.equal(here, there if kept[3 * layer + unit] else torch.zeros_like(there))


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("name", rigs.OPTIMIZERS)
def test_a_doublet_never_comes_back(name: str, once: bool) -> None:
    """Each vector's gradient is a multiple of the other: with both at zero, and no momentum, nothing moves."""
    model, adapted = rigs.bert(pruned(Zero(once=once)))
    optimizer = rigs.OPTIMIZERS[name](adapted.parameters())
    adapted.bind(optimizer, total_steps=STEPS)
    dead: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        rigs.loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer, adapter in adapted.adapters.items():
            zero = ~(adapter.A != 0).any(dim=1) & ~(adapter.B != 0).any(dim=0)
            assert bool((zero | ~dead.get(layer, torch.zeros_like(zero))).all()), f"{layer} at step {step + 1}"
            dead[layer] = zero
    assert sum(int(zero.sum()) for zero in dead.values()) >= adapted.history[-1].units * 0.5
    if once:
        assert not any(decision.returned for decision in adapted.history)
        assert sum(int((~zero).sum()) for zero in dead.values()) == adapted.history[-1].budget


def test_without_clearing_momentum_it_would() -> None:
    """The test above would see it: with the optimizer's state left alone, doublets leave zero."""
    model, adapted = rigs.bert(pruned(Zero()))
    optimizer = rigs.OPTIMIZERS["adamw"](adapted.parameters())
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(4):
        rigs.loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = next(a for a in adapted.adapters.values() if bool((~(a.A != 0).any(dim=1)).any()))
    lost = ~(adapter.A != 0).any(dim=1)
    optimizer.state[adapter.A]["exp_avg"][lost] = 1.0
    rigs.loss_of(model, 4).backward()
    optimizer.step()
    assert bool((adapter.A[lost] != 0).all())


@pytest.mark.parametrize("parameterization", [SVD(rank=4), LoRA(rank=4)], ids=["svd", "lora"])
def test_final_pruning_and_freezing_in_one_run_resume(parameterization: Any) -> None:
    """An action may be irreversible and freeze nothing: what it has taken out still has statistics in other policies."""
    freeze = lrkit.Policy(
        metric=GradientUncertainty(), scheduler=Cubic(target=0.3, final=2, interval=2), action=Freeze()
    )
    few = attrs.evolve(pruned(Zero(once=True), parameterization), scheduler=Cubic(target=0.05, final=4))
    run = resumes(attrs.evolve(few, also=(freeze,)), 12, (1, 5, 8, 11))
    ranks = [layer.rank for layer in run.adapted.summary().layers]
    assert 0 in ranks, "a layer that has lost all its components is what this is about"
    assert any(layer.frozen for layer in run.adapted.summary().layers)


def test_doublets_are_cut() -> None:
    model, adapted = rigs.bert(pruned(Zero(once=True)))
    optimizer = rigs.OPTIMIZERS["adamw"](adapted.parameters())
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(STEPS - 2):
        rigs.loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    before, summary = rigs.loss_of(model, 99).item(), adapted.summary()
    ranks = adapted.compact()
    assert ranks == {layer.name: layer.rank for layer in summary.layers}
    assert sum(ranks.values()) == adapted.history[-1].budget < adapted.history[-1].units
    assert adapted.summary().now == summary.now == sum(p.numel() for p in adapted.adapter_parameters())
    torch.testing.assert_close(rigs.loss_of(model, 99).item(), before)
    for step in (STEPS - 2, STEPS - 1):
        rigs.loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_what_may_add_to_an_output() -> None:
    _, adapted = rigs.toy(lrkit.Method(parameterization=LoRA(rank=3)))
    adapter, parts = adapted.adapters["second"], LoRA(rank=3).parts
    with torch.no_grad():
        adapter.A[0], adapter.A[1], adapter.B[:, 1] = 0.0, 0.0, 0.0
        adapter.B[2, 0] = 1.0
    assert present(adapter, parts).tolist() == [True, False, True]
    _, adapted = rigs.toy(lrkit.Method(parameterization=SVD(rank=3, orthogonality=0)))
    with torch.no_grad():
        adapted.adapters["first"].core[1] = 2.0
    assert present(adapted.adapters["first"], SVD(rank=3).parts).tolist() == [False, True, False]


def test_what_an_action_says_of_itself() -> None:
    assert [a.final for a in (Zero(), Zero(once=True), Prune(), Freeze())] == [False, True, False, True]
    assert [a.fate for a in (Zero(), Zero(once=True), Prune(), Freeze())] == ["masked", "masked", "masked", "frozen"]
    with pytest.raises(lrkit.LrkitError, match=r"Zero.*does not fit parameterization Full\(\).*'component'"):
        pruned(Zero(), lrkit.parameterizations.Full())
