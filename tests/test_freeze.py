"""Freezing: for good, whatever the optimizer; in the oracle's order."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import attrs
import oracles
import pytest
import torch
from rigs import OPTIMIZERS, array, bert, cores, loss_of, toy
from torch import Tensor, nn

import lrkit
from lrkit.actions import Ballot, Freeze, Prune
from lrkit.errors import LrkitWarning
from lrkit.metrics import GradientUncertainty, Metric, SensitivityUncertainty
from lrkit.parameterizations import SVD, LoRA, VectorScaled
from lrkit.schedulers import Cubic

SETTINGS = [(30, 4, 10, 1), (30, 0, 20, 1), (24, 3, 6, 4), (20, 2, 3, 6)]  # total, warmup, final, interval


def aflora(
    times: tuple[int, int, int, int] = (30, 4, 10, 1),
    *,
    together: bool = False,
    train: Any = "both",
    parameterization: Any = None,
) -> lrkit.Method:
    _, warmup, final, interval = times
    return lrkit.Method(
        parameterization=parameterization or VectorScaled(rank=3, train=train),
        metric=GradientUncertainty(),
        scheduler=Cubic(target=0.0, warmup=warmup, final=final, interval=interval),
        action=Freeze(together=together),
    )


def matrices(adapted: Any, method: lrkit.Method) -> dict[str, Tensor]:
    """Every projection matrix that trains: layers in the model's order, each as its parts are listed."""
    found = {}
    for name, adapter in adapted.adapters.items():
        for part in (part.name for part in method.parameterization.parts if part.name in ("A", "B")):
            p = getattr(adapter, part)
            if isinstance(p, nn.Parameter) and p.requires_grad:
                found[f"{name}.{part}"] = p
    return found


