"""Switch: units stop training and train again later (LISA, arXiv 2403.17919)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import attrs
import torch
from torch import Tensor

from lrkit.actions.base import BY, Action, Ballot, By, Fate, Verdict, best
from lrkit.settings import one_of
from lrkit.units import Block, UnitKind, stop


@attrs.frozen(kw_only=True)
class Switch(Action):
    """A unit that is not kept stops training, until a later decision keeps it. Source: arXiv 2403.17919, Algorithm 1.

    Every decision ranks all units. The gradient of one that does not train is neither computed nor kept, and it keeps the
    score that it had when it stopped: a metric that goes by gradients brings a unit back if its last score is above the
    present ones of others. (One that reads layers sees those that are frozen as well.) What a metric remembers of a unit's
    entries begins anew when the unit trains again.

    The optimizer must hold all units from the start, also those that do not train at the time: make it from
    ``adapted.parameters()``. One that is made from what requires a gradient at some moment never moves the others, as it
    went with LISA's first released code (LMFlow, issue 726).

    Args:
        unit: what stops and trains as a whole: ``"block"``, a block of the transformer with all that trains in it;
            ``"layer"``, all matrices of a layer; ``"matrix"``, a single matrix.
        state: what becomes of the optimizer's state of a unit that stops. ``"new"``: it is dropped, which frees its memory,
            and begins anew when the unit trains again, bias correction included. LISA's released Trainer (LMFlow) does
            so: it makes a new optimizer at each switch, and takes over the state of nothing but what always trains.
            ``"kept"``: it stays, and goes on as it was, as with LMFlow's first version, a callback that sets flags alone.
            The paper says "run AdamW", and leaves it open.
        by: how units that differ in cost are ranked, if the schedule counts costs (`lrkit.Scheduler`, `amount`): by
            ``"score"``, or by ``"score-per-cost"``.
    """

    fate: ClassVar[Fate] = "frozen"

    unit: UnitKind = attrs.field(default="block", validator=one_of(("block", "layer", "matrix")))
    state: Literal["new", "kept"] = attrs.field(default="new", validator=one_of(("new", "kept")))
    by: By = attrs.field(default="score", validator=one_of(BY))

    def decide(self, ballot: Ballot) -> Verdict:
        """Keep the best, whether they trained before or not."""
        return Verdict(best(ballot, self.by))

    def apply(self, blocks: Sequence[Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Freeze what is not kept, and let what is kept train."""
        for block, keep in zip(blocks, kept.tolist(), strict=True):
            for tensor in block.tensors:
                if keep:
                    tensor.requires_grad_(tensor.numel() > 0)
                else:
                    stop(tensor, optimizer if self.state == "new" else None)
