"""The protocol of an action: what happens to the units that lose."""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from lrkit.parameterizations.base import Parameterization
from lrkit.units import Block, UnitKind

_Lazy = Tensor | Callable[[], Tensor]


@attrs.frozen(eq=False)
class Ballot:
    """What a decision goes by.

    Args:
        scores: unit scores [n], never NaN.
        candidates: bool [n], the units that may be kept: all, or where losing is final those kept so far; without those
            that the action's `Action.proximal` has just taken out.
        budget: how many units may be kept.
        share: the budget as a share of all units, before it was cut to an integer.
        entries: the entry-wise scores [N] behind the candidates' scores.
        parts: how many tensors each unit's score is a sum over [n].
        blocks: the number of the block that each unit belongs to [n]: 0, 1, ..., in the order of `Action.apply`'s blocks.
        sizes: how many entries each unit has in all of its tensors [n]; None where nobody has said.

    The last four may be given as what makes them when they are first read: most actions go by the units' scores alone.
    """

    scores: Tensor
    candidates: Tensor
    budget: int
    share: float
    _entries: _Lazy
    _parts: _Lazy
    _blocks: _Lazy
    _sizes: _Lazy | None = None

    @functools.cached_property
    def entries(self) -> Tensor:
        """The entry-wise scores [N] behind the candidates' scores."""
        return _made(self._entries)

    @functools.cached_property
    def parts(self) -> Tensor:
        """How many tensors each unit's score is a sum over [n]."""
        return _made(self._parts)

    @functools.cached_property
    def blocks(self) -> Tensor:
        """The number of the block that each unit belongs to [n]."""
        return _made(self._blocks)

    @functools.cached_property
    def sizes(self) -> Tensor | None:
        """How many entries each unit has in all of its tensors [n]; None where nobody has said."""
        return None if self._sizes is None else _made(self._sizes)


def _made(value: _Lazy) -> Tensor:
    return value if isinstance(value, Tensor) else value()


@attrs.frozen(kw_only=True)
class Growth:
    """What a decision adds.

    Args:
        fresh: how many new components each block gets.
        core: the core value that each of them begins with; 0 leaves every output as it is.
    """

    fresh: tuple[int, ...]
    core: float = 0.0


@attrs.frozen(kw_only=True)
class Action(abc.ABC):
    """What happens to the units that lose. Subclass with ``@attrs.frozen(kw_only=True)``.

    Effects that lie in tensors (a zeroed λ) are saved with them; effects that do not (a frozen flag) are made again by
    `restore`. Nothing is ever applied a second time on load: λ may have changed since the last decision.
    """

    reversible: ClassVar[bool]
    """Whether a unit that lost may win again. Where not, only units still kept are ranked."""
    freezes: ClassVar[bool] = False
    """Whether a unit that loses stops training; `apply` and `restore` take ``requires_grad`` from its tensors."""
    budgeted: ClassVar[bool] = True
    """Whether the scheduler's budget is the number of units that are kept. Where not, how many is known only after a run,
    and the scheduler's share stands for something else, such as the height of a threshold."""
    exact: ClassVar[bool] = True
    """Whether `select` keeps exactly the budget, ties and all. False for a rule that, as its source has it, does not."""
    retains: ClassVar[bool] = False
    """Whether a unit that lost goes on adding to the output, if less (a λ that is halved). It then counts as trained. Where
    not, what has lost is out after the last decision, and `hold` keeps it out."""
    grows: ClassVar[bool] = False
    """Whether it changes how many rank components there are; those not kept are cut for good, and `grow` adds new ones. The
    budget may then rise above its start."""

    @property
    @abc.abstractmethod
    def unit(self) -> UnitKind:
        """The kind of unit it acts on."""

    def refusal(self, parameterization: Parameterization) -> str | None:
        """Why it cannot act on this parameterization, in words that follow "because"; None where it can."""
        return None

    def proximal(self, blocks: Sequence[Block], share: float, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Move all units at a decision, before any is ranked: a proximal step, such as a soft threshold.

        For methods in which losing is no comparison, but what a step does: a penalty's proximal operator shrinks the units
        that stay as well, and those that it takes to zero are out.

        Args:
            blocks: the policy's units, n in all.
            share: the scheduler's share at this step, 1 before the schedule begins and its target at the end.
            optimizer: the one that has just stepped, for its learning rates; it is not to be changed.

        Returns:
            bool [n], False for the units that are out; or None where there is no such step.
        """
        return None

    def select(self, ballot: Ballot) -> Tensor:
        """Who is kept: exactly the best `budget` of the candidates, ties to the earlier unit.

        A threshold alone keeps too many where scores equal it: the room that is left is for the first of those.

        Returns:
            bool [n].
        """
        scores = ballot.scores.masked_fill(~ballot.candidates, -torch.inf)
        count = min(ballot.budget, int(ballot.candidates.sum()))
        if count == 0:
            return torch.zeros_like(ballot.candidates)
        lowest = torch.kthvalue(scores, len(scores) - count + 1).values
        kept = (scores >= lowest) & ballot.candidates
        if int(kept.sum()) > count:
            above = scores > lowest
            equal = kept & ~above
            kept = above | (equal & (equal.cumsum(0) <= count - above.sum()))
        return kept

    @abc.abstractmethod
    def apply(self, blocks: Sequence[Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Carry out a decision.

        Args:
            blocks: the policy's units, n in all.
            kept: bool [n], True for units that are kept.
            optimizer: the one that is bound; its state may be dropped, its ``param_groups`` are never edited.
        """

    def cuts(self, *, last: bool) -> bool:
        """Whether components that have just lost are cut out of their tensors: only where they can never come back.

        Args:
            last: whether it was the last decision.
        """
        return False

    def grow(self, blocks: Sequence[Block], kept: Tensor, ballot: Ballot) -> Growth:
        """What is added after `apply`. Asked only where `grows` is True.

        Args:
            blocks: the policy's units as they were ranked, n in all.
            kept: bool [n]; what is not kept is cut in the same move.
            ballot: what the decision went by.
        """
        return Growth(fresh=(0,) * len(blocks))

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int]:
        """How many units a decision takes away, and how many it adds: what a run is counted by before it is trained.

        Args:
            units: units that there are.
            budget: the scheduler's.
            layers: layers that have such units.
        """
        return 0 if self.retains else max(0, units - budget), 0

    def hold(self, blocks: Sequence[Block], kept: Tensor) -> None:
        """After every optimizer step once the last decision is taken: keep its effect up."""
        return

    def restore(self, blocks: Sequence[Block], kept: Tensor) -> None:
        """After a state was loaded: make again what the loaded tensors do not hold."""
        return
