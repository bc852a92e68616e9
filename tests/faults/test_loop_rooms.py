"""Faults of the loop that were found by reading it: each stands for a kind."""

import gc
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import pytest
import torch
from torch import Tensor, nn

import lrkit
from lrkit import accounting
from lrkit.actions import Ballot, Fate, Freeze, Prune, Verdict, best
from lrkit.errors import Once
from lrkit.loop.controller import Controller
from lrkit.metrics import GradientUncertainty, SensitivityUncertainty
from lrkit.parameterizations import SVD, VectorScaled
from lrkit.registry import current
from lrkit.schedulers import Constant, Cubic


class Net(nn.Module):
    """Layers in a row, of which some are passed over."""

    def __init__(self, skipped: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.classifier = nn.Linear(8, 2)
        self.skipped = skipped

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = x if index in self.skipped else x + torch.tanh(layer(x))
        return self.classifier(x)  # type: ignore[no-any-return]


def trained(method: lrkit.Method, steps: int, total: int, skipped: tuple[int, ...] = ()) -> lrkit.Adapted:
    """Attach a method to the net and train it."""
    adapted = lrkit.attach(Net(skipped), method)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lrkit.LrkitWarning)
        adapted.bind(optimizer, total_steps=total)
        for step in range(steps):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(adapted.model(x), (x[:, 0] > 0).long())
            (loss + adapted.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return adapted


def svd(scheduler: lrkit.Scheduler, action: lrkit.Action, rank: int = 3) -> lrkit.Method:
    """Compose a method on SVD without a penalty."""
    form = SVD(rank=rank, orthogonality=0.0)
    return lrkit.Method(parameterization=form, metric=SensitivityUncertainty(), scheduler=scheduler, action=action)


@pytest.mark.parametrize("target", [0.0, 0.5])
def test_unknown_numbers_are_ranges(target: float) -> None:
    """How many matrices a quantile freezes follows from the scores: the count is a range, and the run is within it."""
    method = lrkit.Method(
        parameterization=VectorScaled(rank=2, train="both"),
        metric=GradientUncertainty(),
        scheduler=Cubic(target=target, warmup=2, final=4),
        action=Freeze(rule="quantile"),
    )
    counted = accounting.count(method, Net(), total_steps=12)
    summary = trained(method, 12, 12).summary()
    assert counted.end_range[0] <= summary.now <= counted.end_range[1]
    assert counted.end_range[0] < counted.end_range[1]
    assert counted.average_range[0] <= summary.average <= counted.average_range[1]


@attrs.frozen(kw_only=True)
class Shift(lrkit.Action):
    """The worst component goes, but never a layer's last one; the best layer gets another. Source: this test."""

    fate: ClassVar[Fate] = "removed"
    final: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    unit = "component"  # type: ignore[assignment]

    def decide(self, ballot: Ballot) -> Verdict:
        kept = ballot.candidates.clone()
        for unit in ballot.scores.argsort().tolist():
            mine = ballot.blocks == ballot.blocks[unit]
            if bool(kept[unit]) and int((kept & mine).sum()) > 1:
                kept[unit] = False
                break
        top = int(ballot.blocks[ballot.scores.argmax()])
        fresh = tuple(int(index == top) for index in range(ballot.layers))
        return Verdict(kept, cut=True, fresh=fresh, core=1e-3)

    def apply(self, blocks: object, kept: Tensor, optimizer: object) -> None:
        return

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int]:
        return 1, 1


def test_unreached_layers_keep_one() -> None:
    """A layer that the loss does not reach loses components first, and never its last: it could not come back."""
    adapted = trained(svd(Constant(target=0.5), Shift(), rank=2), 8, 12, skipped=(1,))
    assert adapted.controller.liveness.dead == ["layers.1"]
    ranks = adapted.controller.ranks.now()
    assert ranks["layers.1"] == 1
    assert sum(ranks.values()) == 6


@attrs.frozen(kw_only=True)
class CutAtLast(lrkit.Action):
    """Losers are masked for good, and leave at the last decision. Source: this test."""

    fate: ClassVar[Fate] = "removed"
    final: ClassVar[bool] = True
    unit = "component"  # type: ignore[assignment]

    def decide(self, ballot: Ballot) -> Verdict:
        return Verdict(best(ballot), cut=ballot.last)

    @torch.no_grad()
    def apply(self, blocks: list[lrkit.Block], kept: Tensor, optimizer: object) -> None:
        for block, keep in zip(blocks, kept.split([block.count for block in blocks]), strict=True):
            block.core.mul_(keep)


def grown_beside_a_mask() -> lrkit.Method:
    """A policy that adds components beside one that masks some."""
    both = lrkit.Policy(metric=SensitivityUncertainty(), scheduler=Constant(target=1.0), action=Prune())
    more = attrs.evolve(svd(Cubic(start=1, target=4, final=2), Shift(), rank=1), also=(both,))
    return attrs.evolve(more, action=Add())


