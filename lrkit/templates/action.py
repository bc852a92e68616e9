"""A plug-in of lrkit: the action ``example-name``."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

import lrkit
from lrkit.actions import Fate
from lrkit.settings import real
from lrkit.units import UnitKind, split


@attrs.frozen(kw_only=True)
class ExampleName(lrkit.Action):
    """Shrink λ_i at each decision that component i loses; it can grow again in between.

    Source: this package; the mask of arXiv 2303.10512, Eq. 5, is its limit as ``factor`` goes to zero.

    Args:
        factor: a loser's λ is multiplied by this.
    """

    fate: ClassVar[Fate] = "dimmed"  # a smaller λ still adds to the output: its component counts as trained

    factor: float = attrs.field(default=0.5, validator=real(0.0, 1.0, above=True, below=True))

    @property
    def unit(self) -> UnitKind:
        """Act on components of the rank."""
        return "component"

    def refusal(self, parameterization: lrkit.Parameterization) -> str | None:
        """Refuse a parameterization that has no λ to shrink."""
        if not any(part.core and part.trains for part in parameterization.parts):
            return "it shrinks a component's core value (λ), and this parameterization has none"
        return None

    @torch.no_grad()
    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Multiply the core values of the losers."""
        for block, keep in zip(blocks, split(kept, blocks), strict=True):
            block.core[~keep.to(block.core.device)] *= self.factor


@lrkit.hookimpl
def lrkit_actions() -> Mapping[str, type[lrkit.Action]]:
    """Offer the action of this package."""
    return {"example-name": ExampleName}
