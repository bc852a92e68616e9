"""Zero: every entry of a component that loses becomes zero (Prune-LoRA, arXiv 2303.10512, section 4.4)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor

from lrkit.actions.base import BY, Action, Ballot, By, Fate, Verdict, best
from lrkit.errors import LrkitError
from lrkit.settings import flag, one_of
from lrkit.shards import held, mine
from lrkit.units import Block, UnitKind, split


@attrs.frozen(kw_only=True)
class Zero(Action):
    """Every entry of a component that is not kept is set to zero, in all of its tensors. It needs no core value.

    Source: structured pruning as in Prune-LoRA, arXiv 2303.10512, section 4.4 (doublets), and LoSparse, arXiv 2306.11222,
    section 3 (rows). The optimizer's state for these entries is zeroed with them, so that no momentum moves them on. A
    component then comes back only if it has a gradient. A row of a plain weight has one, and grows again. A doublet of LoRA
    has none: each vector's gradient is a multiple of the other, and both are zero.

    Raises:
        LrkitError: the optimizer keeps whole numbers for a tensor's entries, and no table of what they mean.

    Args:
        once: False: all components are ranked at each decision, as the smoothed scores have it. True: what lost is out for
            good, and the budget goes to those that are left: right where nothing can grow again.
        by: how units that differ in cost are ranked, if the schedule counts costs (`lrkit.Scheduler`, `amount`): by
            ``"score"``, or by ``"score-per-cost"``, so that two cheap components may take the place of a dear one.
    """

    fate: ClassVar[Fate] = "masked"

    once: bool = attrs.field(default=False, validator=flag())
    by: By = attrs.field(default="score", validator=one_of(BY))

    def decide(self, ballot: Ballot) -> Verdict:
        """Choose who is kept: the best components that the budget has room for."""
        return Verdict(best(ballot, self.by))

    @property
    def final(self) -> bool:  # type: ignore[override]
        """If losing `once` is enough."""
        return self.once

    @property
    def unit(self) -> UnitKind:
        """Rank components."""
        return "component"

    @torch.no_grad()
    def apply(self, blocks: Sequence[Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Zero what is not kept, with the optimizer's state for it."""
        for block, keep in zip(blocks, split(kept, blocks), strict=True):
            for part, tensor in zip(block.parts, block.tensors, strict=True):
                assert part.axis is not None
                shape = [1] * tensor.ndim
                shape[part.axis] = -1
                lost = ~keep.to(tensor.device).view(shape)
                state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
                for name, values in {"": tensor, **state}.items():
                    if isinstance(values, Tensor) and values.shape == tensor.shape:
                        zero = 0 if values.is_floating_point() else _code_of_zero(state, name)
                        held(values).masked_fill_(mine(lost.expand(tensor.shape), tensor), zero)


def _code_of_zero(state: Mapping[str, Any], name: str) -> int:
    """Return the code that stands for 0 in a state of 8 bits: bitsandbytes keeps the numbers of all codes beside it."""
    codes = state.get(name.replace("state", "qmap"))
    if not isinstance(codes, Tensor) or codes.ndim != 1:
        raise LrkitError(
            f'Zero cannot zero the optimizer\'s state "{name}", whole numbers without a table of what they mean: take an '
            "optimizer whose state is of floating-point numbers"
        )
    return int(codes.abs().argmin())
