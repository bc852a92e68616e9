"""The loop of an adaptive method: observe, score, decide, apply; and all of its state.

At every real optimizer step, each policy's metric observes weights and gradients. When the scheduler says that a
decision is due, entry-wise scores are reduced to unit scores, the best b(t) units are kept, and the action is applied.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lrkit import states
from lrkit.actions import Ballot
from lrkit.errors import LrkitError, LrkitWarning, shown
from lrkit.gradients import Unclipped
from lrkit.history import Decision
from lrkit.layout import GradientOf, Layout, own_gradient
from lrkit.liveness import Liveness
from lrkit.method import Method, Policy
from lrkit.settings import MOST_STEPS
from lrkit.states import NAMES, misfit
from lrkit.tally import Tally
from lrkit.targets import listing
from lrkit.units import Block, Part, blocks_of, present, resize, split


@attrs.frozen(eq=False)
class _Resize:
    """Which components of a layer stay, in order [n], and how many fresh ones follow them."""

    index: Tensor
    fresh: int = 0

    def of(self, values: Tensor, axis: int, new: Tensor | float = 0.0) -> Tensor:
        """A tensor with one slice a component along `axis`, resized; fresh slices are `new`, a tensor or a number."""
        stays = values.index_select(axis, self.index.to(values.device))
        if not self.fresh:
            return stays
        if not isinstance(new, Tensor):
            shape = list(stays.shape)
            shape[axis] = self.fresh
            new = stays.new_full(shape, new)
        return torch.cat((stays, new), dim=axis)


class PolicyState:
    """What one policy remembers: which units are kept, and its metric's statistics."""

    def __init__(self, index: int, policy: Policy, blocks: list[Block]) -> None:
        self.index, self.policy, self.blocks = index, policy, blocks
        # Amounts given as an average are for each layer that has such units: AFLoRA's FFN layers alone, say.
        self.layers = len({id(block.module) for block in blocks})
        self.units = sum(block.count for block in blocks)
        # What the schedule's amounts are of: all units, those still to come included where the action adds some.
        amounts = (policy.scheduler.start, policy.scheduler.target) if policy.action.grows else ()
        self.capacity = max([self.units, *(a * self.layers for a in amounts if isinstance(a, int))])
        self.observations = 0
        self.ended = False
        self.dead: frozenset[int] = frozenset()
        """``id`` of each adapter that the loss does not reach: it has no entries, and ranks last."""
        self._name_units()
        device = blocks[0].tensors[0].device
        # A model without weights is there to be counted: what is kept must be a number all the same.
        device = torch.device("cpu") if device.type == "meta" else device
        self.kept = torch.ones(self.units, dtype=torch.bool, device=device)
        self.layout = self._layout()
        self._device = self.layout.device
        self.buffers = {name: self._zeros(self.layout.size) for name in policy.metric.buffers}
        self.still = self._zeros(0)
        self._finite: Tensor | None = None
        self._means: Tensor | None = None  # scores that were made at this step, for the decision after it

    def _name_units(self) -> None:
        self.unit_names = [name for block in self.blocks for name in block.unit_names()]

    def _by_unit(self, blocks: Sequence[Block], values: Sequence[int]) -> Tensor:
        """A number for each block as one for each unit [units]."""
        each = [value for value, block in zip(values, blocks, strict=True) for _ in range(block.count)]
        return torch.tensor(each, dtype=torch.long, device=self.kept.device)

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float32, device=self.layout.device)

    def _layout(self) -> Layout:
        if self.ended:
            return Layout([], [], self.policy.metric.reads)
        # Where losing is final, the losers are not ranked again.
        if self.policy.action.reversible:
            present = [True] * len(self.blocks)
        else:
            present = [bool(kept.any()) for kept in split(self.kept, self.blocks)]
        # What has been cut away whole has no score, nor has what the loss does not reach.
        present = [
            there and id(b.module) not in self.dead and any(p.numel() for p in b.tensors)
            for there, b in zip(present, self.blocks, strict=True)
        ]
        return Layout(self.blocks, present, self.policy.metric.reads)

    def follow_device(self) -> None:
        """Move the statistics to where the model has gone since attach."""
        first = self.blocks[0]
        device = first.tensor(first.parts[0]).device
        if device == self._device:
            return
        self._device = device
        # Where a tensor cannot move in place, the module has a new one: look them up again.
        self.blocks = [attrs.evolve(block) for block in self.blocks]
        self.layout = self._layout()
        self.kept, self.still = self.kept.to(device), self.still.to(device)
        self.buffers = {name: flat.to(device) for name, flat in self.buffers.items()}

    def relayout(self) -> None:
        """Follow tensors that stopped training: drop their statistics, keep their last scores where still ranked."""
        old, metric = self.layout, self.policy.metric
        if self.ended:
            return
        new = self._layout()
        scores = metric.score(old.weights(), self.buffers) if new.still else old.weights()
        live, still = old.slices(), old.still_slices()
        known = {id(p): scores[where] for p in new.still if (where := live.get(id(p))) is not None}
        known |= {id(p): self.still[where] for p in new.still if (where := still.get(id(p))) is not None}
        pieces = [known[id(p)] if id(p) in known else self._zeros(p.numel()) for p in new.still]
        self.still = torch.cat(pieces).clone() if pieces else self._zeros(0)
        self.buffers = {name: new.move(flat, old) for name, flat in self.buffers.items()}
        self.layout, self._means = new, None

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a decision is taken after optimizer step `step` (1, 2, ...)."""
        number = step - 1 + self.policy.scheduler.first_step
        return not self.ended and self.policy.scheduler.due(number, total_steps=total_steps)

    def change(self, step: int, before: int, after: int) -> str | None:
        """Say what another number of total steps would change from `step` on; None if nothing, since all is decided."""
        if self.ended:
            return None
        scheduler = self.policy.scheduler
        number = step - 1 + scheduler.first_step
        ends = [scheduler.end(total) for total in (before, after)]
        amounts = {"units": self.capacity, "layers": self.layers}
        budgets = [scheduler.budget(number, total_steps=total, **amounts) for total in (before, after)]
        return (
            f"last decision at step {ends[1]} instead of {ends[0]}, budget at step {number} {budgets[1]} instead of "
            f"{budgets[0]} of {self.capacity} units"
        )

    def observe(self, controller: "Controller", scale: Tensor | None, of: GradientOf = own_gradient) -> None:
        """Take in one optimizer step, whose gradients still carry a factor `scale` if it is not None."""
        if self.ended or not self.policy.metric.buffers or not self.layout.live:
            return
        assert controller.total_steps is not None
        step = controller.step + (self.policy.metric.measure != "after-step")
        number = step - 1 + self.policy.scheduler.first_step
        if not self.policy.scheduler.observes(number, total_steps=controller.total_steps):
            return
        self.observations += 1
        grads = self.layout.grads(of)
        if missing := len(self.layout.live) - len(grads):
            controller.warn(
                "none",
                f"{missing} of {len(self.layout.live)} adapter tensors have no gradient at step {step}: "
                "they count as zero. Were they left out of the graph, or the gradients cleared before the step?",
            )
        kernel, done = self.policy.metric.kernel(), None
        if kernel is not None and not missing and scale is None:
            mean, deviation = self.buffers["importance"], self.buffers["uncertainty"]
            scoring = self.due(step, controller.total_steps) and not self.layout.still
            done = self.layout.native.observe(kernel, grads, mean, deviation, scoring=scoring)
            self._means = done[1] if done is not None and done[0] and scoring else None
        if not (self._observe_pieces(scale, of) if done is None else done[0]):
            self._not_finite(controller, f"at step {step}")

    def _observe_pieces(self, scale: Tensor | None, of: GradientOf) -> bool:
        """The same by the metric's own tensor operations. False: gradients are not finite, and nothing was changed."""
        finite = self.layout.finite(of)
        waits = self.layout.device.type != "cpu"
        if not waits and not finite:
            return False
        for weight, grad, state in self.layout.each(self.buffers, of):
            # On a device nothing is waited for: what was is put back there, and `decide` asks whether it had to be.
            before = {name: flat.clone() for name, flat in state.items()} if waits else {}
            self.policy.metric.observe(
                weight, grad if scale is None else grad / scale.to(grad.device), state, self.observations
            )
            for name, flat in before.items():
                state[name].copy_(torch.where(finite, state[name], flat))
        if waits:
            self._finite = finite if self._finite is None else self._finite & finite
        return True

    @staticmethod
    def _not_finite(controller: "Controller", when: str) -> None:
        controller.warn("finite", f"gradients are not finite {when}: the statistics skip this step")

    def entries(self) -> Tensor:
        """Entry-wise scores of what still trains [N]."""
        return self.policy.metric.score(self.layout.weights(), self.buffers)

    def scores(self) -> Tensor:
        """Unit scores [units], -inf where a unit is out for good."""
        if self.policy.metric.kernel() is not None and not self.layout.still:
            mean, deviation = self.buffers["importance"], self.buffers["uncertainty"]
            if self.layout.native.usable(mean, deviation):
                means = self._means if self._means is not None else self.layout.native.score(mean, deviation)
                return self.layout.reduce_means(means)
        return self.layout.reduce(self.entries(), self.still, self.policy.metric.reduce)

    @torch.no_grad()
    def decide(
        self, controller: "Controller", budget: int, share: float, standing: Tensor | None
    ) -> tuple[Tensor, float | None, Ballot]:
        """Which units to keep.

        Args:
            controller: whom to tell of gradients that were not finite.
            budget: how many.
            share: the same as a share of all, not cut to an integer.
            standing: bool [units], False for those that a proximal step has taken out; None for no such step.

        Returns:
            bool [units], the lowest score that is kept (None where nothing is), and what the decision went by.
        """
        if self._finite is not None and not self._finite:
            self._not_finite(controller, f"before step {controller.step}")
        self._finite = None
        # A score that is not a number (diverged weights) ranks last.
        scores = torch.nan_to_num(self.scores(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        candidates = torch.ones_like(self.kept) if self.policy.action.reversible else self.kept
        candidates = candidates if standing is None else candidates & standing
        blocks = self.blocks  # as they are now, whenever the ballot is read
        if self.dead:
            live = self._by_unit(blocks, [id(block.module) not in self.dead for block in blocks]).bool()
            scores = torch.where(live, scores.clamp_min(torch.finfo(scores.dtype).min), -torch.inf)
            if int((candidates & live).sum()) >= budget:
                candidates = candidates & live
        parts = lambda: self._by_unit(blocks, [len(block.parts) for block in blocks])  # noqa: E731
        places = lambda: self._by_unit(blocks, range(len(blocks)))  # noqa: E731
        sizes = lambda: self._by_unit(blocks, [sum(t.numel() for t in b.tensors) // max(1, b.count) for b in blocks])  # noqa: E731
        ballot = Ballot(scores, candidates, budget, share, self.entries, parts, places, sizes)
        kept = self.policy.action.select(ballot)
        self._means = None
        return kept, float(scores[kept].min()) if bool(kept.any()) else None, ballot

    def course(self, total_steps: int) -> list[tuple[int, int, int, int]]:
        """What a whole run does to the units, as the schedule alone has it, without walking through its steps.

        Returns:
            Spans of equal states, in order: after how many of 0, 1, ..., `total_steps` steps the state is this one, units
            that there are, cut by then, and added by then. Once all units there were at first have been cut, spans that
            differ in the last two alone are one.
        """
        scheduler, turnover = self.policy.scheduler, self.policy.action.turnover
        there, cut, added, since = self.units, 0, 0, 0
        course = []

        def budget(number: int) -> int:
            return scheduler.budget(number, total_steps=total_steps, units=self.capacity, layers=self.layers)

        for span in scheduler.decisions(total_steps):
            at = 0
            while at < len(span):
                allowed = budget(span[at])
                last = _last_equal(budget, span, at)
                while at <= last:
                    goes, comes = turnover(there, allowed, self.layers)
                    if not goes and not comes:
                        break
                    step = span[at] - scheduler.first_step + 1
                    course.append((step - since, there, cut, added))
                    times = last - at + 1 if goes == comes and cut >= self.units else 1
                    since, there = step, there - goes + comes
                    cut, added, at = cut + goes * times, added + comes * times, at + times
                at = last + 1
        return [*course, (total_steps + 1 - since, there, cut, added)]

    def rebuild(self, components: Mapping[str, tuple[int, ...]], counts: Mapping[str, int], kept: Tensor) -> None:
        """Take over blocks of other ranks. The statistics have to be put in place after it.

        Args:
            components: by layer name the numbers of its components, where some have been cut or added.
            counts: by layer name how many there are.
            kept: bool [units].
        """
        if self.policy.action.unit == "component":
            self.blocks = [
                attrs.evolve(block, count=counts[block.name], numbers=components.get(block.name))
                for block in self.blocks
            ]
            self._name_units()
        self.kept = kept
        self.layout, self._means = self._layout(), None

    def apart(self) -> dict[str, dict[int, Tensor]]:
        """The statistics of each tensor in its shape, by buffer and by the tensor's ``id``; under no name, what is still."""
        if self.ended:
            return {}
        live, still = self.layout.slices(), self.layout.still_slices()
        found = {
            name: {id(p): flat[live[id(p)]].view(p.shape) for p in self.layout.live}
            for name, flat in self.buffers.items()
        }
        return {**found, "": {id(p): self.still[still[id(p)]].view(p.shape) for p in self.layout.still}}

    def resize(
        self,
        layers: Mapping[str, _Resize],
        tensors: Mapping[int, tuple[_Resize, int]],
        components: Mapping[str, tuple[int, ...]],
        counts: Mapping[str, int],
        apart: Mapping[str, Mapping[int, Tensor]],
    ) -> None:
        """Follow tensors that were resized: masks and statistics of what stays stay, those of fresh components are zero.

        Args:
            layers: what was done to each layer.
            tensors: the same by the tensor's ``id``, with the axis.
            components: as `rebuild` takes them.
            counts: likewise.
            apart: what `apart` gave before.
        """
        kept = self.kept
        if self.policy.action.unit == "component":
            masks = zip(split(kept, self.blocks), self.blocks, strict=True)
            kept = torch.cat([layers[b.name].of(m, 0, True) if b.name in layers else m for m, b in masks])
        self.rebuild(components, counts, kept)
        if self.ended:
            return

        def together(pieces: Mapping[int, Tensor], order: Sequence[nn.Parameter]) -> Tensor:
            flat = [self._zeros(0)]
            for p in order:
                piece = pieces.get(id(p))
                if piece is None:
                    piece = self._zeros(p.numel())
                elif id(p) in tensors:
                    how, axis = tensors[id(p)]
                    piece = how.of(piece, axis)
                flat.append(piece.reshape(-1))
            return torch.cat(flat)

        self.still = together(apart[""], self.layout.still)
        self.buffers = {name: together(apart[name], self.layout.live) for name in self.buffers}

    def end(self) -> None:
        """After the last decision: the statistics have done their work."""
        self.ended = True
        self.buffers = {}
        self.still = self._zeros(0)
        self.layout, self._means = self._layout(), None


class Controller:
    """All policies of one run and their state.

    Args:
        method: the method.
        modules: layer name to adapter.
        trained: ``id`` of every parameter that trains when the run begins.
        others: what trains beside the adapters.
    """

    def __init__(
        self,
        method: Method,
        modules: Mapping[str, nn.Module],
        trained: set[int],
        others: Sequence[nn.Parameter] = (),
    ) -> None:
        self.method, self.modules, self._trained = method, modules, trained
        self.step = 0
        self.total_steps: int | None = None
        self.history: list[Decision] = []
        self._warned: set[str] = set()
        self._scale: Tensor | None = None
        penalized = method.parameterization.penalty_weight is not None
        self.liveness = Liveness(modules, trained, others, whole=penalized)
        parts = method.parameterization.parts
        self.policies: list[PolicyState] = []
        for index, policy in enumerate(method.policies):
            blocks = blocks_of(modules, parts, policy.action.unit, trained)
            if not blocks:
                raise LrkitError(
                    f"{type(policy.action).__name__} has nothing to act on: no unit of kind {policy.action.unit!r} trains "
                    "in the layers that were chosen"
                )
            self.policies.append(PolicyState(index, policy, blocks))
        if any(state.policy.action.cuts(last=True) or state.policy.action.grows for state in self.policies):
            self._check_cuttable()
        # What is drawn when components are added: from here and the step alone, so that a resumed run draws the same.
        self.seed = int(torch.randint(2**62, ())) if self.grows else 0
        self._tally = Tally(modules, parts, trained)
        self._survey()
        self.starts = self.counts
        self.initial_ranks = self.ranks()
        # The numbers by which components are called, of layers where some were cut or added; and how many were given.
        self._components: dict[str, tuple[int, ...]] = {}
        self._numbered = dict(self.initial_ranks)

    # ---- the loop ----

    @property
    def grows(self) -> bool:
        """Whether a policy adds components."""
        return any(state.policy.action.grows for state in self.policies)

    def check_schedules(self, total_steps: int) -> None:
        """Raise LrkitError where a schedule does not fit a run of so many steps."""
        if total_steps > MOST_STEPS:
            raise LrkitError(f"total_steps must be at most {MOST_STEPS:,}, not {shown(total_steps)}")
        for state in self.policies:
            if state.ended:
                continue
            scheduler = state.policy.scheduler
            scheduler.bounds(total_steps)
            amounts = {"units": state.capacity, "layers": state.layers, "total_steps": total_steps}
            first = scheduler.budget(-1, **amounts)
            last = scheduler.budget(scheduler.first_step + total_steps, **amounts)
            if last > first and not state.policy.action.grows:
                raise LrkitError(
                    f"{type(scheduler).__name__}: target {scheduler.target!r} is {last} of {state.capacity} units, "
                    f"above start {scheduler.start!r}, which is {first}: a budget never grows"
                )

    def objection(self, total_steps: int) -> str | None:
        """Say why a run that has begun cannot go on as one of so many steps; None if it can.

        Once every schedule has ended, nothing depends on the total any more, and the run may be longer.
        """
        before = self.total_steps
        if before is None or not self.step or before == total_steps:
            return None
        if total_steps < self.step:
            return f"total_steps={total_steps}, but {self.step} steps have been taken: it counts the whole run"
        changes = [change for state in self.policies if (change := state.change(self.step, before, total_steps))]
        if not changes:
            return None
        return (
            f"total_steps={total_steps}, but this run was begun with {before}, and its schedule has not ended: the schedule "
            f"would be another one ({'; '.join(changes)}). Go on with {before}, or attach anew"
        )

    def begin(self, total_steps: int) -> None:
        """Check every schedule against the length of the run, and go by it. Raises LrkitError where one does not fit."""
        self.check_schedules(total_steps)
        self.total_steps = total_steps
        self.foretell(total_steps)

    def foretell(self, total_steps: int) -> None:
        """Say once what a run of so many steps will not reach by its schedules."""
        for state in self.policies:
            if state.ended:
                continue
            scheduler = state.policy.scheduler
            first, end = scheduler.first_step, scheduler.end(total_steps)
            if not first <= end < first + total_steps:
                self.warn(
                    f"end {state.index}",
                    f"{type(scheduler).__name__}: the last decision is due at step {end}, and the run's steps are numbered "
                    f"{first} to {first + total_steps - 1}: the budget will not be reached",
                )
                continue
            action = state.policy.action
            amounts = {"units": state.capacity, "layers": state.layers, "total_steps": total_steps}
            budget = scheduler.budget(end, **amounts)
            if action.unit == "component" and action.budgeted and not (action.retains or action.freezes or budget):
                self.warn(
                    f"nothing {state.index}",
                    f"{type(scheduler).__name__}.target = {scheduler.target!r}: after the last decision, at step {end}, no "
                    f"component is left, and the model is the one before fine-tuning but for its head",
                )
            if action.grows:
                there = state.course(total_steps)[-1][1]
                if there != budget:
                    self.warn(
                        f"short {state.index}",
                        f"{state.policy.action!r}: after the last decision, at step {end}, there will be {there} "
                        f"components of a budget of {budget}: give it more decisions, or more at each",
                    )

    def look(self) -> None:
        """See which adapters have gradients, name those that have none, and leave them out of the rankings."""
        if not self.liveness.look():
            return
        dead = self.liveness.dead
        assert dead is not None
        self._bury(dead)
        for state in self.policies:
            state.relayout()
        if dead:
            self.warn(
                "dead",
                f"no gradient reaches {len(dead)} of {len(self.modules)} adapted layers, because the loss does not depend "
                "on them or the model reads their weight without a call: they take no part in any ranking until one does. "
                f"They are {listing(dead)}",
            )

    def _bury(self, dead: Sequence[str]) -> None:
        for state in self.policies:
            state.dead = frozenset(id(self.modules[name]) for name in dead)

    def unfinished(self) -> str | None:
        """What training that ends now leaves undone; None where every last decision has been taken."""
        waiting = [state for state in self.policies if not state.ended]
        if not waiting or self.total_steps is None:
            return None
        end = max(state.policy.scheduler.end(self.total_steps) for state in waiting)
        return (
            f"training ends at step {self.step} of {self.total_steps}, before the last decision at step {end}: "
            "the budget was not reached"
        )

    @property
    def wants_unclipped(self) -> bool:
        """Whether a metric measures gradients as they were before clipping."""
        return any(state.policy.metric.measure == "before-clipping" for state in self.policies)

    def before_step(
        self, scale: Tensor | None = None, unclipped: Unclipped | None = None, loss_scale: float | None = None
    ) -> None:
        """Called when the optimizer is about to step.

        Args:
            scale: a factor that the gradients still carry; None for none.
            unclipped: the gradients as backward left them, if a metric wants them.
            loss_scale: the factor that those carry; None for none.
        """
        self._scale = scale
        self.look()
        for state in self.policies:
            state.follow_device()
            measure = state.policy.metric.measure
            if measure == "before-step":
                state.observe(self, scale)
            elif measure == "before-clipping" and unclipped is not None:
                state.observe(self, None if loss_scale is None else torch.tensor(loss_scale), unclipped.of)

    def after_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Called when the optimizer has stepped.

        Returns:
            Whether tensors have stopped training, or have become smaller: what DDP has to follow.
        """
        assert self.total_steps is not None
        self.step += 1
        if self.step == self.total_steps + 1:
            self.warn(
                "over",
                f"step {self.step} of a run that was bound for total_steps={self.total_steps}: every schedule has ended",
            )
        changed = froze = False
        # All observe before any decides: a matrix that one policy freezes has no gradient for the next.
        for state in self.policies:
            if state.policy.metric.measure == "after-step":
                state.observe(self, self._scale)
        for state in self.policies:
            scheduler, action = state.policy.scheduler, state.policy.action
            number = self.step - 1 + scheduler.first_step
            if state.due(self.step, self.total_steps):
                total = self.total_steps
                budget = state.capacity
                if action.budgeted:
                    budget = scheduler.budget(number, total_steps=total, units=state.capacity, layers=state.layers)
                share = scheduler.share(number, total_steps=total, units=state.capacity, layers=state.layers)
                lost, moved = self._decide(state, budget, share, optimizer)
                changed |= moved
                froze |= lost and not (action.reversible or action.grows)
                last = number == scheduler.end(self.total_steps)
                if last:
                    state.end()
                if action.cuts(last=last):
                    froze |= self._resize(self._masked(split(state.kept, state.blocks), state.blocks), optimizer)
            elif state.ended:
                action.hold(state.blocks, state.kept)
        if froze:
            self._survey()
        elif changed:
            self._tally.count(self.step, self._components_kept())
        return froze

    def _decide(
        self, state: PolicyState, budget: int, share: float, optimizer: torch.optim.Optimizer
    ) -> tuple[bool, bool]:
        action = state.policy.action
        standing = action.proximal(state.blocks, share, optimizer)
        kept, threshold, ballot = state.decide(self, budget, share, standing)
        before, state.kept = state.kept, kept
        action.apply(state.blocks, kept, optimizer)
        lost = (before & ~kept).nonzero().flatten().tolist()
        returned = (kept & ~before).nonzero().flatten().tolist()
        names = state.unit_names
        fresh = self._grow(state, ballot, optimizer) if action.grows else ()
        self.history.append(
            Decision(
                step=self.step,
                policy=state.index,
                budget=budget,
                kept=int(state.kept.sum()),
                units=state.capacity,
                threshold=threshold,
                lost=tuple(names[i] for i in lost),
                returned=tuple(names[i] for i in returned),
                fresh=fresh,
            )
        )
        if lost and not (action.reversible or action.grows):
            for other in self.policies:
                other.relayout()
        return bool(lost), bool(lost or returned)

    def _grow(self, state: PolicyState, ballot: Ballot, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
        """Cut what a policy does not keep, and add what its action says. Returns the names of what is new."""
        growth = state.policy.action.grow(state.blocks, state.kept, ballot)
        resizes = {
            block.name: _Resize(keep.nonzero().flatten(), fresh)
            for block, keep, fresh in zip(state.blocks, split(state.kept, state.blocks), growth.fresh, strict=True)
            if fresh or not bool(keep.all())
        }
        generator = torch.Generator().manual_seed((self.seed + 1_000_003 * self.step + state.index) % 2**63)
        self._resize(resizes, optimizer, growth.core, generator)
        return tuple(
            f"{name}[{number}]" for name, how in resizes.items() for number in self._components[name][len(how.index) :]
        )

    def warn(self, key: str, message: str) -> None:
        """Say something once."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, LrkitWarning, stacklevel=3)

    # ---- counting ----

    def froze(self, tensor: Tensor) -> bool:
        """Whether a tensor trained when the run began and was frozen on the way."""
        return id(tensor) in self._trained and not tensor.requires_grad and tensor.numel() > 0

    def ranks(self) -> dict[str, int]:
        """Layer name to the components it stores, masked ones included."""
        return {name: self._rank(module) for name, module in self.modules.items()}

    def places(self) -> dict[int, tuple[str, int]]:
        """Layer name and axis of each tensor that has one slice per component, by the tensor's ``id``."""
        parts = [part for part in self.method.parameterization.parts if part.axis is not None]
        return {id(part.of(m)): (name, part.axis or 0) for name, m in self.modules.items() for part in parts}

    def numbers(self, saved: Mapping[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
        """Layer name to the numbers of its components: those that are stored now, or in a saved state."""
        components = self._components if saved is None else saved["components"]
        return {
            name: tuple(components.get(name, range(rank)))
            for name, rank in (self.initial_ranks if saved is None else saved["ranks"]).items()
        }

    def shapes(self, ranks: Mapping[str, int]) -> dict[int, torch.Size]:
        """The shapes that component-wise tensors have at other ranks, by the tensor's ``id``."""
        shapes = {}
        for name, module in self.modules.items():
            for part in self.method.parameterization.parts:
                if part.axis is not None and name in ranks:
                    tensor = part.of(module)
                    sizes = list(tensor.shape)
                    sizes[part.axis] = ranks[name]
                    shapes[id(tensor)] = torch.Size(sizes)
        return shapes

    def _rank(self, module: nn.Module) -> int:
        """Components that an adapter stores, masked ones included; 0 where it has none."""
        for part in self.method.parameterization.parts:
            if part.axis is not None:
                return part.of(module).shape[part.axis]
        return 0

    def _masking(self) -> list[PolicyState]:
        return [s for s in self.policies if s.policy.action.unit == "component" and not s.policy.action.retains]

    def _components_kept(self) -> Tensor | None:
        """bool [components]: those that no policy masks; None where no policy has components for units."""
        masks = [state.kept for state in self._masking()]
        return functools.reduce(torch.logical_and, masks) if masks else None

    def components_kept(self) -> dict[str, Tensor]:
        """Layer name to bool [rank]: the components that no policy masks. Layers without component units are absent."""
        kept = self._components_kept()
        if kept is None:
            return {}
        blocks = self._masking()[0].blocks  # the same for every policy on components
        return dict(zip((block.name for block in blocks), split(kept, blocks), strict=True))

    @property
    def counts(self) -> dict[str, int]:
        """Layer name to the trainable parameters now in effect: frozen tensors and masked components do not count."""
        return self._tally.named(self._tally.now)

    def _survey(self) -> None:
        masking = self._masking()
        self._tally.survey([(block.name, block.count) for block in masking[0].blocks] if masking else None)
        self._tally.count(self.step, self._components_kept())

    def parameters_on_average(self) -> dict[str, float]:
        """Layer name to trainable parameters averaged over the steps so far (those now, before the first step)."""
        self._tally.settle(self.step)
        values = self._tally.sums.double() / self.step if self.step else self._tally.now.double()
        return dict(zip(self._tally.names, values.tolist(), strict=True))

    # ---- other sizes ----

    def _check_cuttable(self) -> None:
        parts = [part for part in self.method.parameterization.parts if part.axis is not None]
        tensors = [id(part.of(module)) for module in self.modules.values() for part in parts]
        if len(set(tensors)) < len(tensors):
            raise LrkitError("layers share their matrices, and each has a mask of its own: they cannot be cut")

    @torch.no_grad()
    def _resize(
        self,
        resizes: Mapping[str, _Resize],
        optimizer: torch.optim.Optimizer | None,
        core: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> bool:
        """Cut components of layers, and add fresh ones behind them. The parameters stay the same objects.

        The optimizer's state and the statistics of what stays stay with it; for what is fresh they are zero, and step counts
        go on.

        Args:
            resizes: what to do, by layer name. Other layers are left alone.
            optimizer: whose state follows; None for none.
            core: the core value of fresh components.
            generator: where their other parts are drawn from; None where there are none.

        Returns:
            Whether there was anything to do.
        """
        if not resizes:
            return False
        parts = [part for part in self.method.parameterization.parts if part.axis is not None]
        apart = [state.apart() for state in self.policies]
        changed: dict[int, tuple[_Resize, int]] = {}
        for name, how in resizes.items():
            module = self.modules[name]
            fresh = {part.name: self._fresh(part, module, how.fresh, core, generator) for part in parts if how.fresh}
            for part in parts:
                tensor, axis = part.of(module), part.axis
                assert axis is not None
                if optimizer is not None:
                    _resize_state(optimizer, tensor, how, axis)
                trains = tensor.requires_grad or (not tensor.numel() and id(tensor) in self._trained)
                resize(tensor, how.of(tensor.detach(), axis, fresh.get(part.name, 0)))
                # Optimizers are not made for tensors without entries: leave none to them.
                tensor.requires_grad_(tensor.numel() > 0 and trains)
                changed[id(tensor)] = how, axis
            before = self._components.get(name, tuple(range(self.initial_ranks[name])))
            given = self._numbered[name]
            self._components[name] = (*(before[i] for i in how.index.tolist()), *range(given, given + how.fresh))
            self._numbered[name] += how.fresh
        for state in self.policies:
            # What was frozen, then cut away whole, and has grown again stays frozen.
            if state.policy.action.freezes:
                state.policy.action.restore(state.blocks, state.kept)
        ranks = self.ranks()
        for state, statistics in zip(self.policies, apart, strict=True):
            state.resize(resizes, changed, self._components, ranks, statistics)
        self._survey()
        return True

    def _fresh(
        self, part: Part, module: nn.Module, count: int, core: float, generator: torch.Generator | None
    ) -> Tensor:
        """Slices of further components for one tensor."""
        if part.core:
            return part.of(module).new_full((count,), core)
        assert generator is not None
        return self.method.parameterization.fresh(part, module, count, generator).to(part.of(module))

    def compact(self, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
        """Cut components that are masked and add nothing (see `lrkit.units.present`). The parameters stay the same objects.

        Args:
            optimizer: its state for these parameters is cut with them.

        Returns:
            Layer name to its rank now.
        """
        masking = self._masking()
        if masking:
            self._check_cuttable()
        kept = self.components_kept()
        for state in self.policies:
            # What is cut cannot come back: every policy has ended.
            state.end()
        if masking:
            self._resize(self._masked(list(kept.values()), masking[0].blocks), optimizer)
        return self.ranks()

    def _masked(self, masks: Sequence[Tensor], blocks: Sequence[Block]) -> dict[str, _Resize]:
        """Layer name to what stays of each layer that has masked components which add nothing."""
        parts = [part for part in self.method.parameterization.parts if part.axis is not None]
        stays = {}
        for block, mask in zip(blocks, masks, strict=True):
            there = present(block.module, parts)
            stays[block.name] = mask.to(there.device) | there
        return {name: _Resize(keep.nonzero().flatten()) for name, keep in stays.items() if not bool(keep.all())}

    # ---- state ----

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the loop remembers: tensors by name, and JSON data."""
        self._tally.settle(self.step)
        tensors: dict[str, Tensor] = {}
        for state in self.policies:
            prefix = f"policy.{state.index}"
            tensors[f"{prefix}.kept"] = state.kept.clone()
            tensors[f"{prefix}.still"] = state.still.clone()
            for name, flat in state.buffers.items():
                tensors[f"{prefix}.buffer.{name}"] = flat.clone()
        data = {
            "step": self.step,
            "total_steps": self.total_steps,
            "seed": self.seed,
            "policies": [{"observations": s.observations, "ended": s.ended} for s in self.policies],
            "history": [attrs.asdict(d) | {key: list(getattr(d, key)) for key in NAMES} for d in self.history],
            "components": {name: list(numbers) for name, numbers in self._components.items()},
            "numbered": dict(self._numbered),
            "sums": self._tally.named(self._tally.sums),
            "dead": self.liveness.dead,
        }
        return tensors, data

    def check_state(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Raise LrkitError where a state is not one of this run; change nothing. `states.check_data` must have passed it."""
        total = self.total_steps if data["total_steps"] is None else data["total_steps"]
        # Once every schedule has ended, nothing depends on the total any more.
        ended = bool(data["policies"]) and all(saved["ended"] for saved in data["policies"])
        if self.policies and self.total_steps not in (None, total) and not ended:
            raise LrkitError(
                f"the state is of a run of {total} steps, this one is bound for {self.total_steps}: "
                "the schedule would be another one"
            )
        if len(data["policies"]) != len(self.policies):
            raise misfit(f"policies is not a list of {len(self.policies)}")
        states.check_ranks(data, self.initial_ranks, self.grows)
        if total is not None:
            self.check_schedules(total)
            self._check_progress(data, total)
        ranks, shapes = data["ranks"], self.shapes(data["ranks"])
        dead = {id(self.modules[name]) for name in data.get("dead") or ()}
        frozen: set[int] = set()
        for state, saved in zip(self.policies, data["policies"], strict=True):
            prefix = f"policy.{state.index}"
            expected = {f"{prefix}.kept", f"{prefix}.still"}
            if not saved["ended"]:
                expected |= {f"{prefix}.buffer.{name}" for name in state.policy.metric.buffers}
            given = {name for name in tensors if name.startswith(f"{prefix}.")}
            if given != expected:
                raise misfit(f"{', '.join(sorted(given ^ expected))} missing or not expected")
            kept = tensors[f"{prefix}.kept"]
            counts = counts_of(state, ranks)
            if kept.dtype != torch.bool or kept.shape != (sum(counts),):
                raise misfit(f"{prefix}.kept is not bool [{sum(counts)}]")
            if state.policy.action.freezes:
                for block, keep in zip(state.blocks, torch.split(kept, counts), strict=True):
                    frozen |= set() if bool(keep.any()) else {id(tensor) for tensor in block.tensors}
        for state, saved in zip(self.policies, data["policies"], strict=True):
            prefix = f"policy.{state.index}"
            size = {True: 0, False: 0}
            for block, keep in zip(
                state.blocks, torch.split(tensors[f"{prefix}.kept"], counts_of(state, ranks)), strict=True
            ):
                if (
                    saved["ended"]
                    or id(block.module) in dead
                    or not (state.policy.action.reversible or bool(keep.any()))
                ):
                    continue
                for part in block.parts:
                    if state.policy.metric.reads in ("all", "component") or part.core:
                        tensor = block.tensor(part)
                        size[id(tensor) in frozen] += shapes.get(id(tensor), tensor.shape).numel()
            for name in (n for n in tensors if n.startswith((f"{prefix}.buffer.", f"{prefix}.still"))):
                wanted = size[name == f"{prefix}.still"]
                if tensors[name].dtype != torch.float32 or tensors[name].shape != (wanted,):
                    raise misfit(f"{name} is not float32 [{wanted}]")
        known = {"weight", *(f"policy.{state.index}" for state in self.policies)}
        if odd := [n for n in tensors if ".".join(n.split(".", 2)[: 1 if n.startswith("weight.") else 2]) not in known]:
            raise misfit(f"{shown(odd[0])} is not expected")
        self._check_sums(tensors, data, frozen, shapes)

    def _check_progress(self, data: Mapping[str, Any], total: int) -> None:
        """What is still to be decided must be still to come, and what was decided be about units of this run."""
        for state, saved in zip(self.policies, data["policies"], strict=True):
            scheduler = state.policy.scheduler
            if not saved["ended"] and data["step"] > scheduler.end(total) - scheduler.first_step:
                raise misfit(f"step {data['step']} of {total} is beyond the last decision of policy {state.index}")
            blocks = {block.name for block in state.blocks}
            for d in data["history"]:
                if d["policy"] == state.index:
                    names = {name.partition("[")[0] for key in NAMES for name in d[key]}
                    if not names <= blocks:
                        raise misfit(f"history names {shown(min(names - blocks))}, which is no unit of this run")

    def _check_sums(
        self, tensors: Mapping[str, Tensor], data: Mapping[str, Any], frozen: set[int], shapes: Mapping[int, torch.Size]
    ) -> None:
        """Parameters summed over the steps so far cannot be more than there were, nor too few for a run beyond its end."""
        step, sums = data["step"], data["sums"]
        for name, first in self.initial_ranks.items():
            most = self.starts[name] * max(1, data["numbered"][name]) // max(1, first)
            if sums[name] > step * most:
                raise misfit(f"sums has {sums[name]} for {name}: more than {most} parameters at each of {step} steps")
        if data["total_steps"] is None or step <= data["total_steps"]:
            return
        masks: dict[str, Tensor] = {}
        for state in self._masking():
            pieces = torch.split(tensors[f"policy.{state.index}.kept"], counts_of(state, data["ranks"]))
            for block, mask in zip(state.blocks, pieces, strict=True):
                masks[block.name] = masks.get(block.name, mask) & mask
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        now = sum(self._tally.would_be(shapes, frozen, kept).values())
        last = max((d["step"] for d in data["history"]), default=0)
        # Half: what has no gradient may have been left out of the count on the way.
        if 2 * sum(sums.values()) < now * (step - last):
            raise misfit(f"step {step} is beyond the run of {data['total_steps']} steps, and sums are of fewer")

    def load_state(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Take over a state that `check_state` has passed. The adapters' tensors must be loaded before."""
        self.step = data["step"]
        if data["total_steps"] is not None:
            self.total_steps = max(self.total_steps or 0, data["total_steps"])  # equal, unless every schedule has ended
        self.seed = data["seed"]
        self.history = [Decision(**{**d, **{key: tuple(d[key]) for key in NAMES}}) for d in data["history"]]
        self._components = {name: tuple(numbers) for name, numbers in data["components"].items()}
        self._numbered = dict(data["numbered"])
        # A state without the word is of a run in which every layer counted, whether a gradient reached it or not.
        dead = data.get("dead", [] if self.step else None)
        self.liveness.dead = dead if dead is None else list(dead)
        self._bury(dead or ())
        for state, saved in zip(self.policies, data["policies"], strict=True):
            kept = tensors[f"policy.{state.index}.kept"].to(state.kept.device, copy=True)
            state.observations, state.ended = saved["observations"], saved["ended"]
            state.rebuild(self._components, data["ranks"], kept)
            # Only what the loaded tensors do not hold is made again; a mask is never applied a second time, since λ may
            # have moved since.
            state.policy.action.restore(state.blocks, state.kept)
        for state in self.policies:
            prefix = f"policy.{state.index}"
            state.layout = state._layout()  # once all is frozen again
            device = state.kept.device
            state.still = tensors[f"{prefix}.still"].to(device, copy=True)
            state.buffers = {
                name: tensors[f"{prefix}.buffer.{name}"].to(device, copy=True)
                for name in (() if state.ended else state.policy.metric.buffers)
            }
        self._tally.load(self.step, data["sums"])
        self._survey()


def _last_equal(function: Callable[[int], int], span: range, first: int) -> int:
    """The last index in a span up to which a function is what it is at `first`; it only ever rises, or only falls."""
    value, low, step = function(span[first]), first, 1
    while low + step < len(span) and function(span[low + step]) == value:
        low, step = low + step, 2 * step
    high = min(low + step, len(span))  # not the same there, or beyond the end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if function(span[middle]) == value else (low, middle)
    return low


def counts_of(state: PolicyState, ranks: Mapping[str, int]) -> list[int]:
    """Units of each block of a policy at given ranks."""
    return [ranks[block.name] if block.kind == "component" else block.count for block in state.blocks]


def _resize_state(optimizer: torch.optim.Optimizer, tensor: nn.Parameter, how: _Resize, axis: int) -> None:
    """Let an optimizer's state for one tensor follow, before the tensor itself."""
    for value in list(optimizer.state.get(tensor, {}).values()):
        if not isinstance(value, Tensor):
            continue
        if value.shape == tensor.shape:
            value.data = how.of(value.data, axis)
        elif value.ndim > 0:
            # State of another shape (Adafactor's factors) cannot follow: it begins anew.
            optimizer.state.pop(tensor, None)
    if not len(how.index) + how.fresh:
        optimizer.state.pop(tensor, None)
