"""The parts of FIM-LoRA: a mean squared gradient, and ranks in proportion to it (arXiv 2605.16800)."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

import lrkit
from lrkit.actions import Ballot, Fate, Verdict
from lrkit.settings import whole
from lrkit.units import UnitKind


@attrs.frozen(kw_only=True)
class Fisher(lrkit.Metric):
    """F = mean over the steps seen of g²: the diagonal of the empirical Fisher information. Source: arXiv 2605.16800.

    g is the gradient of a batch's mean loss, so that F is smaller than one of single rows would be.
    """

    buffers = ("fisher",)

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """Take in g²: F += (g² - F) / step."""
        state["fisher"].lerp_(grad * grad, 1 / step)

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """F [N]."""
        return state["fisher"].clone()


def shared(scores: Sequence[float], budget: int, least: int, most: int) -> list[int]:
    """Share out ranks in proportion to scores, each from `least` to `most`.

    First layers whose share reaches `most` get it, and the rest is shared anew among the others, until none does. Then the
    largest remainders are rounded up, and what a layer lacks to `least` is taken from those with the lowest scores that can
    give. Source: the released code of FIM-LoRA (``allocate_ranks``).

    For example scores of 1, 2 and 9 share 12 ranks as 1, 3 and 8 if none may have more than 8.

    Args:
        scores: of the layers, not negative.
        budget: their ranks together. Beyond what `least` and `most` allow it is missed.
        least: r_min.
        most: r_max.
    """
    weights = [max(score, 1e-10) for score in scores]
    ranks, free, left = [0] * len(weights), list(range(len(weights))), budget
    while free:
        total = sum(weights[at] for at in free)
        shares = {at: weights[at] / total * left for at in free}
        full = [at for at in free if math.floor(shares[at]) >= most]
        if not full:
            break
        for at in full:
            ranks[at] = most
        left -= most * len(full)
        free = [at for at in free if at not in full]
    for at in free:
        ranks[at] = math.floor(shares[at])
    by_remainder = sorted(free, key=lambda at: ranks[at] - shares[at])
    for at in by_remainder[: left - sum(ranks[at] for at in free)]:
        ranks[at] += 1
    lacking = sum(max(0, least - ranks[at]) for at in free)
    for at in free:
        ranks[at] = max(least, ranks[at])
    for at in sorted(free, key=lambda at: weights[at]):
        gives = min(ranks[at] - least, lacking)
        ranks[at] -= gives
        lacking -= gives
    return ranks


@attrs.frozen(kw_only=True)
class Apportion(lrkit.Action):
    """Each layer gets a rank in proportion to its score: components are cut, or fresh ones come. Source: arXiv 2605.16800.

    A layer's score is the mean of its components' scores. All ranks together are the scheduler's budget. Where a layer
    gets fewer than it has, those with the lowest scores are cut.

    Args:
        least: r_min.
        most: r_max; None for twice the mean rank.
    """

    fate: ClassVar[Fate] = "removed"
    final: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    exact = False  # for its contract: every layer has its least, whatever the budget

    least: int = attrs.field(default=1, validator=whole(1))
    most: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))

    @property
    def unit(self) -> UnitKind:
        """Rank components."""
        return "component"

    def decide(self, ballot: Ballot) -> Verdict:
        """Share out the budget; keep the best of each layer."""
        scores = ballot.scores.double().clamp_min(0).tolist()
        layers: list[list[int]] = [[] for _ in range(ballot.layers)]
        where = ballot.blocks.tolist()
        for unit in ballot.candidates.nonzero().flatten().tolist():
            layers[where[unit]].append(unit)
        there = [at for at, units in enumerate(layers) if units]
        means = [sum(scores[unit] for unit in layers[at]) / len(layers[at]) for at in there]
        most = max(self.least, 2 * ballot.budget // max(1, len(there)) if self.most is None else self.most)
        kept, fresh = torch.zeros_like(ballot.candidates), [0] * ballot.layers
        for at, rank in zip(there, shared(means, ballot.budget, self.least, most), strict=True):
            best = sorted(layers[at], key=lambda unit: -scores[unit])[:rank]
            kept[best] = True
            fresh[at] = rank - len(best)
        return Verdict(kept, cut=True, fresh=tuple(fresh))

    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Leave it to the verdict: lrkit cuts the losers, and adds the fresh components."""
        return

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int]:
        """Return what goes and comes on balance."""
        return max(0, units - budget), max(0, budget - units)
