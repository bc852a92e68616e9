"""Sensitivity, abs(w · ∂L/∂w), and its upper confidence bound (AdaLoRA, arXiv 2303.10512, Eq. 8 to 11)."""

from collections.abc import Mapping
from typing import ClassVar

import attrs
from torch import Tensor

from lrkit.metrics.base import Metric, smooth
from lrkit.settings import flag, real, whole


@attrs.frozen(kw_only=True)
class Sensitivity(Metric):
    """s = I = abs(w · ∂L/∂w), raw; or its running mean Ī.

    Source: arXiv 2303.10512, Eq. 8; the ablation "s = I" of its Table 4. The paper's text has the raw I of the last
    step; the released code's switch gives the smoothed Ī.

    Args:
        smoothed: score by Ī = β1 Ī + (1 - β1) I instead of by I.
        beta1: β1; without effect while `smoothed` is False.
    """

    buffers: ClassVar[tuple[str, ...]] = ("sensitivity",)

    smoothed: bool = attrs.field(default=False, validator=flag())
    beta1: float = attrs.field(default=0.85, validator=real(0.0, 1.0, below=True))

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """I, or Ī."""
        smooth(state["sensitivity"], (weight * grad).abs_(), self.beta1 if self.smoothed else 0.0)

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """I or Ī [N]."""
        return state["sensitivity"]


@attrs.frozen(kw_only=True)
class UncertaintyMetric(Metric):
    """s = Ī · Ū over some entry-wise importance I: its running mean times its running deviation.

    Ī = β1 Ī + (1 - β1) I, then Ū = β2 Ū + (1 - β2) abs(I - Ī) with the Ī just updated; both from zero, without bias
    correction. Source: arXiv 2303.10512, Eq. 9 to 11. A subclass says what I is, in `importance`.

    Args:
        beta1: β1, smoothing of the importance.
        beta2: β2, smoothing of the uncertainty.
        window: 1: I is one step's. n > 1: I is the mean over the last n steps, and Ī and Ū move every n steps, when the next
            window begins (PLATON, arXiv 2206.12562, section 3.2; the released code of AFLoRA). A step that is skipped since
            gradients are not finite keeps its place; if it is a window's first, that window and the one before are one.
    """

    beta1: float = attrs.field(default=0.85, validator=real(0.0, 1.0, below=True))
    beta2: float = attrs.field(default=0.85, validator=real(0.0, 1.0, below=True))
    window: int = attrs.field(default=1, validator=whole(1))

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ī and Ū, and the window's mean where there is a window."""
        return ("importance", "uncertainty") if self.window == 1 else ("importance", "uncertainty", "window")

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """I [N], a fresh tensor, from weights [N] and gradients [N]."""
        raise NotImplementedError

    def observe(self, weight: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int) -> None:
        """Ī, then Ū; or one more step into the window."""
        importance = self.importance(weight, grad)
        if self.window == 1:
            self.update(importance, state)
            return
        place = (step - 1) % self.window
        if place == 0 and step > 1:
            self.update(state["window"].clone(), state)
        state["window"].lerp_(importance, 1.0 / (place + 1))

    def update(self, importance: Tensor, state: Mapping[str, Tensor]) -> None:
        """Ī = β1 Ī + (1 - β1) I, then Ū = β2 Ū + (1 - β2) abs(I - Ī). Overwrites `importance`."""
        smooth(state["importance"], importance, self.beta1)
        smooth(state["uncertainty"], importance.sub_(state["importance"]).abs_(), self.beta2)

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Ī · Ū [N]."""
        return state["importance"] * state["uncertainty"]


@attrs.frozen(kw_only=True)
class SensitivityUncertainty(UncertaintyMetric):
    """s = Ī · Ū with I = abs(w · ∂L/∂w): AdaLoRA's metric. Source: arXiv 2303.10512, Eq. 8 to 11.

    Args:
        beta1: β1 = 0.85 in the paper.
        beta2: β2 = 0.85 in the paper.
        window: 1, as in the paper.
    """

    def importance(self, weight: Tensor, grad: Tensor) -> Tensor:
        """abs(w · ∂L/∂w) [N]."""
        return (weight * grad).abs_()
