"""One policy of a run and its state: which units are kept, its schedule, and its metric's statistics."""

import bisect
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lrkit.actions import Ballot, Verdict, unsound
from lrkit.errors import LrkitError
from lrkit.loop.costs import Costs
from lrkit.loop.course import Span, course, is_known
from lrkit.loop.draws import uniform
from lrkit.loop.fates import fate_of
from lrkit.loop.pieces import Look, as_is
from lrkit.loop.remembered import unchanged
from lrkit.loop.resizing import Resize, Resized
from lrkit.loop.signals import Remembered, kind_of
from lrkit.method import Policy
from lrkit.schedulers import Timetable
from lrkit.schedulers.timetable import decides_at_start
from lrkit.units import Block, Part, split


@attrs.frozen(eq=False)
class Decided:
    """A decision that has not been carried out.

    Args:
        verdict: the action's.
        threshold: the lowest score among the kept units; None if none is kept.
        skipped: whether gradients were not finite at some step since the last decision (on a device).
    """

    verdict: Verdict
    threshold: float | None
    skipped: bool


class PolicyState:
    """One policy of a run.

    Args:
        index: its place in ``method.policies``.
        policy: the policy.
        blocks: its units at first.
        parts: all parts of the parameterization.
        off: ``id`` of each tensor that somebody froze by hand. Its entries stay laid out as before, without a gradient.
    """

    def __init__(
        self, index: int, policy: Policy, blocks: Sequence[Block], parts: Sequence[Part], off: Collection[int] = ()
    ) -> None:
        self.index, self.policy, self.blocks, self.off = index, policy, list(blocks), off
        self.fate = fate_of(policy.action)
        self.units = sum(block.count for block in blocks)
        self.costs = Costs.of(policy.scheduler.amount, blocks, parts, self.capacity)
        self.times: Timetable | None = None
        self.ended = False
        self.dead: frozenset[int] = frozenset()
        """``id`` of each tensor that the loss does not reach: a unit of such ones alone has no entries, and ranks last."""
        device = blocks[0].tensors[0].device
        # A model without weights is there to be counted: what is kept must be a number all the same.
        device = torch.device("cpu") if device.type == "meta" else device
        self.kept = torch.ones(self.units, dtype=torch.bool, device=device)
        kind = kind_of(policy.metric)
        self.statistics: Remembered = kind.restored(policy.metric, kind.lay([], [], policy.metric.reads), {}, 0)

    @property
    def layers(self) -> int:
        """How many layers an amount that is an average counts: those with such units. Each expert of a stack is one."""
        return sum({id(block.module): block.maps for block in self.blocks}.values())

    @property
    def capacity(self) -> int:
        """How many units the schedule has room for: all, those still to come included if the action adds some."""
        scheduler = self.policy.scheduler
        amounts = (scheduler.start, scheduler.target) if self.policy.action.grows else ()
        return max([self.units, *(a * self.layers for a in amounts if isinstance(a, int))])

    def over(self, total_steps: int) -> Timetable:
        """Bind the schedule to a run of so many steps. Raises LrkitError if it does not fit."""
        return self.policy.scheduler.over(total_steps, units=self.costs.whole, layers=self.costs.layer)

    @property
    def at_start(self) -> bool:
        """Whether a decision is taken at step 0."""
        return decides_at_start(self.policy.scheduler)

    def cost(self, units: Tensor) -> int:
        """Return what some units cost, bool [units], as the schedule counts; their number if each counts as one."""
        return int((units if self.costs.each is None else self._by_unit(self.blocks, self.costs.each)[units]).sum())

    def begin(self) -> None:
        """Lay out all entries and begin their statistics at zero. A loaded policy remembers its own instead."""
        self.statistics = kind_of(self.policy.metric)(self.policy.metric, self.layout())

    @property
    def unit_names(self) -> list[str]:
        """Names of all units, in order."""
        return [name for block in self.blocks for name in block.unit_names()]

    def names(self, units: Tensor) -> tuple[str, ...]:
        """Return the names of some units, bool [units]."""
        ends = list(itertools.accumulate(block.count for block in self.blocks))
        places = [(bisect.bisect_right(ends, unit), unit) for unit in units.nonzero().flatten().tolist()]
        return tuple(self.blocks[at].unit_names()[unit - ends[at]] for at, unit in places)

    def _look(self, p: nn.Parameter) -> tuple[tuple[int, ...], bool]:
        shape, trains = as_is(p)
        return shape, trains or id(p) in self.off

    def layout(self, look: Look | None = None) -> Any:
        """Lay out all units that are still ranked, as the kind of statistics has them: none after the last decision."""
        blocks = [] if self.ended else self.blocks
        present = [] if self.ended else self.fate.ranked(self.kept, blocks)
        kind = kind_of(self.policy.metric)
        if kind.by_gradient:  # those that the loss does not reach have no entries to score
            present = [there and self._reached(block) for there, block in zip(present, blocks, strict=True)]
        return kind.lay(blocks, present, self.policy.metric.reads, look or self._look)

    def blank(self, look: Look) -> dict[str, Tensor]:
        """Return tensors of the names, shapes and types that the statistics have in a state, looked at by `look`."""
        if self.ended:
            return {name: t.new_empty(0) for name, t in self.statistics.saved().items()}
        return kind_of(self.policy.metric).blank(self.policy.metric, self.layout(look))  # type: ignore[no-any-return]

    @property
    def masks(self) -> bool:
        """Whether units lie masked at times: until a schedule's end, if they are removed by then."""
        return self.policy.action.fate == "masked" or (self.policy.action.fate == "removed" and not self.ended)

    @property
    def wakes(self) -> bool:
        """Say whether units that lost may come back at a decision that is still to be taken."""
        return not (self.ended or self.policy.action.final)

    def due(self, step: int) -> bool:
        """Say whether a decision is taken after optimizer step `step` (1, 2, ...)."""
        return not self.ended and self.times is not None and self.times.due(step)

    def observes(self, step: int) -> bool:
        """Say whether the metric takes in optimizer step `step` (1, 2, ...)."""
        return not self.ended and self.times is not None and self.times.observes(step)

    def course(self) -> list[Span]:
        """Return the run's spans of equal states, as the schedule alone has them. See `lrkit.loop.course`."""
        assert self.times is not None
        return course(self.times, self.policy.action, self.costs.first)

    def follow_device(self) -> None:
        """Move mask and statistics to the device that the model has gone to since attach."""
        first = self.blocks[0]
        device = first.tensor(first.parts[0]).device
        if device == (self.kept.device if self.ended else self.statistics.layout.device):
            return
        # If a tensor cannot move in place, the module has a new one: look them up again.
        self.blocks = [attrs.evolve(block) for block in self.blocks]
        self.statistics = self.statistics.moved(self.layout())
        self.kept = self.kept.to(device)

    def follow(self) -> None:
        """Follow tensors that stopped training, or train again: they lose their statistics, or begin anew."""
        if not self.ended:
            self.statistics = self.statistics.follow(self.layout())

    def resize(
        self,
        layers: Mapping[str, Resize],
        tensors: Mapping[int, Resized],
        numbers: Mapping[str, Sequence[int]],
    ) -> None:
        """Follow tensors that were resized: masks and statistics of what stays stay; fresh components are kept, at zero.

        Args:
            layers: what was done, by layer name.
            tensors: the same by the tensor's ``id``.
            numbers: by layer name the numbers of its components now.
        """
        carried = unchanged
        if (before := self.blocks)[0].kind == "component":

            def carried(values: Tensor, new: float, /) -> Tensor:
                each = zip(split(values, before), before, strict=True)
                return torch.cat([layers[b.name].of(v, 0, new) if b.name in layers else v for v, b in each])

            self.take(numbers, carried(self.kept, True))
        if not self.ended:
            self.statistics = self.statistics.follow(self.layout(), tensors, carried)

    def take(self, numbers: Mapping[str, Sequence[int]], kept: Tensor) -> None:
        """Take over which components there are, by layer name, and which units are kept, bool [units]."""
        if self.blocks[0].kind == "component":
            self.blocks = [
                attrs.evolve(block, count=len(numbers[block.name]), numbers=tuple(numbers[block.name]))
                for block in self.blocks
            ]
        self.kept = kept

    def bury(self, dead: Collection[int]) -> None:
        """Take over which tensors the loss does not reach, by ``id``."""
        self.dead = frozenset(dead)

    def _reached(self, block: Block) -> bool:
        return not self.dead or any(id(tensor) not in self.dead for tensor in block.tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Return mask and statistics by the names that a state has for them."""
        named = {"kept": self.kept, **self.statistics.saved()}
        return {f"policy.{self.index}.{name}": tensor for name, tensor in named.items()}

    def remember(self, tensors: Mapping[str, Tensor], observations: int) -> None:
        """Take over the statistics of a state, whose tensors `tensors` has named; the mask is there already."""
        prefix = f"policy.{self.index}."
        saved = {} if self.ended else {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.statistics = kind_of(self.policy.metric).restored(self.policy.metric, self.layout(), saved, observations)

    def end(self) -> None:
        """Drop the statistics after the last decision: they have done their work."""
        self.ended = True
        observations, metric = self.statistics.observations, self.policy.metric
        self.statistics = kind_of(metric).restored(metric, self.layout(), {}, observations)

    def scores(self, seed: int) -> Tensor:
        """Return the scores of all units [units], -inf for one that is out for good.

        Args:
            seed: the decision's, for a metric that leaves something to chance.
        """
        return self.statistics.scores(functools.cache(functools.partial(uniform, seed, self.blocks)))

    @torch.no_grad()
    def decide(self, step: int, standing: Tensor | None, seed: int) -> Decided:
        """Decide which units to keep after a step; nothing is carried out.

        Args:
            step: the optimizer step just taken.
            standing: bool [units], False for those that a proximal step has taken out; None for no such step.
            seed: the decision's (`lrkit.loop.draws.seed_of`).
        """
        assert self.times is not None
        skipped = self.statistics.skipped()
        # A score that is not a number (diverged weights) ranks last.
        scores = torch.nan_to_num(self.scores(seed), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        candidates = self.fate.candidates(self.kept)
        candidates = candidates if standing is None else candidates & standing
        blocks, budget = self.blocks, self.times.budget(step)  # as they are now, whenever the ballot is read
        each = self.costs.each
        if self.dead:
            live = self._by_unit(blocks, [self._reached(block) for block in blocks]).bool()
            scores = torch.where(live, scores.clamp_min(torch.finfo(scores.dtype).min), -torch.inf)
            if is_known(self.policy.action) and self.cost(candidates & live) >= budget:
                candidates = self.fate.without(candidates, live)
        ballot = Ballot(
            scores,
            candidates,
            budget,
            self.times.share(step),
            self.statistics.entries,
            lambda: self._by_unit(blocks, [len(block.parts) for block in blocks]),
            lambda: self._by_unit(blocks, range(len(blocks))),
            lambda: self._by_unit(blocks, [sum(t.numel() for t in b.tensors) // max(1, b.count) for b in blocks]),
            last=step == self.times.last,
            layers=len(blocks),
            seed=seed,
            costs=None if each is None else (lambda: self._by_unit(blocks, each)),
            memory=self.statistics.memory,
            kept=self.kept,
        )
        action = self.policy.action
        verdict = action.decide(ballot)
        if reason := unsound(action, verdict, ballot, max(self.capacity, len(scores))):
            raise LrkitError(f"{action!r} at step {step}: {reason}")
        kept = verdict.kept
        self.statistics.decided(kept)
        return Decided(verdict, float(scores[kept].min()) if bool(kept.any()) else None, skipped)

    def _by_unit(self, blocks: Sequence[Block], values: Sequence[int]) -> Tensor:
        """Return a number per block as one per unit [units]."""
        each = [value for value, block in zip(values, blocks, strict=True) for _ in range(block.count)]
        return torch.tensor(each, dtype=torch.long, device=self.kept.device)


def leave_out(policies: Sequence[PolicyState], dead: Collection[int]) -> None:
    """Let policies leave out the tensors that the loss does not reach, by ``id``, and their statistics follow."""
    for state in policies:
        state.bury(dead)
        state.follow()
