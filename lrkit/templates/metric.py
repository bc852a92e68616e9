"""A plug-in of lrkit: the metric ``example-name``."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
from torch import Tensor

import lrkit
from lrkit.settings import real


@attrs.frozen(kw_only=True)
class ExampleName(lrkit.Metric):
    """s = F, the running mean of g²: the diagonal of the empirical Fisher information.

    Source: arXiv 1612.00796, Eq. 3, smoothed as in arXiv 2303.10512, Eq. 9.

    Args:
        beta: β of F = β F + (1 - β) g².
    """

    buffers: ClassVar[tuple[str, ...]] = ("fisher",)

    beta: float = attrs.field(default=0.9, validator=real(0.0, 1.0, below=True))

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """Update F = β F + (1 - β) g², in place."""
        state["fisher"].lerp_(grad.square(), 1 - self.beta)

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Return F [N]."""
        return state["fisher"]


@lrkit.hookimpl
def lrkit_metrics() -> Mapping[str, type[lrkit.Metric]]:
    """Offer the metric of this package."""
    return {"example-name": ExampleName}
