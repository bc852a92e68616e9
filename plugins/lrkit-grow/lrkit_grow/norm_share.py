"""Dynamic DoRA: a component's share in the norm of its layer's increment, and the schedule that goes with it."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import mul
from typing import ClassVar, Literal

import attrs
from torch import Tensor

import lrkit
from lrkit.settings import OWN, one_of


@attrs.frozen(kw_only=True)
class NormShare(lrkit.Metric):
    """S_i = ‖Δ_i‖_F / ‖Δ‖_F, with Δ_i = λ_i P_i Q_i and Δ their sum over the layer. Source: dynamic DoRA, arXiv 2405.17357.

    Both norms follow from inner products of a layer's vectors, so that no d_out x d_in matrix is made: ‖Δ‖² is the sum
    over i, j of λ_i λ_j (P_i · P_j) (Q_i · Q_j). No gradients are read.

    Args:
        measure: ``"after-step"``: the weights as the optimizer has just left them. ``"before-step"``: as it found them.
    """

    reads: ClassVar[Literal["all", "core", "component"]] = "component"

    measure: Literal["before-step", "after-step"] = attrs.field(
        default="after-step", validator=one_of(("before-step", "after-step")), metadata=OWN
    )

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Nothing, or the weights before the step."""
        return ("weight",) if self.measure == "before-step" else ()

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """Keep the weights, where they are to be those before the step."""
        if self.measure == "before-step":
            state["weight"].copy_(weight)

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The weights themselves [N]: `reduce` makes the norms."""
        return state["weight"] if self.measure == "before-step" else weight.clone()

    def reduce(self, parts: Sequence[Tensor]) -> Tensor:
        """The shares [blocks, units] from a component's vectors."""
        inner = reduce(mul, (part.double() @ part.double().mT for part in parts))
        own = inner.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        whole = inner.sum(dim=(-2, -1)).clamp(min=0).sqrt()
        # Where Δ is zero, all shares are; where parts cancel, ‖Δ‖ is known to half the digits of their norms.
        floor = (own.sum(dim=-1) * 1e-8).clamp(min=1e-30)
        return (own / whole.maximum(floor)[:, None]).float()


@attrs.frozen(kw_only=True)
class LateCubic(lrkit.Scheduler):
    """1 - u³: slow at first, quick at the end. Source: dynamic DoRA's released code, ``MIkumikumi0116/DoRA`` @1c76b34."""

    def decay(self, progress: float) -> float:
        """1 - u³."""
        return 1.0 - progress**3
