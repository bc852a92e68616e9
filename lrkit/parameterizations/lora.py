"""LoRA: ΔW = (α/r) B A (Hu et al., arXiv 2106.09685, section 4.1)."""

import math
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from lrkit.parameterizations.adapter import further, new_factor
from lrkit.parameterizations.base import Parameterization, Target
from lrkit.parameterizations.lowrank import LowRank
from lrkit.settings import real, whole
from lrkit.units import Part


@attrs.frozen(kw_only=True)
class LoRA(Parameterization):
    """ΔW = (α/r) B A, with A [r, d_in] Kaiming-uniform (a = √5) and B [d_out, r] zero at first.

    Source: arXiv 2106.09685, section 4.1. It has rank components (doublets B[:, i], A[i, :]) but no core value, so that
    `lrkit.actions.Prune` refuses it.

    Args:
        rank: r.
        alpha: α; the increment is scaled by α/r.
        dropout: probability of dropping an entry of the adapter's input while training.
    """

    learning_rate: ClassVar[float] = 1e-3

    rank: int = attrs.field(default=8, validator=whole(1, 65_536))
    alpha: float = attrs.field(default=16.0, validator=real(0.0, above=True))
    dropout: float = attrs.field(default=0.0, validator=real(0.0, 1.0, below=True))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Declare A and B."""
        return (Part("A", axis=0, matrix=True), Part("B", axis=1, matrix=True))

    @property
    def components(self) -> int:
        """Return r."""
        return self.rank

    def fresh(self, part: Part, module: nn.Module, count: int, generator: torch.Generator) -> Tensor:
        """Draw further rows of A, Kaiming-uniform, or make columns of B, zero, as at the start.

        The scale stays α/r with the initial r.
        """
        new = further(module, part, count)
        return (
            nn.init.zeros_(new)
            if part.name == "B"
            else nn.init.kaiming_uniform_(new, math.sqrt(5), generator=generator)
        )

    def build(self, target: Target) -> nn.Module:
        """Return the layer with A and B beside it."""
        a = new_factor(target.layer, self.rank, target.d_in)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = new_factor(target.layer, target.d_out, self.rank)
        nn.init.zeros_(b)
        return LowRank(target.layer, a, b, scaling=self.alpha / self.rank, dropout=self.dropout)
