"""The parts of L1RA: a rank vector beside LoRA, an L1 step on it, and ranks that move (Singh et al., arXiv 2509.04884)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

import lrkit
from lrkit.actions import Ballot, Fate, Verdict
from lrkit.parameterizations import LowRank, Target
from lrkit.parameterizations.adapter import further, started
from lrkit.parameterizations.lowrank import new_factor
from lrkit.ranks import SCALES, Rank, ScaleBy, as_rank, is_rank
from lrkit.settings import flag, one_of, real
from lrkit.units import UnitKind


@attrs.frozen(kw_only=True)
class RankVectorLoRA(lrkit.Parameterization):
    """ΔW = (α/r) B diag(c) A: LoRA with a weight for each component. Source: arXiv 2509.04884, and its released code.

    A [r, d_in] is Gaussian with standard deviation 1/r, B [d_out, r] zero, and c [r] one at first. The scale keeps the r of
    the start. The adapter stores c/pace, so that an optimizer that moves all entries alike moves c so many times as fast.

    Args:
        rank: r; or a table of layer or pattern to rank.
        alpha: α; the increment is scaled by α/r, with the rank at the start.
        pace: how many times as fast as A and B c learns; 1 if c has a parameter group of its own.
        scale_by: the r of the scale if ranks differ: each layer's ``"own-rank"``, or the ``"mean-rank"`` over all layers.
        dropout: probability of dropping an entry of the adapter's input while training.
    """

    rank: Rank = attrs.field(default=8, converter=as_rank, validator=is_rank())
    alpha: float = attrs.field(default=8.0, validator=real(0.0, above=True))
    pace: float = attrs.field(default=20.0, validator=real(0.0, above=True))
    scale_by: ScaleBy = attrs.field(default="own-rank", validator=one_of(SCALES))
    dropout: float = attrs.field(default=0.0, validator=real(0.0, 1.0, below=True))

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        """Declare c, B and A."""
        return (
            lrkit.Part("core", axis=0, core=True),
            lrkit.Part("B", axis=1, matrix=True),
            lrkit.Part("A", axis=0, matrix=True),
        )

    @property
    def components(self) -> Rank:
        """Return r."""
        return self.rank

    def build(self, target: Target) -> nn.Module:
        """Return the layer with A, c and B beside it."""
        rank, layer = target.components_of(self.rank), target.layer
        a, b, core = (
            new_factor(layer, rank, target.d_in),
            new_factor(layer, target.d_out, rank),
            new_factor(layer, rank),
        )
        nn.init.normal_(a, std=target.maps / max(rank, 1))
        nn.init.zeros_(b)
        nn.init.constant_(core, 1 / self.pace)
        scaling = self.pace * self.alpha / target.scale_rank(self.rank, self.scale_by)
        adapter = LowRank(target, a, b, core=core, scaling=scaling, dropout=self.dropout)
        adapter.gate = 1 / self.pace
        return adapter

    def fresh(
        self, module: nn.Module, count: int, generator: torch.Generator, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draw further rows of A, and make columns of B, zero, as at the start."""
        _, b, a = self.parts
        assert isinstance(module, LowRank)
        std = module.maps / max(module.first_rank, 1)
        rows = nn.init.normal_(further(module, a, count), std=std, generator=generator)
        return {"A": started(module, a, rows), "B": nn.init.zeros_(further(module, b, count))}


