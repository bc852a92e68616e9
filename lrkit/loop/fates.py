"""The loop's part in the fate of units that lost, beyond what an action does at a decision: one class per fate.

The loop asks these and never an action's class or settings.
"""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from lrkit.actions import Action
from lrkit.units import Block, split, stop


@attrs.frozen(eq=False)
class Fate:
    """Units that lost go on as they are, but less: they count as trained, and nothing has to be kept up ("dimmed").

    Args:
        action: whose units.
    """

    action: Action

    def candidates(self, kept: Tensor) -> Tensor:
        """Return who may be kept at a decision, bool [n]: all, or those kept so far if losing is final."""
        return kept if self.action.final else torch.ones_like(kept)

    def without(self, candidates: Tensor, live: Tensor) -> Tensor:
        """Return the candidates without the units that the loss does not reach, if there are live ones enough, bool [n]."""
        return candidates & live

    def ranked(self, kept: Tensor, blocks: Sequence[Block]) -> list[bool]:
        """Return for each block whether it has scores: those of which all units lost for good have none."""
        return [not self.action.final or bool(mask.any()) for mask in split(kept, blocks)]

    @property
    def counts(self) -> bool:
        """Say whether units that lost count as trained."""
        return True

    def settles(self, lost: bool, returned: bool) -> bool:
        """Say whether entries stop, or begin again, to have statistics after a decision that changed units."""
        return lost and self.action.final

    def hold(self, blocks: Sequence[Block], kept: Tensor) -> None:
        """Keep the last decision up after each further step."""

    def restore(self, blocks: Sequence[Block], kept: Tensor) -> None:
        """Make again what loaded tensors do not hold."""

    def frozen(self, blocks: Sequence[Block], kept: Tensor) -> set[int]:
        """Return the ``id`` of each tensor that does not train because its units lost."""
        return set()


class Masked(Fate):
    """Units that lost add nothing. The optimizer moves them all the same, so that after the end they are held down."""

    @property
    def counts(self) -> bool:
        """They do not: they add nothing."""
        return self.action.unit != "component"

    def hold(self, blocks: Sequence[Block], kept: Tensor) -> None:
        """Apply the last decision again."""
        self.action.apply(blocks, kept, None)


class Removed(Masked):
    """Units that lost leave the tensors as soon as a verdict says so; until then they are masked."""

    def without(self, candidates: Tensor, live: Tensor) -> Tensor:
        """Keep all: a layer without its last component could never come back, and units not reached rank last anyway."""
        return candidates

    def ranked(self, kept: Tensor, blocks: Sequence[Block]) -> list[bool]:
        """Return True for every block: units that are there are ranked, and those that are not have left."""
        return [True] * len(blocks)

    def settles(self, lost: bool, returned: bool) -> bool:
        """Never by itself: statistics follow when the tensors are resized."""
        return False


class Frozen(Fate):
    """Units that lost stop training; ``requires_grad`` is in no state dict. The action lets those that return train."""

    def settles(self, lost: bool, returned: bool) -> bool:
        """Whenever a tensor stops training, or trains again."""
        return lost or returned

    def restore(self, blocks: Sequence[Block], kept: Tensor) -> None:
        """Freeze again what was frozen: after a load, or if another policy's action lets it train."""
        for tensor in _lost(blocks, kept):
            stop(tensor)

    def frozen(self, blocks: Sequence[Block], kept: Tensor) -> set[int]:
        """Return the tensors of blocks that lost."""
        return {id(tensor) for tensor in _lost(blocks, kept)}


def _lost(blocks: Sequence[Block], kept: Tensor) -> list[nn.Parameter]:
    """Return the tensors of blocks of which no unit is kept."""
    stays, begin, lost = kept.tolist(), 0, []  # read at once: on a GPU, each reading waits
    for block in blocks:
        lost += [] if any(stays[begin : begin + block.count]) else block.tensors
        begin += block.count
    return lost


_FATES = {"masked": Masked, "dimmed": Fate, "frozen": Frozen, "removed": Removed}


def fate_of(action: Action) -> Fate:
    """Return what the loop does about units that lose by this action."""
    return _FATES[action.fate](action)
