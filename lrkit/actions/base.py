"""The protocol of an action: what happens to the units that lose."""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, get_args

import attrs
import torch
from torch import Tensor

from lrkit.parameterizations.base import Parameterization
from lrkit.units import Block, UnitKind

Fate = Literal["masked", "dimmed", "frozen", "removed"]
"""What becomes of a unit that loses.

- ``"masked"``: it adds nothing to the output (a λ that is zero), but stays, and goes on training.
- ``"dimmed"``: it goes on adding to the output, if less (a λ that is halved). It counts as trained.
- ``"frozen"``: it stops training and stays as it is.
- ``"removed"``: as masked, and its components leave the tensors when a verdict says so (`Verdict.cut`).
"""

_Lazy = Tensor | Callable[[], Tensor]


@attrs.frozen(eq=False)
class Ballot:
    """The facts that a decision goes by.

    Args:
        scores: unit scores [n], never NaN.
        candidates: bool [n], the units that may be kept: all, or those kept so far if losing is final; without those that
            the action's `Action.proximal` has just taken out. A verdict that keeps another one is refused.
        budget: how many units may be kept, or what they may cost where there are `costs`.
        share: the budget as a share of all units, before it was made a whole number.
        entries: the entry-wise scores [N] behind the candidates' scores.
        parts: how many tensors each unit's score is a sum over [n].
        blocks: the number of the block that each unit belongs to [n]: 0, 1, ..., in the order of `Action.apply`'s blocks.
        sizes: how many entries each unit has in all of its tensors [n]; None if nobody has said.
        last: whether it is the last decision.
        layers: how many blocks there are; one without units is never named in `blocks`.
        seed: what `generator` begins with: from the run's seed, the step and the policy.
        costs: what each unit costs [n], if the budget is one of costs (`lrkit.Scheduler`, `amount`); None if it is a number
            of units.
        memory: what the metric remembers of each unit, by the names in its `lrkit.metrics.Importance.memory` [n]; not to be
            written to.
        kept: bool [n], the units that the last decision kept, all of them before the first one; not to be written to. Those
            that it leaves out are masked or frozen now, and candidates all the same unless losing is final.

    Entries, parts, blocks, sizes and costs may be given as functions, called when first read: most actions go by the units'
    scores.
    """

    scores: Tensor
    candidates: Tensor
    budget: int
    share: float
    _entries: _Lazy
    _parts: _Lazy
    _blocks: _Lazy
    _sizes: _Lazy | None = None
    last: bool = False
    layers: int = 0
    seed: int = 0
    _costs: _Lazy | None = None
    memory: Mapping[str, Tensor] = attrs.field(factory=dict)
    kept: Tensor = attrs.field(default=attrs.Factory(lambda self: torch.ones_like(self.candidates), takes_self=True))

    @functools.cached_property
    def generator(self) -> torch.Generator:
        """A random generator on the CPU, for an action that leaves something to chance.

        It begins the same on every process and in a resumed run, and differs from step to step and from policy to policy.
        For example ``torch.rand(len(ballot.scores), generator=ballot.generator)``.
        """
        return torch.Generator().manual_seed(self.seed)

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
        """How many entries each unit has in all of its tensors [n]; None if nobody has said."""
        return None if self._sizes is None else _made(self._sizes)

    @functools.cached_property
    def costs(self) -> Tensor | None:
        """What each unit costs [n]; None if the budget is a number of units."""
        return None if self._costs is None else _made(self._costs)


def _made(value: _Lazy) -> Tensor:
    return value if isinstance(value, Tensor) else value()


@attrs.frozen(eq=False)
class Verdict:
    """The answer of `Action.decide`.

    Args:
        kept: bool [n], the units that are kept.
        cut: whether components that are not kept leave the tensors, the statistics and the optimizer's state now, for good.
        fresh: how many new components each block gets; empty for none.
        core: the core value that each of them begins with; 0 leaves every output as it is.
        budget: the number of units that it went by, for the history; None for the ballot's budget.
        told: what the user should know of this decision, in one line that becomes a warning: nothing was measured, say.
    """

    kept: Tensor
    cut: bool = False
    fresh: tuple[int, ...] = ()
    core: float = 0.0
    budget: int | None = None
    told: str = ""


def unsound(action: "Action", verdict: object, ballot: Ballot, most: int) -> str | None:
    """Return why an action's answer is not one that can be carried out; None if it is.

    Args:
        action: the action.
        verdict: its answer.
        ballot: what it was asked.
        most: units that there are, or that the schedule has room for.
    """
    units, kept = len(ballot.scores), getattr(verdict, "kept", None)
    if not isinstance(verdict, Verdict):
        return f"decide must return a lrkit.actions.Verdict, not {type(verdict).__name__}"
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.shape != (units,):
        given = f"{getattr(kept, 'dtype', type(kept).__name__)} {list(getattr(kept, 'shape', ()))}"
        return f"kept must be bool [{units}], not {given}"
    if strange := int((kept & ~ballot.candidates).sum()):
        return f"it keeps {strange} units that are no candidates (`Ballot.candidates`)"
    fresh = verdict.fresh
    if fresh and not (len(fresh) == ballot.layers and all(type(n) is int and n >= 0 for n in fresh)):
        return f"fresh must be a whole number for each of {ballot.layers} blocks, not {fresh}"
    if any(fresh) and not action.grows:
        return f"fresh is {fresh}, and grows is False"
    if verdict.cut and (action.fate != "removed" or action.unit != "component"):
        return (
            f'cut is for components of the fate "removed", not for units of kind "{action.unit}" that are {action.fate}'
        )
    if verdict.budget is not None and not (type(verdict.budget) is int and 0 <= verdict.budget <= most):
        return f"budget must be a whole number of units, from 0 to {most}, not {verdict.budget!r}"
    if ballot.costs is not None and (spent := int(ballot.costs[kept].sum())) > ballot.budget:
        return f"it keeps units that cost {spent}, and the budget is {ballot.budget}: it must go by `Ballot.costs`"
    return None


