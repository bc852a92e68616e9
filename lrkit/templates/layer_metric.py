"""A plug-in of lrkit: the metric ``example-name``, which reads layers."""

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

import lrkit
from lrkit.metrics import Layer, Seen


@attrs.frozen(kw_only=True)
class ExampleName(lrkit.LayerMetric):
    """s = mean over rows of (Σ_j |W_ij| |x_j|) summed over i: how much weight meets how large an input.

    Source: arXiv 2306.11695, Eq. 1, with a mean in place of the norm, summed over the layer.
    """

    # reads = "gradient" shows seen.g as well.

    def begin(self, layer: Layer) -> dict[str, Tensor]:
        """Return Σ |x| [d_in], and the number of rows."""
        return {
            "sizes": torch.zeros(layer.d_in, dtype=torch.float64, device=layer.device),
            "rows": torch.zeros((), dtype=torch.int64, device=layer.device),
        }

    def observe(self, seen: Seen, state: Mapping[str, Tensor]) -> None:
        """Add rows, in place."""
        state["sizes"].add_(seen.x.abs().sum(0))
        state["rows"].add_(len(seen.x))

    def score(self, layer: Layer, state: Mapping[str, Tensor]) -> Tensor:
        """Return the same number for each of the layer's units [units]."""
        mean = (state["sizes"] / state["rows"].clamp(min=1)).float()
        return (layer.weight.abs() @ mean).sum().expand(layer.units)


@lrkit.hookimpl
def lrkit_metrics() -> Mapping[str, type[lrkit.LayerMetric]]:
    """Offer the metric of this package."""
    return {"example-name": ExampleName}
