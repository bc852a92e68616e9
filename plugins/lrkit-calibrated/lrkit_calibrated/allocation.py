"""Actions that give each layer a rank, once, before the first step."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

import lrkit
from lrkit.actions import Ballot, Fate, Verdict, best
from lrkit.ranks import Rank
from lrkit.settings import one_of, whole
from lrkit.units import UnitKind
from lrkit_calibrated.shares import filled, saturated, shares_of


@attrs.frozen(kw_only=True)
class _Allocation(lrkit.Action):
    fate: ClassVar[Fate] = "removed"
    final: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    exact = False  # for its contract: what a layer gets is fresh, and not what was there

    @property
    def unit(self) -> UnitKind:
        """Rank components."""
        return "component"

    def refusal(self, parameterization: lrkit.Parameterization) -> str | None:
        """Components that are given begin with an increment of zero only where no core value scales them."""
        if any(part.core for part in parameterization.parts):
            return "it gives layers fresh components, whose core value (λ) it does not know"
        if any(part.started for part in parameterization.parts):
            return "it draws all components anew, and those that go would take pieces of the base's weight with them"
        return None

    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Leave it to the verdict: lrkit cuts what is there, and adds what is fresh."""
        return

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int] | None:
        """All go, and as many come as there is room for."""
        return units, budget


@attrs.frozen(kw_only=True)
class Allocate(_Allocation):
    """Each layer gets as many fresh components as it has among the best of all. Source: EVA, arXiv 2410.07170, Algorithm 1.

    The components that are there at first are candidates, that is, places in a ranking: a layer can get no more than it
    has. All of them are cut, and the parameterization draws the fresh ones, from what the metric keeps of the layer.
    """

    def decide(self, ballot: Ballot) -> Verdict:
        """Count the best of all candidates by layer (`lrkit.actions.best`)."""
        counts = torch.bincount(ballot.blocks[best(ballot)], minlength=ballot.layers)
        return Verdict(torch.zeros_like(ballot.candidates), cut=True, fresh=tuple(counts.tolist()))


@attrs.frozen(kw_only=True)
class ShareOut(_Allocation):
    """Each layer gets a rank in proportion to its importance, the mean of its components' scores. All are drawn anew.

    Sources: FIM-LoRA, arXiv 2605.16800, section 3, and its author's code; GoRA, arXiv 2502.12171, Eq. 5 to 8.

    Args:
        least: the lowest rank of a layer that has components.
        most: the highest.
        rule: how whole numbers come from shares. ``"filled"``: by water-filling between both bounds and largest remainders,
            so that the ranks' sum is the budget, exactly. ``"saturated"``: FIM-LoRA's released code, which raises low shares
            to `least` at the end, at the cost of the least important others. ``"rounded"``: GoRA's paper: of
            b = Σ r √(m + n) over all layers a layer of m x n gets its share over √(m + n), rounded, then put between the
            bounds; the ranks' sum is about the budget, and no more is promised. ``"floored"``: GoRA's released code: the
            same with m + n, rounded down.
    """

    least: int = attrs.field(default=1, validator=whole(0))
    most: int = attrs.field(default=16, validator=whole(1))
    rule: Literal["filled", "saturated", "rounded", "floored"] = attrs.field(
        default="filled", validator=one_of(("filled", "saturated", "rounded", "floored"))
    )

    def __attrs_post_init__(self) -> None:
        """Refuse a least above the most."""
        if self.least > self.most:
            raise lrkit.LrkitError(f"ShareOut: least {self.least} is above most {self.most}")

    def around(self, rank: Rank) -> "ShareOut":
        """Return it, if its bounds have room for the ranks' sum. Raise LrkitError if all ranks lie beyond one of them."""
        ranks = [rank] if isinstance(rank, int) else list(rank.values())
        if max(ranks) < self.least or min(ranks) > self.most:
            told = f"a mean rank of {ranks[0]}" if isinstance(rank, int) else f"ranks of {min(ranks)} to {max(ranks)}"
            raise lrkit.LrkitError(
                f"{told} cannot be kept with least {self.least} and most {self.most} a layer: the sum would be another"
            )
        return self

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int] | None:
        """As many come as the budget says, but for rules that round each rank for itself: None."""
        return super().turnover(units, budget, layers) if self.rule in ("filled", "saturated") else None

    def decide(self, ballot: Ballot) -> Verdict:
        """Share out the budget among the layers that have components."""
        there = torch.bincount(ballot.blocks, minlength=ballot.layers)
        sums = torch.zeros(ballot.layers, dtype=torch.float64, device=ballot.scores.device)
        sums.index_add_(0, ballot.blocks, ballot.scores.double())
        layers = there.nonzero().flatten().tolist()
        importance = (sums / there.clamp_min(1))[layers].tolist()
        ranks = [0] * ballot.layers
        for layer, rank in zip(
            layers, self._ranks(importance, self._sizes(ballot, layers), ballot.budget), strict=True
        ):
            ranks[layer] = rank
        return Verdict(torch.zeros_like(ballot.candidates), cut=True, fresh=tuple(ranks))

    def _sizes(self, ballot: Ballot, layers: Sequence[int]) -> list[float]:
        """Return the entries of one component of each layer: m + n of LoRA."""
        if ballot.sizes is None:
            return [1.0] * len(layers)
        sizes = torch.zeros(ballot.layers, dtype=torch.float64, device=ballot.sizes.device)
        sizes[ballot.blocks] = ballot.sizes.double()
        return list(sizes[layers].tolist())

    def _ranks(self, importance: Sequence[float], sizes: Sequence[float], budget: int) -> list[int]:
        exact: dict[str, Callable[..., list[int]]] = {"filled": filled, "saturated": saturated}
        if self.rule in exact:
            return exact[self.rule](importance, budget, self.least, self.most)
        weights = [size**0.5 for size in sizes] if self.rule == "rounded" else list(sizes)
        shares = shares_of(importance, sum(weights) * budget / len(weights))
        if self.rule == "rounded":
            ranks = [round(share / weight) for share, weight in zip(shares, weights, strict=True)]
        else:
            ranks = [int(round(share) // weight) for share, weight in zip(shares, weights, strict=True)]
        return [min(max(rank, self.least), self.most) for rank in ranks]
