"""LoRA for layers that are given their rank before the first step: a scale that follows the rank."""

from typing import Any, Literal

import attrs
from torch import nn

from lrkit.errors import LrkitError
from lrkit.parameterizations import LoRA, LowRank, Target
from lrkit.ranks import divisor
from lrkit.settings import one_of


class Following(LowRank):
    """A low-rank adapter with the scale α/r, or α/√r, of the rank r that it has now.

    It is meant for ranks that are given before training. If components that have trained are cut, all others' share in the
    output changes with the scale.

    Args:
        base: as `LowRank` takes it.
        a: as `LowRank` takes it.
        b: as `LowRank` takes it.
        alpha: α.
        scale: the divisor, ``"rank"`` or ``"sqrt-rank"``.
        others: as `LowRank` takes them.
    """

    def __init__(self, base: Any, a: Any, b: Any, *, alpha: float, scale: Literal["rank", "sqrt-rank"], **others: Any):
        self.alpha, self.scale = alpha, scale
        super().__init__(base, a, b, **others)

    def scaling_at(self, rank: int) -> float:
        """Return the scale at a rank; that of rank 1 at rank 0."""
        return self.alpha / divisor(max(1, rank // self.maps), self.scale)

    @property
    def scaling(self) -> float:
        """The scale at the rank that there is now."""
        return self.scaling_at(self.rank)

    @scaling.setter
    def scaling(self, value: float) -> None:
        """Ignore what the base class sets: the scale follows from the rank."""


@attrs.frozen(kw_only=True)
class AllocatedLoRA(LoRA):
    """LoRA that is given its ranks before the first step. Source: arXiv 2106.09685, section 4.1; arXiv 2312.03732.

    Args:
        scale_of: the r of the scale α/r or α/√r (`scale`) in a layer that is given another rank than it began with.
            ``"new-rank"``: the one that it is given. ``"first-rank"``: the one that it began with, so that all layers go on
            with the same scale.
    """

    scale_of: Literal["new-rank", "first-rank"] = attrs.field(
        default="new-rank", validator=one_of(("new-rank", "first-rank"))
    )

    def __attrs_post_init__(self) -> None:
        """Refuse a start whose increment is counted from the base's weight with a scale that follows the rank."""
        if self.scale_of == "new-rank" and self.init not in ("kaiming", "orthogonal"):
            raise LrkitError(f'{type(self).__name__}: init="{self.init}" goes with scale_of="first-rank" alone')

    def build(self, target: Target) -> nn.Module:
        """Return the layer with A and B beside it."""
        made: Any = super().build(target)
        if self.scale_of == "first-rank":
            return made
        return Following(target, made.A, made.B, alpha=self.alpha, scale=self.scale, dropout=self.dropout)