class Gradients:
    """The projection matrices' gradients as the optimizer's step finds them."""

    def __init__(self, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.tensors = tensors
        self.seen: dict[str, Any] = {}
        optimizer.register_step_pre_hook(self._pre)

    def _pre(self, *_: object) -> None:
        self.seen = {name: array(p.grad) for name, p in self.tensors.items() if p.grad is not None}


def train(
    rig: Any, method: lrkit.Method, total: int, optimizer_name: str = "adamw", accumulate: int = 1
) -> tuple[Any, dict[str, int], dict[str, int]]:
    """Trains and checks what every step must keep. The step each matrix froze at: seen, and by the oracle."""
    model, adapted = rig(method)
    tensors = matrices(adapted, method)
    assert tensors
    action, scheduler = method.action, method.scheduler
    assert isinstance(action, Freeze) and isinstance(scheduler, Cubic)
    groups: dict[str, list[str]] | None = None
    if action.together:
        groups = {}
        for name in tensors:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
    oracle = oracles.AFLoRARun(
        {name: tuple(p.shape) for name, p in tensors.items()},
        total=total,
        warmup=int(scheduler.warmup),
        final=int(scheduler.final),
        interval=int(scheduler.interval),
        groups=groups,
    )
    optimizer = OPTIMIZERS[optimizer_name](adapted.parameters())
    listed = [list(map(id, group["params"])) for group in optimizer.param_groups]
    gradients = Gradients(tensors, optimizer)
    adapted.bind(optimizer, total_steps=total)

    def pushed(name: str) -> bool:
        """Hard enough to move a float32. (b = 0, B = 0 or λ = 0 at first: no gradient for some at the first step.)"""
        largest = float(tensors[name].detach().abs().max())
        return name in gradients.seen and abs(gradients.seen[name]).max() > 1e-4 * largest

    frozen_at: dict[str, int] = {}
    values: dict[str, Tensor] = {}
    for t in range(1, total + 6):  # and past the end
        for micro in range(accumulate):
            (loss_of(model, 100 * t + micro) + adapted.penalty()).backward()
        for name in values:
            assert tensors[name].grad is None, f"{name} froze and has a gradient at step {t}"
        previous = {name: p.detach().clone() for name, p in tensors.items()}
        with pytest.warns(LrkitWarning, match="total_steps") if t == total + 1 else nullcontext():
            optimizer.step()
        for name, p in tensors.items():
            if name in values:
                assert not p.requires_grad
                assert torch.equal(p, values[name]), f"{name} froze at {frozen_at[name]} and moved at {t}"
                assert p not in optimizer.state, f"{name} froze and keeps optimizer state"
                assert p.grad is None
            elif not p.requires_grad:
                frozen_at[name], values[name] = t, p.detach().clone()
                assert p.grad is None, "the gradient of the step it froze at is left behind"
                assert p not in optimizer.state
                assert pushed(name) <= (not torch.equal(p, previous[name])), "it froze before the step's own update"
            else:
                assert pushed(name) <= (not torch.equal(p, previous[name])), f"{name} is not frozen and did not move"
        optimizer.zero_grad(set_to_none=False)
        if t <= total:
            oracle.step(gradients.seen)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == listed
    want = oracle.frozen_at
    if groups is not None:
        want = {name: want[group] for group, names in groups.items() if group in want for name in names}
    return adapted, frozen_at, want


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_per_optimizer(optimizer: str) -> None:
    """With every optimizer matrices freeze when the oracle says so, and never move again."""
    _, seen, want = train(bert, aflora((16, 2, 6, 1)), 16, optimizer)
    assert seen == want
    assert len(seen) == 24


@pytest.mark.parametrize("times", SETTINGS, ids=str)
@pytest.mark.parametrize("together", [False, True], ids=["independent", "together"])
def test_oracle_order(together: bool, times: tuple[int, int, int, int]) -> None:
    """Matrices freeze in the oracle's order."""
    adapted, seen, want = train(bert, aflora(times, together=together), times[0])
    assert seen == want
    total, warmup, final, interval = times
    units = 12 if together else 24
    when = {"total": total, "warmup": warmup, "final": final}
    for record in adapted.history:
        budget = oracles.budget(record.step, **when, b0=units, bT=0)
        assert (record.budget, record.kept) == (budget, budget)
        gone = sum(step <= record.step for step in seen.values()) // (2 if together else 1)
        assert gone == units - budget, "frozen matrices are not exactly the share that is due"
    due = [t for t in range(1, total + 1) if oracles.is_due(t, **when, interval=interval)]
    assert [record.step for record in adapted.history] == due


@pytest.mark.parametrize("times", [(40, 4, 10, 3), (50, 6, 9, 5), (36, 0, 12, 2)], ids=str)
@pytest.mark.parametrize("together", [False, True], ids=["independent", "together"])
def test_released_order(together: bool, times: tuple[int, int, int, int]) -> None:
    """Windows of gradients, steps from 0, an element-wise quantile over what still trains."""
    total, warmup, final, window = times
    method = lrkit.Method(
        parameterization=VectorScaled(rank=3, train="both"),
        metric=GradientUncertainty(window=window),
        scheduler=Cubic(target=0.0, warmup=warmup, final=final, interval=window, first_step=0, ending="released"),
        action=Freeze(together=together, rule="quantile"),
    )
    model, adapted = bert(method)
    tensors = matrices(adapted, method)
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(name.rpartition(".")[0] if together else name, []).append(name)
    shapes = {name: tuple(p.shape) for name, p in tensors.items()}
    oracle = oracles.ReleasedAFLoRARun(shapes, total=total, warmup=warmup, final=final, window=window, groups=groups)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01)
    gradients = Gradients(tensors, optimizer)
    adapted.bind(optimizer, total_steps=total)
    for n in range(total):
        optimizer.zero_grad()
        loss_of(model, n).backward()
        optimizer.step()
        oracle.step(gradients.seen)
        frozen = {group for group, names in groups.items() if not tensors[names[0]].requires_grad}
        assert frozen == set(oracle.frozen_at), n
    assert len(frozen) == len(groups)
    assert len(set(oracle.frozen_at.values())) > 2, "all at once says nothing about the order"


def test_together_in_one_step() -> None:
    """With `together` both matrices of a layer freeze in the same step."""
    _, seen, _ = train(bert, aflora((20, 2, 4, 1), together=True), 20)
    for name, step in seen.items():
        if name.endswith(".A"):
            assert seen[name[:-1] + "B"] == step
    _, seen, _ = train(bert, aflora((20, 2, 4, 1), together=False), 20)
    assert any(seen[name] != seen[name[:-1] + "B"] for name in seen if name.endswith(".A"))


