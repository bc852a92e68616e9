"""Freeze: projection matrices stop training, for good (AFLoRA, arXiv 2403.13269, section 4)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

from lrkit.actions.base import BY, Action, Ballot, By, Fate, Verdict, best
from lrkit.errors import LrkitError
from lrkit.parameterizations.base import Parameterization
from lrkit.settings import flag, one_of
from lrkit.units import Block, UnitKind, stop


@attrs.frozen(kw_only=True)
class Freeze(Action):
    """A matrix that is not kept stops training and stays as it is. Source: arXiv 2403.13269, section 4.

    Its gradient is neither computed nor kept, and the optimizer's state for it is dropped, so that no optimizer moves
    it again: not by momentum, not by weight decay.

    Args:
        together: False: A and B of one layer freeze on their own (the paper's choice, Table 6). True: all matrices of a
            layer freeze together, ranked by the sum of their scores.
        rule: ``"rank"``: the best b(t) matrices stay, as the paper has it ("the lowest k %"). ``"quantile"``: those whose
            mean is at or above the element-wise quantile over the matrices still trainable, as the released code has
            it: the fraction compounds.
        by: how units that differ in cost are ranked, if the schedule counts costs (`lrkit.Scheduler`, `amount`): by
            ``"score"``, or by ``"score-per-cost"``, so that two cheap matrices may take the place of a dear one.
    """

    fate: ClassVar[Fate] = "frozen"
    final: ClassVar[bool] = True

    together: bool = attrs.field(default=False, validator=flag())
    rule: Literal["rank", "quantile"] = attrs.field(default="rank", validator=one_of(("rank", "quantile")))
    by: By = attrs.field(default="score", validator=one_of(BY))

    def __attrs_post_init__(self) -> None:
        """Refuse a ranking by a rule that ranks nothing."""
        if self.rule == "quantile" and self.by != "score":
            raise LrkitError(
                f'{self!r}: rule = "quantile" compares scores with a threshold, so that by must be "score"'
            )

    def decide(self, ballot: Ballot) -> Verdict:
        """Choose who stays trainable, by the rule that `rule` names."""
        if self.rule == "rank":
            return Verdict(best(ballot, self.by))
        count = ballot.entries.numel()
        low = int(count * (1 - ballot.share))
        if low == 0:
            return Verdict(ballot.candidates, budget=len(ballot.scores))
        # A unit of several matrices scores by the sum of their means; the quantile is one of single entries.
        threshold = torch.kthvalue(ballot.entries, low).values
        kept = ballot.candidates & (ballot.scores / ballot.parts >= threshold)
        return Verdict(kept, budget=len(ballot.scores))  # how many go follows from the scores

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int] | None:
        """Return how many matrices a decision freezes; None for the quantile rule, whose number follows from the scores."""
        return super().turnover(units, budget, layers) if self.rule == "rank" else None

    @property
    def unit(self) -> UnitKind:
        """Single matrices, or all matrices of a layer."""
        return "layer" if self.together else "matrix"

    def refusal(self, parameterization: Parameterization) -> str | None:
        """Ask for matrices that train."""
        if not any(part.matrix and part.trains for part in parameterization.parts):
            return "freezing acts on projection matrices that train, and this parameterization has none"
        return None

    def apply(self, blocks: Sequence[Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Freeze what is not kept."""
        for block, keep in zip(blocks, kept.tolist(), strict=True):
            for tensor in () if keep else block.tensors:
                stop(tensor, optimizer)
