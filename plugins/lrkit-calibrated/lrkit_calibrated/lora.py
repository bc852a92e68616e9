"""LoRA for layers that are given their rank before the first step: a scale of the rank that they are given."""

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from lrkit.errors import LrkitError
from lrkit.parameterizations import LoRA, LowRank, Target
from lrkit.ranks import divisor
from lrkit.settings import one_of
from lrkit.shards import whole


class Rescaled(LowRank):
    """A low-rank adapter with the scale α/r or α/√r of a rank r that is stored beside A and B, and does not train.

    Args:
        base: as `LowRank` takes it.
        a: as `LowRank` takes it.
        b: as `LowRank` takes it.
        alpha: α.
        rank: r of the scale at first.
        scale: the divisor, ``"rank"`` or ``"sqrt-rank"``.
        dropout: as `LowRank` takes it.
    """

    def __init__(
        self,
        base: Any,
        a: Any,
        b: Any,
        *,
        alpha: float,
        rank: float,
        scale: Literal["rank", "sqrt-rank"],
        dropout: float = 0.0,
    ) -> None:
        self._alpha, self._divisor = alpha, scale
        super().__init__(base, a, b, dropout=dropout)
        self.scale_rank = nn.Parameter(torch.full((1,), float(rank), device=a.device), requires_grad=False)
        self._read: tuple[int, int] | None = None
        self._now = alpha / divisor(rank, scale)

    @property
    def scaling(self) -> float:
        """The scale, read from the stored rank whenever that has changed."""
        stored = self.scale_rank
        version = (id(stored), stored._version)  # noqa: SLF001
        if version != self._read and not stored.is_meta:
            self._read, self._now = version, self._alpha / divisor(float(whole(stored.detach())), self._divisor)
        return self._now

    @scaling.setter
    def scaling(self, value: float) -> None:
        """Ignore the base class's: the scale follows from the stored rank."""

    @torch.no_grad()
    def give(self, rank: int) -> None:
        """Take the scale of a rank, unless ΔW is not zero any more: no output changes.

        Args:
            rank: how many components the adapter is given.
        """
        if not self.B.any():
            self.scale_rank.fill_(max(1, rank // self.maps))


@attrs.frozen(kw_only=True)
class AllocatedLoRA(LoRA):
    """LoRA that is given its ranks before the first step. Source: arXiv 2106.09685, section 4.1; arXiv 2312.03732.

    Args:
        scale_of: the r of the scale α/r or α/√r (`scale`) of a layer that is given fresh components in the place of all that
            it had. ``"new-rank"``: their number. ``"first-rank"``: the rank that it began with, so that all layers go on
            with the scale that they had. Once ΔW is not zero, a layer's scale stays as it is.
    """

    scale_of: Literal["new-rank", "first-rank"] = attrs.field(
        default="new-rank", validator=one_of(("new-rank", "first-rank"))
    )

    def __attrs_post_init__(self) -> None:
        """Refuse any other start: components that a layer is given begin as in ``"kaiming"``, in the place of all it had."""
        if self.init != "kaiming":
            raise LrkitError(
                f'{type(self).__name__}: init="{self.init}" would be lost, since all components are drawn anew when layers '
                'are given their ranks: leave it at "kaiming"'
            )

    def build(self, target: Target) -> nn.Module:
        """Return the layer with A and B beside it."""
        made = super().build(target)
        if self.scale_of == "first-rank":
            return made
        plain: Any = made
        rank = target.scale_rank(self.rank, self.scale_by)
        return Rescaled(target, plain.A, plain.B, alpha=self.alpha, rank=rank, scale=self.scale, dropout=self.dropout)

    def fresh(
        self, module: nn.Module, count: int, generator: torch.Generator, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draw components as LoRA does, and take the scale of their number."""
        if isinstance(module, Rescaled):
            module.give(count)
        return super().fresh(module, count, generator, memory)
