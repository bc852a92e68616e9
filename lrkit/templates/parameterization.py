"""A plug-in of lrkit: the parameterization ``example-name``."""

import math
from collections.abc import Mapping
from typing import ClassVar

import attrs
from torch import nn

import lrkit
from lrkit.parameterizations import LowRank, Target
from lrkit.parameterizations.lowrank import new_factor
from lrkit.ranks import SCALES, Rank, ScaleBy, as_rank, is_rank
from lrkit.settings import one_of, real


@attrs.frozen(kw_only=True)
class ExampleName(lrkit.Parameterization):
    """ΔW = (α/r) B diag(g) A: LoRA with a gate g_i for each component, which actions can act on.

    A [r, d_in] is Kaiming-uniform (a = √5), B [d_out, r] zero and g [r] Gaussian at first; all of them train. Source:
    arXiv 2311.11696, without its proximal step.

    Args:
        rank: r, or a table of layer or pattern to rank.
        alpha: α.
        scale_by: the r of the scale if ranks differ.
    """

    learning_rate: ClassVar[float] = 2e-3

    rank: Rank = attrs.field(default=8, converter=as_rank, validator=is_rank())
    alpha: float = attrs.field(default=16.0, validator=real(0.0, above=True))
    scale_by: ScaleBy = attrs.field(default="own-rank", validator=one_of(SCALES))

    @property
    def parts(self) -> tuple[lrkit.Part, ...]:
        """Declare the gates, and the matrices B and A. All units follow from this declaration."""
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
        """Return the layer with A, g and B beside it."""
        rank = target.rank_of(self.rank)
        a = new_factor(target.layer, rank, target.d_in)
        if rank:  # a layer of rank 0 has empty tensors
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        gates = new_factor(target.layer, rank)
        nn.init.normal_(gates)
        b = new_factor(target.layer, target.d_out, rank)
        nn.init.zeros_(b)
        return LowRank(target.layer, a, b, core=gates, scaling=self.alpha / target.scale_rank(self.rank, self.scale_by))


@lrkit.hookimpl
def lrkit_parameterizations() -> Mapping[str, type[lrkit.Parameterization]]:
    """Offer the parameterization of this package."""
    return {"example-name": ExampleName}