def test_gradient_accumulation() -> None:
    """Under gradient accumulation the order is the oracle's per optimizer step."""
    _, seen, want = train(bert, aflora((14, 2, 4, 1)), 14, "adamw", accumulate=3)
    assert seen == want


@pytest.mark.parametrize("parameterization", [LoRA(rank=3), SVD(rank=3)], ids=lambda p: type(p).__name__)
def test_other_parameterizations(parameterization: Any) -> None:
    """Matrices of other parameterizations freeze in the oracle's order too."""
    _, seen, want = train(bert, aflora((16, 2, 6, 2), parameterization=parameterization), 16)
    assert seen == want and len(seen) == 24


@pytest.mark.parametrize("part", ["ffn", "attention", "both", "none"])
def test_chosen_modules_train(part: Any) -> None:
    """Only matrices in the chosen modules train."""
    method = lrkit.Method(parameterization=VectorScaled(rank=3, train=part))
    _, adapted = bert(method)
    names = {name.rpartition(".")[0] for name in matrices(adapted, method)}
    ffn = {n for n in adapted.adapters if n.endswith(("intermediate.dense", "output.dense")) and "attention" not in n}
    attention = set(adapted.adapters) - ffn
    assert len(ffn) == 4 and len(attention) == 8
    assert names == {"ffn": ffn, "attention": attention, "both": ffn | attention, "none": set()}[part]


def test_untrained_are_no_units() -> None:
    """Matrices that do not train never move, and are not counted as units."""
    model, adapted = bert(aflora((12, 2, 4, 1), train="ffn"))
    still = {
        f"{name}.{part}": getattr(adapter, part)
        for name, adapter in adapted.adapters.items()
        for part in ("A", "B")
        if not getattr(adapter, part).requires_grad
    }
    assert len(still) == 16
    before = {name: p.detach().clone() for name, p in still.items()}
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01, weight_decay=0.1)
    adapted.bind(optimizer, total_steps=12)
    for t in range(1, 13):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in still.items())
    lost = [name for record in adapted.history for name in record.lost]
    assert len(lost) == len(set(lost)) == 8
    assert all(record.returned == () for record in adapted.history), "nothing comes back from freezing"


@pytest.mark.parametrize("together", [False, True], ids=["independent", "together"])
def test_ties_freeze_share(together: bool) -> None:
    """If all gradients are zero every score is equal, and the lower index trains longer."""
    total, warmup, final = 20, 2, 5
    method = aflora((total, warmup, final, 1), together=together, parameterization=LoRA(rank=3))
    _, adapted = toy(method)
    tensors = matrices(adapted, method)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted.bind(optimizer, total_steps=total)
    units = 3 if together else 6
    for t in range(1, total + 1):
        for p in tensors.values():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        budget = oracles.budget(t, total=total, warmup=warmup, final=final, b0=units, bT=0)
        trains = [p.requires_grad for p in tensors.values()]
        share = budget * (2 if together else 1)
        assert trains == [True] * share + [False] * (6 - share), t


def test_frozen_stays_frozen() -> None:
    """A frozen matrix with a high old score neither comes back nor uses up the budget of one that trains."""
    method = attrs.evolve(
        aflora(parameterization=LoRA(rank=2)), scheduler=Cubic(target=0.0, warmup=0, final=5, interval=1)
    )
    _, adapted = toy(method)
    tensors = matrices(adapted, method)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
    total = 40
    adapted.bind(optimizer, total_steps=total)
    for t in range(1, total + 1):
        for p in tensors.values():
            if p.requires_grad:
                p.grad = torch.full_like(p, 100.0 if t < 8 else 1e-6) * (1 + 0.1 * torch.rand(()))
        optimizer.step()
        active = sum(p.requires_grad for p in tensors.values())
        assert active == oracles.budget(t, total=total, warmup=0, final=5, b0=6, bT=0), t


@attrs.frozen(kw_only=True)
class LaterNotANumber(Metric):
    """Higher for later entries; after five steps not a number for any."""

    buffers: ClassVar[tuple[str, ...]] = ("steps",)

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        state["steps"].fill_(step)

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        rising = torch.arange(weight.numel(), dtype=torch.float32)
        return torch.where(state["steps"] > 5, torch.nan, rising)


