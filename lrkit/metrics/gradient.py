"""Gradient-only metrics: AFLoRA's abs(grad) x uncertainty, and the abs(grad / w) of its ablation (arXiv 2403.13269)."""

import attrs
from torch import Tensor

from lrkit.metrics.sensitivity import UncertaintyMetric
from lrkit.settings import real


@attrs.frozen(kw_only=True)
class GradientUncertainty(UncertaintyMetric):
    """s = Ī · Ū with I = abs(∂L/∂w): AFLoRA's freezing score. Source: arXiv 2403.13269, Eq. 2 to 4.

    Args:
        beta1: β1 = 0.85 in the paper.
        beta2: β2 = 0.95 in the paper.
        window: 1, as in the paper; the released code has 10.
    """

    beta2: float = attrs.field(default=0.95, validator=real(0.0, 1.0, below=True))

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """abs(∂L/∂w) [N]."""
        return grad.abs()


@attrs.frozen(kw_only=True)
class RatioUncertainty(UncertaintyMetric):
    """s = Ī · Ū with I = abs(∂L/∂w) / (abs(w) + ε). Source: arXiv 2403.13269, Figure 4, score abs(g/p).

    The paper divides by w and gives no ε. Here ε is added to abs(w), so that I stays finite at w = 0 and abs(g/p) is
    kept to a relative error below ε / abs(w): below 1 % for every entry larger than 1e-6.

    Args:
        beta1: β1.
        beta2: β2.
        window: steps to a window.
        epsilon: ε, in the units of the weights.
    """

    beta2: float = attrs.field(default=0.95, validator=real(0.0, 1.0, below=True))
    epsilon: float = attrs.field(default=1e-8, validator=real(0.0, above=True))

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """abs(∂L/∂w) / (abs(w) + ε) [N]."""
        return grad.abs().div_(weight.abs().add_(self.epsilon))
