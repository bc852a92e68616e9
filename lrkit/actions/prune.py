"""Prune: a mask on the core value, reversible or final (AdaLoRA, arXiv 2303.10512, Eq. 5 and 6)."""

from collections.abc import Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor

from lrkit.actions.base import BY, Action, Ballot, By, Fate, Verdict, best, worth
from lrkit.parameterizations.base import Parameterization
from lrkit.settings import one_of
from lrkit.shards import held, mine
from lrkit.units import Block, UnitKind, split


@attrs.frozen(kw_only=True)
class Prune(Action):
    """λ_i = 0 unless component i is kept. Source: arXiv 2303.10512, Eq. 5 and 6.

    The component's vectors are kept and go on training, and so does λ_i until the next decision: a component whose
    score rises comes back. After the last decision the masked λ are held at zero.

    A component that cannot come back can be cut: out of the tensors, the statistics and the optimizer's state, so that
    from then on it costs nothing. The outputs do not change. Later steps do, a little: masked vectors still take part in an
    orthogonality penalty and in the norm that gradients are clipped to; those that are cut do not.

    Args:
        cut: ``"never"``, as the paper has it. ``"end"``: what is masked by the last decision is cut. ``"always"``: what
            loses is cut at once, so that pruning is final.
        ties: ``"budget"``: exactly b(t) components are kept, ties to the earlier one. ``"threshold"``: those above the
            (n - b)-th smallest score, as the released code and PEFT have it: ties at the threshold all lose. Where the
            schedule counts costs, the threshold is the score of the best component for which there is no room.
        by: how units that differ in cost are ranked, if the schedule counts costs (`lrkit.Scheduler`, `amount`): by
            ``"score"``, or by ``"score-per-cost"``, so that two cheap components may take the place of a dear one.
    """

    cut: Literal["never", "end", "always"] = attrs.field(default="never", validator=one_of(("never", "end", "always")))
    ties: Literal["budget", "threshold"] = attrs.field(default="budget", validator=one_of(("budget", "threshold")))
    by: By = attrs.field(default="score", validator=one_of(BY))

    @property
    def fate(self) -> Fate:  # type: ignore[override]
        """Masked; removed if anything is cut."""
        return "masked" if self.cut == "never" else "removed"

    def decide(self, ballot: Ballot) -> Verdict:
        """Choose who is kept, by the rule that `ties` names."""
        cut = self.cut == "always" or (self.cut == "end" and ballot.last)
        if self.ties == "budget":
            return Verdict(best(ballot, self.by), cut)
        ranks = worth(ballot, self.by)
        order = torch.sort(ranks, descending=True, stable=True).indices
        spent = (torch.ones_like(order) if ballot.costs is None else ballot.costs[order]).cumsum(0)
        beyond = order[spent > ballot.budget]
        return Verdict(ranks > ranks[beyond[0]] if len(beyond) else ballot.candidates, cut)

    @property
    def unit(self) -> UnitKind:
        """Rank components."""
        return "component"

    def refusal(self, parameterization: Parameterization) -> str | None:
        """Ask for a core value, on which the mask lies."""
        if not any(part.core and part.trains for part in parameterization.parts):
            return "pruning zeroes a component's core value (λ), and this parameterization has none"
        return None

    @torch.no_grad()
    def apply(self, blocks: Sequence[Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Zero the core value of every component that is not kept."""
        cores = [block.core for block in blocks]
        masks = split(kept.to(cores[0].device, cores[0].dtype), blocks)
        here = [mine(mask.to(core.device), core) for mask, core in zip(masks, cores, strict=True)]
        torch._foreach_mul_([held(core) for core in cores], here)
