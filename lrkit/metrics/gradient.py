"""Gradient-only metrics: AFLoRA's abs(grad) x uncertainty, and the abs(grad / w) of its ablation (arXiv 2403.13269)."""

from collections.abc import Mapping

import attrs
from torch import Tensor

from lrkit.metrics.sensitivity import UncertaintyMetric
from lrkit.native import Kernel
from lrkit.settings import real, whole


@attrs.frozen(kw_only=True)
class GradientUncertainty(UncertaintyMetric):
    """s = Ī · Ū with I = abs(∂L/∂w): AFLoRA's freezing score. Source: arXiv 2403.13269, Eq. 2 to 4.

    Args:
        beta1: β1 = 0.85 in the paper.
        beta2: β2 = 0.95 in the paper.
        window: 1, as in the paper: I is one step's. n > 1: I is the mean over the last n steps, and Ī and Ū move every n
            steps, when the next window begins (the released code, with 10).
    """

    beta2: float = attrs.field(default=0.95, validator=real(0.0, 1.0, below=True))
    window: int = attrs.field(default=1, validator=whole(1))

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ī and Ū, and the window's mean where there is a window."""
        return ("importance", "uncertainty") if self.window == 1 else ("importance", "uncertainty", "window")

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """Ī, then Ū; or one more step into the window."""
        if self.window == 1:
            super().observe(weight, grad, state, step)
            return
        place = (step - 1) % self.window
        if place == 0 and step > 1:
            self.update(state["window"].clone(), state)
        state["window"].lerp_(self.importance(weight, grad), 1.0 / (place + 1))

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """abs(∂L/∂w) [N]."""
        return grad.abs()

    def kernel(self) -> Kernel | None:
        """abs(∂L/∂w), compiled, where there is no window; a subclass speaks for itself."""
        known = type(self) is GradientUncertainty and self.window == 1
        return Kernel("gradient", self.beta1, self.beta2) if known else None


@attrs.frozen(kw_only=True)
class RatioUncertainty(UncertaintyMetric):
    """s = Ī · Ū with I = abs(∂L/∂w) / (abs(w) + ε). Source: arXiv 2403.13269, Figure 4, score abs(g/p).

    The paper divides by w and gives no ε. Here ε is added to abs(w), so that I stays finite at w = 0 and abs(g/p) is
    kept to a relative error below ε / abs(w): below 1 % for every entry larger than 1e-6.

    Args:
        beta1: β1.
        beta2: β2.
        epsilon: ε, in the units of the weights.
    """

    beta2: float = attrs.field(default=0.95, validator=real(0.0, 1.0, below=True))
    epsilon: float = attrs.field(default=1e-8, validator=real(0.0, above=True))

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """abs(∂L/∂w) / (abs(w) + ε) [N]."""
        return grad.abs().div_(weight.abs().add_(self.epsilon))

    def kernel(self) -> Kernel | None:
        """abs(∂L/∂w) / (abs(w) + ε), compiled; a subclass speaks for itself."""
        return Kernel("ratio", self.beta1, self.beta2, self.epsilon) if type(self) is RatioUncertainty else None
