"""Actions that change how many rank components a layer has: grow (IncreLoRA) and exchange (ElaLoRA)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

import lrkit
from lrkit.actions import Ballot, Fate, Verdict
from lrkit.ranks import most_of
from lrkit.settings import one_of, real, whole
from lrkit.units import UnitKind


@attrs.frozen(kw_only=True)
class _Elastic(lrkit.Action):
    fate: ClassVar[Fate] = "removed"
    final: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    exact = False  # for its contract: a layer's last component stays, whatever the budget

    core: float = attrs.field(default=1e-5, validator=real(0.0))
    by: Literal["mean", "sum"] = attrs.field(default="mean", validator=one_of(("mean", "sum")))

    @property
    def unit(self) -> UnitKind:
        """Rank components."""
        return "component"

    def goes(self, units: int, budget: int) -> int:
        """How many components a decision would cut, were it not for each layer's last one."""
        return max(0, units - budget)

    def comes(self, room: int, layers: int) -> int:
        """How many components a decision adds, where the budget has so much room."""
        return room

    def each(self) -> int:
        """How many components a layer gets before the next layer's turn."""
        return 1

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int]:
        """Cut and added components."""
        goes = min(self.goes(units, budget), max(0, units - layers))
        return goes, self.comes(max(0, budget - (units - goes)), layers)

    def decide(self, ballot: Ballot) -> Verdict:
        """Cut the lowest `goes`, but never a layer's best; then fresh components go to the best layers, in turn."""
        goes = self.goes(int(ballot.candidates.sum()), ballot.budget)
        # Candidates alone, from the lowest score; of equals the later one first, as everywhere.
        order = torch.sort(ballot.scores, descending=True, stable=True).indices.tolist()
        left = torch.bincount(ballot.blocks[ballot.candidates], minlength=1).tolist()
        kept, where = ballot.candidates.tolist(), ballot.blocks.tolist()
        for i in reversed(order):
            if goes and kept[i] and left[where[i]] > 1:
                kept[i] = False
                left[where[i]] -= 1
                goes -= 1
        stays = torch.tensor(kept, dtype=torch.bool, device=ballot.scores.device)
        return Verdict(stays, cut=True, fresh=self.fresh(ballot, stays), core=self.core)

    def fresh(self, ballot: Ballot, kept: Tensor) -> tuple[int, ...]:
        """Return the new components of each block: to the blocks with the best scores, in turn; of equals to the earlier."""
        blocks = ballot.layers
        count = self.comes(max(0, ballot.budget - int(kept.sum())), blocks)
        total = torch.zeros(blocks, dtype=torch.float64, device=ballot.scores.device)
        total.index_add_(0, ballot.blocks[kept], ballot.scores[kept].double())
        if self.by == "mean":
            total /= torch.bincount(ballot.blocks[kept], minlength=blocks).clamp(min=1)
        order = torch.sort(total, descending=True, stable=True).indices.tolist()
        fresh = [0] * blocks
        while count:
            for block in order:
                fresh[block] += min(self.each(), count)
                count -= min(self.each(), count)
        return tuple(fresh)

    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Leave it to the verdict: lrkit cuts the losers, and adds the fresh components."""
        return


@attrs.frozen(kw_only=True)
class Grow(_Elastic):
    """The layers with the best scores get one more component each. Source: IncreLoRA, arXiv 2308.12043.

    A layer's score is the mean of its components' scores. What the budget has room for is added; where the budget falls
    below what there is, the components with the lowest scores are cut for good, but never a layer's last one.

    Args:
        modules: h, how many layers get components at a decision. None: as many as the budget has room for, so that the
            schedule alone sets the pace.
        rank: how many components each of them gets.
        core: λ of a new component; 0 leaves all outputs exactly as they are.
        by: a layer's score is the ``"mean"`` or the ``"sum"`` of its components' scores.
    """

    modules: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))
    rank: int = attrs.field(default=1, validator=whole(1))

    def comes(self, room: int, layers: int) -> int:
        """As much as there is room for, but no more than h layers get."""
        return room if self.modules is None else min(room, min(self.modules, layers) * self.rank)

    def each(self) -> int:
        """The setting `rank`."""
        return self.rank


@attrs.frozen(kw_only=True)
class Exchange(_Elastic):
    """The b worst components of all layers are cut, and the best layers get one each. Source: ElaLoRA, arXiv 2504.00254.

    So many are added as the budget has room for after the cut: b, where it does not change. A layer's score is the mean
    of the scores of the components that it keeps. Its last component is never cut, since a layer without any has no score
    by which it could get one again.

    Args:
        count: b.
        core: λ of a new component; 0 leaves all outputs exactly as they were after the cut.
        by: a layer's score is the ``"mean"`` or the ``"sum"`` of its components' scores.
    """

    count: int = attrs.field(default=4, validator=whole(1))

    def refusal(self, parameterization: lrkit.Parameterization) -> str | None:
        """With one component a layer there is nothing that could be exchanged."""
        if parameterization.components is not None and most_of(parameterization.components) == 1:
            return "a layer's last component is never cut, so that there is nothing to exchange at rank 1"
        return None

    def goes(self, units: int, budget: int) -> int:
        """b, or more where the budget falls faster."""
        return max(self.count, units - budget)
