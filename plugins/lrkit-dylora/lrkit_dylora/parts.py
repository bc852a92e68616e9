"""The parts of DyLoRA: LoRA behind gates, a score by place, and a draw (Valipour et al., arXiv 2210.07558)."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor, nn

import lrkit
from lrkit.actions import Ballot, Fate, Verdict
from lrkit.metrics import Parts
from lrkit.parameterizations import LowRank, Target
from lrkit.parameterizations.lowrank import new_factor
from lrkit.ranks import SCALES, Rank, ScaleBy, as_rank, is_rank
from lrkit.settings import Amount, count_or_share, one_of, real, whole
from lrkit.shards import held, mine
from lrkit.units import UnitKind, split

Updates = Literal["all", "row"]


class Nested(LowRank):
    """A low-rank adapter of which the open components alone act: y = W x + (α/b) B[:, :b] A[:b] x, b gates being open.

    The gates are the core, 1 or 0, and never train.

    Args:
        target: the layer.
        a: A [r, d_in].
        b: B [d_out, r].
        scaling: α/r.
        dropout: probability with which an entry of the adapter's input is dropped while training.
        row: whether the last open component alone trains.
    """

    def __init__(
        self, target: Target, a: nn.Parameter, b: nn.Parameter, *, scaling: float, dropout: float, row: bool
    ) -> None:
        gates = new_factor(target.layer, len(a))
        nn.init.ones_(gates)
        gates.requires_grad_(False)
        super().__init__(target, a, b, core=gates, scaling=scaling, dropout=dropout)
        self.row = row
        self.gate = 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A [r, d_in], and B [d_out, r] times r/b; both without a graph but for what trains."""
        (a, b), gates = super().factors(), self.core
        assert gates is not None
        if self.row:
            last = (gates != 0) & (nn.functional.pad(gates, (0, 1))[1:] == 0)
            a, b = torch.where(last[:, None], a, a.detach()), torch.where(last, b, b.detach())
        return a, b * (self.first_rank / gates.sum().clamp_min(1))


@attrs.frozen(kw_only=True)
class NestedLoRA(lrkit.Parameterization):
    """ΔW = (α/b) B[:, :b] A[:b]: LoRA whose first b components act alone, for any b. Source: arXiv 2210.07558, section 3.

    A [r, d_in] is Kaiming-uniform (a = √5) and B [d_out, r] zero at first, and all components act.

    Args:
        rank: r, the largest rank; or a table of layer or pattern to rank.
        alpha: α; the increment is scaled by α/b, which is α/r times the released code's two factors √(r/b).
        updates: which components train if the first b act: ``"all"`` of them; or the b-th ``"row"`` alone, the paper's
            frozen mode.
        scale_by: the r of the scale if ranks differ: each layer's ``"own-rank"``, or the ``"mean-rank"`` over all layers.
        dropout: probability of dropping an entry of the adapter's input while training.
    """

    rank: Rank = attrs.field(default=8, converter=as_rank, validator=is_rank())
    alpha: float = attrs.field(default=16.0, validator=real(0.0, above=True))
    updates: Updates = attrs.field(default="all", validator=one_of(("all", "row")))
    scale_by: ScaleBy = attrs.field(default="own-rank", validator=one_of(SCALES))
    dropout: float = attrs.field(default=0.0, validator=real(0.0, 1.0, below=True))

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        """Declare the gates, A and B."""
        return (
            lrkit.Part("core", axis=0, core=True, trains=False),
            lrkit.Part("A", axis=0, matrix=True),
            lrkit.Part("B", axis=1, matrix=True),
        )

    @property
    def components(self) -> Rank:
        """Return r."""
        return self.rank

    def build(self, target: Target) -> nn.Module:
        """Return the layer with A, B and gates beside it."""
        if target.maps > 1:
            raise lrkit.LrkitError(
                f"{target.name}: NestedLoRA takes one map at a time, and this layer stacks {target.maps}"
            )
        rank = target.rank_of(self.rank)
        a, b = new_factor(target.layer, rank, target.d_in), new_factor(target.layer, target.d_out, rank)
        if rank:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)
        scaling = self.alpha / target.scale_rank(self.rank, self.scale_by)
        return Nested(target, a, b, scaling=scaling, dropout=self.dropout, row=self.updates == "row")


