"""The built-in schedulers: constant, linear, quadratic, cubic."""

import attrs

from lrkit.schedulers.base import Scheduler


@attrs.frozen(kw_only=True)
class Constant(Scheduler):
    """`target` from the first decision on: the plain baseline for any schedule. Source: lrkit's own."""

    def decay(self, progress: float) -> float:
        """0 as soon as the warm-up is over."""
        return 1.0 if progress <= 0 else 0.0


@attrs.frozen(kw_only=True)
class Linear(Scheduler):
    """A straight line from `start` to `target`: (1 - u)³ with 1 for 3. Source: lrkit's own, for ablations."""

    def decay(self, progress: float) -> float:
        """1 - u."""
        return 1.0 - progress


@attrs.frozen(kw_only=True)
class Quadratic(Scheduler):
    """1 - u²: slow at first, quick at the end. Source: AFLoRA's released code for GSM8K (``gsm8k/utils.py`` at 23f632f)."""

    def decay(self, progress: float) -> float:
        """1 - u²."""
        return 1.0 - progress**2


@attrs.frozen(kw_only=True)
class Cubic(Scheduler):
    """(1 - u)³: quick at first, slow at the end (Zhu and Gupta, arXiv 1710.01878, Eq. 1).

    AdaLoRA's budget (arXiv 2303.10512, Eq. 14) is this one on rank components; AFLoRA's frozen fraction (arXiv
    2403.13269, section 4) is this one on matrices with target 0, and what is not kept is frozen.
    """

    def decay(self, progress: float) -> float:
        """(1 - u)³."""
        return (1.0 - progress) ** 3
