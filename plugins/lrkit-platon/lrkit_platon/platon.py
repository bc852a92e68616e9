"""PLATON: the upper confidence bound of a windowed sensitivity (Zhang et al., arXiv 2206.12562)."""

import math
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

import lrkit
from lrkit.actions import Ballot, Verdict
from lrkit.metrics.base import smooth
from lrkit.settings import flag, real, whole


@attrs.frozen(kw_only=True)
class Platon(lrkit.metrics.SensitivityUncertainty):
    """s = Ī · Ū with I the mean over a window of abs(w · ∂L/∂w): PLATON's score. Source: arXiv 2206.12562, Eq. 6 to 9.

    Ī = β1 Ī + (1 - β1) I and Ū = β2 Ū + (1 - β2) abs(I - Ī) move once a window, when the next one begins. Until the first
    window has been taken in, after `window` + 1 steps, every score is zero.

    Args:
        beta1: β1.
        beta2: β2. 1: s = Ī alone, and no Ū is kept, as the released code has it.
        window: ΔT, 10 in the released code.
    """

    beta2: float = attrs.field(default=0.95, validator=real(0.0, 1.0))
    window: int = attrs.field(default=10, validator=whole(1))

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ī; Ū unless β2 is 1; and the window's mean where there is a window."""
        return tuple(name for name in super().buffers if name != "uncertainty" or self.beta2 < 1)

    def update(self, importance: Tensor, state: Mapping[str, Tensor]) -> None:
        """Ī, then Ū unless β2 is 1."""
        if self.beta2 < 1:
            super().update(importance, state)
        else:
            smooth(state["importance"], importance, self.beta1)

    def score(self, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Ī · Ū, or Ī, [N]."""
        return super().score(weight, state) if self.beta2 < 1 else state["importance"]


@attrs.frozen(kw_only=True)
class ZeroBelow(lrkit.actions.Zero):
    """Zero for what scores strictly below the k-th smallest entry, k = ⌊N (1 - share)⌋ of all N entries.

    Source: the released code of PLATON and LoSparse (arXiv 2306.11222; `yxli2123/LoSparse` @7513452, ``utils.py``). Every
    entry of a unit has the unit's score, so that a unit counts as often as it has entries. Of n units of one width the
    threshold is the ⌈n (1 - share)⌉-th smallest score; of several widths those of wide layers weigh more. The k-th itself
    and all ties are kept: one unit more than the budget or so, and every tie.

    Args:
        once: what lost is out for good.
        keep_momentum: leave the optimizer's state for what is zeroed as it is, as the released code does, so that a row
            moves on with what it had. False: zero it as well.
    """

    exact = False  # for its contract: the k-th itself and all ties are kept

    keep_momentum: bool = attrs.field(default=True, validator=flag())

    def decide(self, ballot: Ballot) -> Verdict:
        """Keep what scores no less than the threshold."""
        scores, sizes = torch.sort(ballot.scores, stable=True), ballot.sizes
        if sizes is None:
            below = math.ceil(len(ballot.scores) * (1 - ballot.share))
        else:
            entries = sizes[scores.indices].cumsum(0)
            smallest = int(int(entries[-1]) * (1 - ballot.share))
            below = int((entries < smallest).sum()) + 1 if smallest else 0
        high = ballot.scores >= scores.values[below - 1]
        return Verdict(ballot.candidates & high if below else ballot.candidates)

    def apply(self, blocks: Sequence[lrkit.Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Zero what is not kept."""
        super().apply(blocks, kept, None if self.keep_momentum else optimizer)