By = Literal["score", "score-per-cost"]
"""By what units are ranked where the budget is one of costs: a unit's score, or its score over its cost."""

BY: tuple[By, ...] = get_args(By)
"""Both of them."""


def best(ballot: Ballot, by: By = "score") -> Tensor:
    """Return the best `budget` of the candidates, exactly, bool [n]; ties go to the earlier unit.

    A threshold alone keeps too many if scores equal it: the room that is left is for the first of those. If the budget is
    one of costs, the candidates are taken in the order of their scores, each if it still fits, until none does: what is kept
    never costs more than the budget, and falls short of it by less than any candidate that was left out costs.

    Args:
        ballot: the facts.
        by: how units that differ in cost are ranked.
    """
    if ballot.costs is not None:
        return _within(ballot, ballot.costs, by)
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


def _within(ballot: Ballot, costs: Tensor, by: By) -> Tensor:
    """Return the best of the candidates that a budget of costs has room for, bool [n]."""
    ranks = worth(ballot, by).masked_fill(~ballot.candidates, -torch.inf)
    room, each, may = ballot.budget, costs.tolist(), ballot.candidates.tolist()
    kept = torch.zeros_like(ballot.candidates)
    taken = []
    for unit in torch.sort(ranks, descending=True, stable=True).indices.tolist():
        if may[unit] and each[unit] <= room:
            taken.append(unit)
            room -= each[unit]
    kept[taken] = True
    return kept


def worth(ballot: Ballot, by: By = "score") -> Tensor:
    """Return what units are ranked by, float64 [n]: scores, or scores over costs if there are costs."""
    scores = ballot.scores.double()
    return scores if ballot.costs is None or by == "score" else scores / ballot.costs


@attrs.frozen(kw_only=True)
class Action(abc.ABC):
    """The fate of units that lose. Subclass with ``@attrs.frozen(kw_only=True)``.

    Effects that lie in tensors (a zeroed λ) are saved with them. Nothing is ever applied a second time to what a state
    holds: λ may have changed since the last decision. Whatever else has to be done about units that lost follows from
    `fate`: a masked λ is held at zero after the last decision, and a frozen tensor is frozen again after a load.
    """

    fate: ClassVar[Fate]
    """What becomes of a unit that loses."""
    final: ClassVar[bool] = False
    """True if that is for good, so that only units still kept are ranked. A frozen unit that is not final may train
    again."""
    grows: ClassVar[bool] = False
    """Whether `decide` may add components. The budget may then rise above its start."""

    @property
    @abc.abstractmethod
    def unit(self) -> UnitKind:
        """The kind of unit it acts on. For example ``"component"`` for a mask on λ."""

    def refusal(self, parameterization: Parameterization) -> str | None:
        """Say why it cannot act on this parameterization, in words that follow "because"; None if it can."""
        return None

    def proximal(self, blocks: Sequence[Block], share: float, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Move all units at a decision, before any is ranked: a proximal step, such as a soft threshold.

        For methods in which losing is not a comparison, but follows from a step: a penalty's proximal operator shrinks the
        units that stay as well, and those that it takes to zero are out.

        Args:
            blocks: the policy's units, n in all.
            share: the scheduler's share at this step, 1 before the schedule begins and its target at the end.
            optimizer: the one that has just stepped, for its learning rates; it must not be changed.

        Returns:
            bool [n], False for the units that are out; or None if there is no such step.
        """
        return None

    def decide(self, ballot: Ballot) -> Verdict:
        """Choose who is kept, and what is new: by default the best candidates that the budget has room for (`best`).

        An action that can rank by score per cost as well has a setting ``by`` and gives it to `best`.
        """
        return Verdict(best(ballot))

    @abc.abstractmethod
    def apply(self, blocks: Sequence[Block], kept: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        """Carry out a decision. For example a mask multiplies each λ by 1 or 0.

        It must come to the same if it is called twice with one `kept`.

        Args:
            blocks: the policy's units, n in all.
            kept: bool [n], True for units that are kept.
            optimizer: the one that is bound; its state may be dropped, its ``param_groups`` are never edited. None after a
                load, after the last decision, and at the end of a calibration, before any optimizer is bound.
        """

    def turnover(self, units: int, budget: int, layers: int) -> tuple[int, int] | None:
        """Return how many units a decision removes and adds; None if that is known only after a run.

        Used to count a run's parameters before training.

        If the scheduler counts costs, all of these numbers are costs.

        Args:
            units: units that there are.
            budget: the scheduler's.
            layers: layers that have such units.
        """
        return 0 if self.fate == "dimmed" else max(0, units - budget), 0
