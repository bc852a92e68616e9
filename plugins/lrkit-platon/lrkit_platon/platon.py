"""PLATON: the upper confidence bound of a windowed sensitivity (Zhang et al., arXiv 2206.12562)."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor

import lrkit
from lrkit.actions import Ballot
from lrkit.settings import real, whole


@attrs.frozen(kw_only=True)
class Platon(lrkit.metrics.SensitivityUncertainty):
    """s = Ī · Ū with I the mean over a window of abs(w · ∂L/∂w): PLATON's score. Source: arXiv 2206.12562, Eq. 6 to 9.

    Ī = β1 Ī + (1 - β1) I and Ū = β2 Ū + (1 - β2) abs(I - Ī) move once a window, when the next one begins. Until the first
    window has been taken in, after `window` + 1 steps, every score is zero.

    Args:
        beta1: β1.
        beta2: β2.
        window: ΔT, 10 in the released code.
    """

    beta2: float = attrs.field(default=0.95, validator=real(0.0, 1.0, below=True))
    window: int = attrs.field(default=10, validator=whole(1))


@attrs.frozen(kw_only=True)
class ZeroBelow(lrkit.actions.Zero):
    """Zero for what scores strictly below the k-th smallest score, k = ⌊n (1 - share)⌋: ties and the k-th itself are kept.

    Source: the released code of PLATON and LoSparse (arXiv 2306.11222). It keeps one or two units more
    than the budget, and every tie.

    Args:
        once: what lost is out for good.
    """

    exact: ClassVar[bool] = False

    def select(self, ballot: Ballot) -> Tensor:
        """Who scores no less than the threshold."""
        below = int(ballot.scores.numel() * (1 - ballot.share))
        if below == 0:
            return ballot.candidates
        return ballot.candidates & (ballot.scores >= torch.kthvalue(ballot.scores, below).values)