def test_nan_scores_thaw_nothing() -> None:
    """A frozen matrix does not count as kept, even if the scores of all that train are not numbers."""
    total = 20
    method = attrs.evolve(aflora((total, 0, 4, 1), parameterization=LoRA(rank=2)), metric=LaterNotANumber())
    _, adapted = toy(method)
    tensors = matrices(adapted, method)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=1e-3)
    adapted.bind(optimizer, total_steps=total)
    gone: set[str] = set()
    for t in range(1, total + 1):
        for p in tensors.values():
            if p.requires_grad:
                p.grad = torch.ones_like(p)
        optimizer.step()
        frozen = {name for name, p in tensors.items() if not p.requires_grad}
        assert gone <= frozen
        gone = frozen
        budget = oracles.budget(t, total=total, warmup=0, final=4, b0=6, bT=0)
        assert 6 - len(frozen) == budget == adapted.history[-1].kept, t


def test_graph_before_freezing() -> None:
    """A graph from before a matrix froze gives it no gradient."""
    total = 6
    method = aflora((total, 0, 4, 1))
    model, adapted = bert(method)
    tensors = matrices(adapted, method)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    adapted.bind(optimizer, total_steps=total)
    late = torch.stack([p.sum() for p in tensors.values()]).sum()  # saves no tensor: the update does not spoil it
    for t in (1, 2):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()
    assert not any(p.requires_grad for p in tensors.values())
    before = {name: p.detach().clone() for name, p in tensors.items()}
    late.backward()
    assert all(p.grad is None for p in tensors.values())
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in tensors.items())


def test_prune_and_freeze() -> None:
    """In one run with both policies, as in AFLoRA's §8, each schedule holds by its own oracle."""
    total = 24
    method = attrs.evolve(
        aflora((total, 3, 6, 1), parameterization=SVD(rank=4)),
        also=(
            lrkit.Policy(
                metric=SensitivityUncertainty(),
                scheduler=Cubic(target=1, warmup=5, final=4, interval=3),
                action=Prune(),
            ),
        ),
    )
    model, adapted = toy(method)
    tensors = matrices(adapted, method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.01)
    adapted.bind(optimizer, total_steps=total)
    for t in range(1, total + 1):
        optimizer.zero_grad()
        (loss_of(model, t) + adapted.penalty()).backward()
        optimizer.step()
        if t > 3:
            training = sum(p.requires_grad for p in tensors.values())
            assert training == oracles.budget(t, total=total, warmup=3, final=6, b0=6, bT=0), t
        if oracles.is_due(t, total=total, warmup=5, final=4, interval=3) or t >= 20:
            assert (cores(adapted) != 0).sum() == oracles.budget(t, total=total, warmup=5, final=4, b0=12, bT=3), t
    assert not any(p.requires_grad for p in tensors.values())
    assert len({record.policy for record in adapted.history}) == 2


def test_freeze_is_final() -> None:
    """Freezing is final, and acts on matrices or on layers."""
    assert Freeze.final
    assert Freeze().unit == "matrix" and Freeze(together=True).unit == "layer"


def ballot(scores: list[float], candidates: list[bool], budget: int, share: float) -> Ballot:
    s, c = torch.tensor(scores), torch.tensor(candidates)
    return Ballot(
        scores=s,
        candidates=c,
        budget=budget,
        share=share,
        entries=s[c],
        parts=torch.ones(len(scores)),
        blocks=torch.arange(len(scores)),
    )


def test_budget_thaws_nothing() -> None:
    """A budget above the number of matrices that still train thaws none."""
    kept = Freeze().decide(ballot([5.0, 1.0, 2.0], [False, True, True], 3, 1.0)).kept
    assert kept.tolist() == [False, True, True]


def test_mean_at_quantile() -> None:
    """The released code freezes what is strictly under: of four equal means none, of 1 2 3 4 at one half the first."""
    freeze = Freeze(rule="quantile")
    assert freeze.decide(ballot([2.0] * 4, [True] * 4, 2, 0.5)).kept.tolist() == [True] * 4
    assert freeze.decide(ballot([1.0, 2.0, 3.0, 4.0], [True] * 4, 2, 0.5)).kept.tolist() == [False, True, True, True]
