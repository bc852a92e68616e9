"""LoRA: ΔW = (α/r) B A (Hu et al., arXiv 2106.09685, section 4.1)."""

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from lrkit.parameterizations.adapter import further, new_factor
from lrkit.parameterizations.base import Parameterization, Target
from lrkit.parameterizations.lowrank import LowRank
from lrkit.ranks import DIVISORS, SCALES, Rank, Scale, ScaleBy, as_rank, divisor, is_rank
from lrkit.settings import one_of, real
from lrkit.units import Part


@attrs.frozen(kw_only=True)
class LoRA(Parameterization):
    """ΔW = (α/r) B A, with A [r, d_in] Kaiming-uniform (a = √5) and B [d_out, r] zero at first.

    Source: arXiv 2106.09685, section 4.1. It has rank components (doublets B[:, i], A[i, :]) but no core value, so that
    `lrkit.actions.Prune` refuses it.

    Args:
        rank: r, or a table of layer or pattern to rank; 0 leaves a layer without an adapter.
        alpha: α; the increment is scaled by α/r.
        scale_by: the r of the scale if ranks differ: each layer's ``"own-rank"``, or the ``"mean-rank"`` over all layers.
        dropout: probability of dropping an entry of the adapter's input while training.
        scale: ``"rank"`` for α/r; ``"sqrt-rank"`` for α/√r, which is rsLoRA's (arXiv 2312.03732) and PEFT's ``use_rslora``.
    """

    learning_rate: ClassVar[float] = 1e-3

    rank: Rank = attrs.field(default=8, converter=as_rank, validator=is_rank())
    alpha: float = attrs.field(default=16.0, validator=real(0.0, above=True))
    dropout: float = attrs.field(default=0.0, validator=real(0.0, 1.0, below=True))
    scale_by: ScaleBy = attrs.field(default="own-rank", validator=one_of(SCALES))
    scale: Scale = attrs.field(default="rank", validator=one_of(DIVISORS))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Declare A and B."""
        return (Part("A", axis=0, matrix=True), Part("B", axis=1, matrix=True))

    @property
    def components(self) -> Rank:
        """Return r."""
        return self.rank

    def fresh(self, part: Part, module: nn.Module, count: int, generator: torch.Generator) -> Tensor:
        """Draw further rows of A, Kaiming-uniform, or make columns of B, zero, as at the start.

        The scale stays as it was with the initial r.
        """
        new = further(module, part, count)
        return (
            nn.init.zeros_(new)
            if part.name == "B"
            else nn.init.kaiming_uniform_(new, math.sqrt(5), generator=generator)
        )

    def build(self, target: Target) -> nn.Module:
        """Return the layer with A and B beside it."""
        rank = target.components_of(self.rank)
        a = new_factor(target.layer, rank, target.d_in)
        if rank:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = new_factor(target.layer, target.d_out, rank)
        nn.init.zeros_(b)
        scaling = self.alpha / divisor(target.scale_rank(self.rank, self.scale_by), self.scale)
        return LowRank(target, a, b, scaling=scaling, dropout=self.dropout)
