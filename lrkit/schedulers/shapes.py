"""The built-in schedulers: constant, linear, quadratic, cubic, once."""

from typing import Literal

import attrs

from lrkit.schedulers.base import Scheduler
from lrkit.settings import OWN, Time, one_of, whole


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


@attrs.frozen(kw_only=True)
class Once(Constant):
    """`target` from before the first step on: one decision, at step 0, and no other.

    For methods that look at some batches and share out ranks before they train: EVA (arXiv 2410.07170), GoRA (arXiv
    2502.12171). The decision is taken at the end of ``adapted.calibrate(batches)``. Source: lrkit's own.

    Args:
        calibration: how many batches the metric sees before the decision. A Trainer takes so many; a bare loop gives as
            many as it likes. 0 for a metric that needs none (`lrkit.metrics.Magnitude`, for example): the decision is then
            taken by `bind`.
        start: counts for nothing: the one decision goes by `target`.
        interval: counts for nothing, likewise.
        warmup: always 0.
        final: always the whole run.
        first_step: always 1.
        ending: always ``"fixed"``.
    """

    at_start = True

    calibration: int = attrs.field(default=8, validator=whole(0))
    warmup: Time = attrs.field(default=0, validator=one_of((0,)), metadata=OWN)
    final: Time = attrs.field(default=1.0, validator=one_of((1.0,)), metadata=OWN)
    first_step: Literal[0, 1] = attrs.field(default=1, validator=one_of((1,)), metadata=OWN)
    ending: Literal["fixed", "peft", "released", "open", "every-step"] = attrs.field(
        default="fixed", validator=one_of(("fixed",)), metadata=OWN
    )
