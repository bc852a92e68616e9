"""The magnitude of the core value: S_i = abs(λ_i), the first ablation of AdaLoRA's Table 4."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import attrs
from torch import Tensor

from lrkit.metrics.base import Metric


@attrs.frozen(kw_only=True)
class Magnitude(Metric):
    """S_i = abs(λ_i): the size of the core value alone. Remembers nothing. Source: arXiv 2303.10512, section 4.4."""

    reads: ClassVar[Literal["all", "core"]] = "core"

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """abs(w) [N]."""
        return weight.abs()
