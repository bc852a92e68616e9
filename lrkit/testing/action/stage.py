"""Set the stage for an action: blocks of a model in the middle of a run, and a ballot with made-up scores."""

from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrkit import metrics
from lrkit.actions import Action, Ballot
from lrkit.adapt.adapted import attach
from lrkit.adapt.body import blocks as body_of
from lrkit.method import Method
from lrkit.parameterizations import Parameterization, Target
from lrkit.testing.neighbours import method_with
from lrkit.testing.tiny import batch, seed_torch, tiny
from lrkit.units import Block, Part, blocks_of


@attrs.frozen(kw_only=True)
class Nothing(Parameterization):
    """No part at all: nothing that an action could act on."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return no part."""
        return ()

    def build(self, target: Target) -> nn.Module:
        """Return the layer as it is."""
        return target.layer


def on(action: Action, parameterization: Parameterization, **others: Any) -> Method:
    """Compose an action with a parameterization, with a metric that ranks every kind of unit, and with `others`."""
    parts = {"parameterization": parameterization, "metric": metrics.GradientUncertainty(), **others}
    return method_with(action, **parts)


class Stage:
    """A model in the middle of a run, and half of its blocks for an action to act on."""

    def __init__(self, action: Action, parameterization: Parameterization) -> None:
        self.model = tiny()
        seed_torch(5)
        adapted = attach(self.model, Method(parameterization=parameterization))
        self.optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
        adapted.bind(self.optimizer, total_steps=2)
        with torch.no_grad():
            for p in adapted.adapter_parameters():
                p.normal_()
        x, labels = batch()
        for _ in range(2):
            self.optimizer.zero_grad()
            (F.cross_entropy(self.model(x), labels) + adapted.penalty()).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        adapted.unbind()
        trained = {id(p) for p in adapted.parameters()}
        body = body_of(self.model, adapted.adapters, parameterization.parts)
        blocks = blocks_of(adapted.adapters, parameterization.parts, action.unit, trained, body)
        self.blocks: list[Block] = blocks[: max(2, len(blocks) // 2)]
        self.parameters = dict(self.model.named_parameters())
        self.gates = [part for part in parameterization.parts if part.core and not part.trains]

    @property
    def count(self) -> int:
        """Return the number of units."""
        return sum(block.count for block in self.blocks)

    def kept(self, which: str) -> Tensor:
        """Return bool [units] for ``"all"``, ``"half"`` or ``"none"`` of them; the half is the same each time."""
        if which != "half":
            return torch.full((self.count,), which == "all")
        return torch.randperm(self.count, generator=torch.Generator().manual_seed(6)) % 2 == 0

    def look(self) -> dict[str, Any]:
        """Return value, flag, gradient and optimizer state of every parameter, copied."""
        return {
            name: (
                p.detach().clone(),
                p.requires_grad,
                None if p.grad is None else p.grad.clone(),
                {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.optimizer.state.get(p, {}).items()},
            )
            for name, p in self.parameters.items()
        }

    def groups(self) -> str:
        """Return the optimizer's param_groups in words that differ if anything in them differs."""
        return repr(
            [{k: [id(p) for p in v] if k == "params" else v for k, v in g.items()} for g in self.optimizer.param_groups]
        )


def ballot_of(units: int, budget: int, *, ties: bool = False, out: int = 0, costs: bool = False) -> Ballot:
    """Return a ballot on components of one layer.

    Args:
        units: how many there are.
        budget: how many may be kept.
        ties: give all of them one score; otherwise no two have the same.
        out: how many are not candidates any more.
        costs: whether the budget is one of costs: of 1 to 5 per unit, unlike for neighbours.
    """
    generator = torch.Generator().manual_seed(7)
    scores = torch.zeros(units) if ties else torch.randperm(units, generator=generator).float() / units
    candidates = torch.ones(units, dtype=torch.bool)
    candidates[torch.randperm(units, generator=generator)[:out]] = False
    return Ballot(
        scores.masked_fill(~candidates, -torch.inf),
        candidates,
        budget,
        min(1.0, budget / units),
        scores[candidates].repeat_interleave(3),
        torch.ones(units, dtype=torch.long),
        torch.zeros(units, dtype=torch.long),
        layers=1,
        costs=torch.arange(units) * 3 % 5 + 1 if costs else None,
    )