@attrs.frozen(kw_only=True)
class Position(lrkit.Metric):
    """A component's place in its layer: the first has the best score. Source: arXiv 2210.07558, whose ranks are nested.

    It reads neither weights nor gradients.

    Args:
        measure: without effect, since nothing is measured.
    """

    reads: ClassVar[Literal["all", "core", "component"]] = "component"

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Zero for every entry [N]: `reduce` counts."""
        return weight.new_zeros(weight.shape)

    def reduce(self, parts: Parts) -> Tensor:
        """0, -1, -2, ... in each block [blocks, units]."""
        blocks, units, _ = parts[0].shape
        return -torch.arange(units, dtype=torch.float32, device=parts[0].device).expand(blocks, units).contiguous()


@attrs.frozen(kw_only=True)
class AtEachStep(lrkit.schedulers.Constant):
    """All of the budget, from step 0 to the end: a decision before the first step, and then after each. Source: lrkit's own.

    For actions that draw at every step.
    """

    at_start = True

    target: Amount = attrs.field(default=1.0, validator=count_or_share())


@attrs.frozen(kw_only=True)
class Draw(lrkit.Action):
    """At each decision a rank b is drawn, one for all layers, and each layer's b best components act until the next.

    At the last decision all components act again, or the first `rank`. Who is kept follows from the draw and from the
    scores; the scheduler says when, and its budget is not asked for. Source: arXiv 2210.07558, Algorithm 1, with a uniform
    distribution of b.

    Args:
        least: r_min, the smallest b.
        rank: how many components of each layer act in the end; None for all.
    """

    fate: ClassVar[Fate] = "masked"
    exact = False  # for its contract: the number is drawn

    least: int = attrs.field(default=1, validator=whole(1))
    rank: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole(1)))

    @property
    def unit(self) -> UnitKind:
        """Rank components."""
        return "component"

    def refusal(self, parameterization: lrkit.Parameterization) -> str | None:
        """Ask for gates."""
        if not any(part.core and not part.trains for part in parameterization.parts):
            return "a draw opens and shuts gates, core values that never train, and this parameterization has none"
        return None

    def turnover(self, units: int, budget: int, layers: int) -> None:
        """Return None: how many act is drawn."""
        return

    def decide(self, ballot: Ballot) -> Verdict:
        """Draw b, and keep each block's b best."""
        counts = torch.bincount(ballot.blocks, minlength=1)
        most = int(counts.max())
        if ballot.last:
            rank = most if self.rank is None else self.rank
        else:
            rank = int(torch.randint(min(self.least, most), most + 1, (), generator=ballot.generator))
        order = torch.sort(ballot.scores, descending=True, stable=True).indices
        order = order[torch.sort(ballot.blocks[order], stable=True).indices]  # block by block, the best first
        first = counts.cumsum(0) - counts
        kept = torch.zeros_like(ballot.candidates)
        kept[order] = torch.arange(len(order), device=order.device) - first[ballot.blocks[order]] < rank
        return Verdict(kept, budget=int(kept.sum()))

    @torch.no_grad()
    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Open the gates of those that are kept, and shut the others."""
        for block, open_ in zip(blocks, split(kept, blocks), strict=True):
            gates = block.module.get_parameter("core")
            held(gates).copy_(mine(open_, gates))


def truncate(adapted: lrkit.Adapted, rank: int) -> None:
    """Let the first `rank` components of each layer act alone, at the scale of that rank. Call it after training.

    Nothing is lost: another rank can follow, up to the one that was trained. ``adapted.compact()`` then cuts the others for
    good; ``adapted.save``, ``merge`` and the export to PEFT write the model of this rank.

    Args:
        adapted: a model that was trained by `Draw`.
        rank: r.

    Raises:
        LrkitError: no policy draws, the run has not ended, or r is below 1 or above every layer's rank.
    """
    drawn = [state for state in adapted.controller.policies if isinstance(state.policy.action, Draw)]
    if not drawn:
        raise lrkit.LrkitError(
            f"truncate takes a model whose ranks were drawn, by dylora, not {adapted.method.action!r}"
        )
    if type(rank) is not int or rank < 1:
        raise lrkit.LrkitError(f"rank must be a whole number from 1 on, not {rank!r}")
    if not all(state.ended for state in drawn):
        raise lrkit.LrkitError(f"truncate goes after the last step, and this run is at step {adapted.step}")
    if rank > (most := max(block.count for state in drawn for block in state.blocks)):
        raise lrkit.LrkitError(f"rank {rank} was not trained: the highest is {most}")
    for state in drawn:
        places = torch.cat([torch.arange(block.count) for block in state.blocks])
        state.kept = (places < rank).to(state.kept.device)
        state.policy.action.apply(state.blocks, state.kept, None)
    adapted.controller.components.survey(adapted.step)
