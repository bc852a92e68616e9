"""The magnitude of the core value: S_i = abs(λ_i), the first ablation of AdaLoRA's Table 4."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs
from torch import Tensor

from lrkit.metrics.base import Metric
from lrkit.settings import OWN, one_of


@attrs.frozen(kw_only=True)
class Magnitude(Metric):
    """S_i = abs(λ_i): the size of the core value alone. Source: arXiv 2303.10512, section 4.4, S_i = abs(λ_i).

    Args:
        measure: ``"after-step"`` (the default here, and the released code's): λ as the optimizer has just left it, so that
            a masked component, whose λ was zero before the step, can come back at every decision. ``"before-step"``: λ as
            the optimizer found it.
    """

    reads: ClassVar[Literal["all", "core"]] = "core"

    measure: Literal["before-step", "after-step"] = attrs.field(
        default="after-step", validator=one_of(("before-step", "after-step")), metadata=OWN
    )

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Nothing, or λ as it was before the step."""
        return ("magnitude",) if self.measure == "before-step" else ()

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """abs(w), where it is to be kept until the decision."""
        if self.measure == "before-step":
            state["magnitude"].copy_(weight.abs())

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """abs(w) [N]."""
        return state["magnitude"] if self.measure == "before-step" else weight.abs()
