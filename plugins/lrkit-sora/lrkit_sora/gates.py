"""The three parts of SoRA that lrkit has not: gates, a threshold on them, and stages (Ding et al., arXiv 2311.11696)."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

import lrkit
from lrkit.actions import Ballot, Fate, Verdict
from lrkit.parameterizations import LowRank, Target
from lrkit.parameterizations.lowrank import new_factor
from lrkit.ranks import SCALES, Rank, ScaleBy, as_rank, is_rank
from lrkit.settings import one_of, real, whole
from lrkit.units import UnitKind, split


@attrs.frozen(kw_only=True)
class GatedLoRA(lrkit.Parameterization):
    """ΔW = (α/r) B diag(g) A: LoRA with a gate for each component. Source: arXiv 2311.11696, section 3.1.

    A [r, d_in] is Kaiming-uniform (a = √5), B [d_out, r] zero, and g [r] standard Gaussian at first.

    Args:
        rank: r, r_max in the paper; or a table of layer or pattern to rank.
        alpha: α; the increment is scaled by α/r, with the rank at the start.
        scale_by: the r of the scale if ranks differ: each layer's ``"own-rank"``, or the ``"mean-rank"`` over all layers.
        dropout: probability of dropping an entry of the adapter's input while training.
    """

    learning_rate: ClassVar[float] = 1e-3

    rank: Rank = attrs.field(default=4, converter=as_rank, validator=is_rank())
    alpha: float = attrs.field(default=16.0, validator=real(0.0, above=True))
    dropout: float = attrs.field(default=0.0, validator=real(0.0, 1.0, below=True))
    scale_by: ScaleBy = attrs.field(default="own-rank", validator=one_of(SCALES))

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        """The gates, B and A."""
        return (
            lrkit.Part("core", axis=0, core=True),
            lrkit.Part("B", axis=1, matrix=True),
            lrkit.Part("A", axis=0, matrix=True),
        )

    @property
    def components(self) -> Rank:
        """r."""
        return self.rank

    def build(self, target: Target) -> nn.Module:
        """The layer with A, g and B beside it."""
        rank = target.components_of(self.rank)
        a = new_factor(target.layer, rank, target.d_in)
        if rank:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = new_factor(target.layer, target.d_out, rank)
        nn.init.zeros_(b)
        gate = new_factor(target.layer, rank)
        nn.init.normal_(gate)
        scaling = self.alpha / target.scale_rank(self.rank, self.scale_by)
        return LowRank(target, a, b, core=gate, scaling=scaling, dropout=self.dropout)


@attrs.frozen(kw_only=True)
class Staged(lrkit.Scheduler):
    """From start to target in equal steps of the amount, each as long as the others. Source: arXiv 2311.11696, Algorithm 1.

    Stage k of n begins at u = (k - 1)/n of the way from t_i to T - t_f, and has (n - k)/n of what lies between start and
    target. A threshold that grows as the share falls (`SoftThreshold`) is k/n of its strength in stage k.

    Args:
        stages: n.
    """

    stages: int = attrs.field(default=6, validator=whole(1))

    def decay(self, progress: float) -> float:
        """1 - ⌈n u⌉ / n."""
        return 1.0 - math.ceil(self.stages * progress - 1e-9) / self.stages


def soft_threshold(values: Tensor, threshold: Tensor) -> Tensor:
    """sign(v) max(abs(v) - ξ, 0), the proximal operator of ξ abs(v): arXiv 2311.11696, Eq. 8.

    Args:
        values: v [n].
        threshold: ξ [n], not negative.
    """
    return values.sign() * (values.abs() - threshold).clamp_min(0)


@attrs.frozen(kw_only=True)
class SoftThreshold(lrkit.Action):
    """Shrink every core value by ξ at each decision; what becomes zero is out, until its gradient brings it back.

    Source: arXiv 2311.11696, section 3.2, Eq. 8, the proximal operator of the L1 penalty, with ξ = η λ: η is the learning
    rate of the core values' parameter group at this step. λ rises from zero to `strength` as the scheduler's share falls:
    λ = strength · (1 - share). The scheduler's budget is no number of units here: who is kept follows from the values alone.

    Args:
        strength: λ at share 0.
        variant: ``"paper"``; or ``"released"``, the code's: ξ = λ whatever the learning rate, and a value is zero below 2 ξ,
            since the code compares what it has shrunk already with ξ again.
    """

    fate: ClassVar[Fate] = "masked"
    exact = False  # for its contract: who is kept follows from the values, and no number is asked for

    strength: float = attrs.field(default=0.6, validator=real(0.0))
    variant: Literal["paper", "released"] = attrs.field(default="paper", validator=one_of(("paper", "released")))

    @property
    def unit(self) -> UnitKind:
        """Rank components."""
        return "component"

    def refusal(self, parameterization: lrkit.Parameterization) -> str | None:
        """A threshold needs a core value."""
        if not any(part.core and part.trains for part in parameterization.parts):
            return "a threshold acts on a component's core value (a gate, λ), and this parameterization has none"
        return None

    @torch.no_grad()
    def proximal(self, blocks: Sequence[lrkit.Block], share: float, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """The proximal step on all core values; what is zero after it is out."""
        if self.variant == "paper" and any(group["lr"] is None for group in optimizer.param_groups):
            raise lrkit.LrkitError(
                f"ξ = η λ needs a learning rate, and {type(optimizer).__name__} has lr=None: give it one, or "
                'SoftThreshold(variant="released")'
            )
        rates = {id(p): float(group["lr"] or 0.0) for group in optimizer.param_groups for p in group["params"]}
        level = self.strength * (1.0 - share)
        cores: list[Tensor] = [block.core for block in blocks]
        thresholds = [level * rates.get(id(core), 0.0) if self.variant == "paper" else level for core in cores]
        counts = torch.tensor([block.count for block in blocks], device=cores[0].device)
        threshold = torch.tensor(thresholds, device=cores[0].device, dtype=cores[0].dtype).repeat_interleave(counts)
        values = torch.cat(cores)
        if level > 0:
            values = soft_threshold(values, threshold)
            if self.variant == "released":
                values = torch.where(values.abs() < threshold, 0.0, values)
            torch._foreach_copy_(cores, split(values, blocks))
        return values != 0

    @torch.no_grad()
    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Zero the core values of those that are out."""
        cores: list[Tensor] = [block.core for block in blocks]
        torch._foreach_mul_(cores, split(kept.to(cores[0]), blocks))

    def decide(self, ballot: Ballot) -> Verdict:
        """Keep all that the proximal step has left: no number is asked for."""
        return Verdict(ballot.candidates, budget=len(ballot.scores))

    def turnover(self, units: int, budget: int, layers: int) -> None:
        """Return None: how many gates go is known only after the run."""
        return