@attrs.frozen(kw_only=True)
class Add(Shift):
    """Every layer gets one more at each decision. Source: this test."""

    def decide(self, ballot: Ballot) -> Verdict:
        return Verdict(ballot.candidates, cut=True, fresh=(1,) * ballot.layers, core=1e-3)

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int]:
        return 0, layers


STATES: dict[str, Callable[[], lrkit.Method]] = {
    "a second policy outgrown": grown_beside_a_mask,
    "a block masked whole": lambda: svd(Constant(target=1 / 9, warmup=2, final=2), CutAtLast()),
}


@pytest.mark.parametrize("name", STATES)
def test_own_states_are_taken(name: str) -> None:
    """A run takes the state that it gave, whatever its policies did to each other's units."""
    method, registry = STATES[name](), current()
    adapted = trained(method, 6, 12)
    again = lrkit.attach(Net(), method)
    with warnings.catch_warnings(), registry.lend("action", "add", Add), registry.lend("action", "last", CutAtLast):
        warnings.simplefilter("ignore", lrkit.LrkitWarning)
        state = adapted.state_dict()
        again.load_state_dict(state)
        assert all(torch.equal(again.state_dict()["tensors"][key], value) for key, value in state["tensors"].items())
    assert again.history == adapted.history


def test_loads_leave_nothing_behind() -> None:
    """After a load only one loop lives: the one before it is let go of, with its statistics."""
    adapted = trained(lrkit.methods.adalora(rank=3, target_rank=1), 2, 12)
    state = adapted.state_dict()
    for _ in range(2):
        adapted.load_state_dict(state)
    gc.collect()
    mine = [each for each in gc.get_objects() if type(each) is Controller and each.run.modules is adapted.adapters]
    assert mine == [adapted.controller]


def test_raised_warnings_are_not_said() -> None:
    """A warning that a filter makes an error is raised again the next time, and said once without the filter."""
    say = Once()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(lrkit.LrkitWarning, match="twice"):
                say("key", "twice")
    with pytest.warns(lrkit.LrkitWarning, match="twice") as seen:
        [say("key", "twice") for _ in range(2)]
    assert len(seen) == 1


def test_warned_loads_are_whole() -> None:
    """If the warning about a state's precision is an error, the state has been taken all the same, or not at all."""
    method = lrkit.methods.adalora(rank=3, target_rank=1)
    state = trained(method, 4, 12).state_dict()
    tensors = {k: v.bfloat16() if k.startswith("weight.") else v for k, v in state["tensors"].items()}
    adapted = lrkit.attach(Net(), method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(lrkit.LrkitWarning, match="bfloat16"):
            adapted.load_state_dict({"meta": state["meta"], "tensors": tensors})
    assert adapted.step == 4
    assert adapted.history == trained(method, 4, 12).history


def says(**changes: Any) -> lrkit.Action:
    """Make an action whose verdicts are the default ones but for some fields."""

    @attrs.frozen(kw_only=True)
    class Says(Prune):
        """A mask with odd verdicts. Source: this test."""

        def decide(self, ballot: Ballot) -> Any:
            verdict = super().decide(ballot)
            return changes["whole"] if "whole" in changes else attrs.evolve(verdict, **changes)

    return Says()


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "no verdict": ({"whole": torch.ones(9, dtype=torch.bool)}, "must return a lrkit.actions.Verdict, not Tensor"),
    "another length": ({"kept": torch.ones(3, dtype=torch.bool)}, r"kept must be bool \[9\]"),
    "no mask": ({"kept": torch.ones(9)}, r"kept must be bool \[9\], not torch.float32"),
    "too few": ({"fresh": (1,)}, "fresh must be a whole number for each of 3 blocks"),
    "fewer than none": ({"fresh": (-1, 0, 1)}, "fresh must be a whole number"),
    "growth that is not said": ({"fresh": (1, 0, 0)}, "grows is False"),
    "a cut of what is masked": ({"cut": True}, 'cut is for components of the fate "removed"'),
    "a budget above all": ({"budget": 99}, "budget must be a whole number of units, from 0 to 9, not 99"),
    "a budget of parts": ({"budget": 2.5}, "budget must be a whole number"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_verdicts_are_told(name: str) -> None:
    """A verdict that cannot be carried out is told at the decision, in one line that names the action."""
    changes, words = ODD[name]
    with pytest.raises(lrkit.LrkitError, match=rf"^Says\(.*at step 1: .*{words}"):
        trained(svd(Constant(target=0.5), says(**changes)), 1, 4)


def test_schedules_without_a_decision_are_saved() -> None:
    """A run whose last decision would be before its first step takes its own states."""
    method = svd(Constant(target=0.5, final=1.0), Prune())
    state = trained(method, 2, 4).state_dict()
    again = lrkit.attach(Net(), method)
    with pytest.warns(lrkit.LrkitWarning, match="the budget will not be reached"):
        again.load_state_dict(state)
    assert again.step == 2
    assert again.history == []