@attrs.frozen(kw_only=True)
class Shrink(lrkit.Action):
    """c ← min(max(c - η λ, 0), most) at each decision: where c is zero a component is out, until a gradient brings it back.

    This is the proximal step of an L1 penalty on weights between 0 and `most`; η is the learning rate of c's group. Source:
    arXiv 2509.04884, and its released code: an L1 term in the optimizer, decoupled from the gradient as weight decay is in
    AdamW, and a clamp before each forward pass. The scheduler's budget is no number of units here.

    Args:
        strength: λ.
        most: the largest c.
    """

    fate: ClassVar[Fate] = "masked"
    exact = False  # for its contract: who is kept follows from the values, and no number is asked for

    strength: float = attrs.field(default=0.1, validator=real(0.0))
    most: float = attrs.field(default=1.0, validator=real(0.0, above=True))

    @property
    def unit(self) -> UnitKind:
        """Rank components."""
        return "component"

    def refusal(self, parameterization: lrkit.Parameterization) -> str | None:
        """Ask for a core value, which is what shrinks."""
        if not any(part.core and part.trains for part in parameterization.parts):
            return "an L1 step acts on a component's core value (c, λ), and this parameterization has none that trains"
        return None

    @torch.no_grad()
    def proximal(self, blocks: Sequence[lrkit.Block], share: float, optimizer: torch.optim.Optimizer) -> Tensor:
        """Shrink all core values; those that are zero after it are out."""
        if any(group["lr"] is None for group in optimizer.param_groups):
            raise lrkit.LrkitError(
                f"c - η λ needs a learning rate, and {type(optimizer).__name__} has lr=None: give it one"
            )
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        cores: list[Tensor] = [block.core for block in blocks]
        torch._foreach_sub_(cores, [self.strength * rates.get(id(core), 0.0) for core in cores])
        torch._foreach_clamp_min_(cores, 0.0)
        torch._foreach_clamp_max_(cores, self.most)
        return torch.cat(cores) != 0

    def decide(self, ballot: Ballot) -> Verdict:
        """Keep all that the proximal step has left: no number is asked for."""
        return Verdict(ballot.candidates, budget=len(ballot.scores))

    @torch.no_grad()
    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Zero the core values of those that are out."""
        cores: list[Tensor] = [block.core for block in blocks]
        torch._foreach_mul_(cores, list(torch.split(kept.to(cores[0]), [block.count for block in blocks])))

    def turnover(self, units: int, budget: int, layers: int) -> None:
        """Return None: how many go is known only after the run."""
        return


@attrs.frozen(kw_only=True)
class Reassign(lrkit.Action):
    """Cut the components whose score is zero, and give as many fresh ones to the layers whose lowest score is highest.

    A layer's last component stays. Layers that have lost none, in the order of their lowest score from the highest, get one
    in turn until all are given; if there is no such layer, nobody gets any, and the ranks are gone. Source: arXiv
    2509.04884, and its released code (``update_ranks``), where the score is c.

    Args:
        threshold: a score below it counts as zero.
        core: the core value of a fresh component.
        exclude_pruned: whether layers that had a component to cut get none.
        restart: whether the optimizer's state of all adapters is dropped when ranks move.
    """

    fate: ClassVar[Fate] = "removed"
    final: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    exact = False  # for its contract: who is kept follows from the scores alone

    threshold: float = attrs.field(default=1e-10, validator=real(0.0, above=True))
    core: float = attrs.field(default=1.0, validator=real(0.0, above=True))
    exclude_pruned: bool = attrs.field(default=True, validator=flag())
    restart: bool = attrs.field(default=True, validator=flag())

    @property
    def unit(self) -> UnitKind:
        """Rank components."""
        return "component"

    def decide(self, ballot: Ballot) -> Verdict:
        """Choose what is cut, and deal out as many."""
        scores, layers = ballot.scores.tolist(), [[] for _ in range(ballot.layers)]  # type: list[float], list[list[int]]
        for unit, layer in enumerate(ballot.blocks.tolist()):
            layers[layer].append(unit)
        out = [[unit for unit in units if scores[unit] < self.threshold] for units in layers]
        cut = [unit for units, gone in zip(layers, out, strict=True) for unit in (gone[:-1] if gone == units else gone)]
        takers = [at for at, units in enumerate(layers) if units and not (self.exclude_pruned and out[at])]
        takers.sort(key=lambda at: -min(scores[unit] for unit in layers[at]))
        fresh = [0] * ballot.layers
        for turn in range(len(cut) if takers else 0):
            fresh[takers[turn % len(takers)]] += 1
        kept = ballot.candidates.clone()
        kept[cut] = False
        return Verdict(kept, cut=True, fresh=tuple(fresh), core=self.core)

    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Drop the optimizer's state if ranks move; lrkit cuts and adds the components."""
        if self.restart and optimizer is not None and not bool(kept.all()):
            for tensor in (tensor for block in blocks for tensor in block.tensors):
                optimizer.state.pop(tensor, None)

    def turnover(self, units: int, budget: int, layers: int) -> None:
        """Return None: how many ranks move is known only after the run."""
        return
