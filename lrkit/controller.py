"""The loop of an adaptive method: observe, score, decide, apply; and all of its state.

At every real optimizer step, each policy's metric observes weights and gradients. When the scheduler says that a
decision is due, entry-wise scores are reduced to unit scores, the best b(t) units are kept, and the action is applied.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lrkit.actions import Ballot
from lrkit.errors import LrkitError, LrkitWarning
from lrkit.layout import Layout
from lrkit.method import Method, Policy
from lrkit.tally import Tally
from lrkit.units import Block, blocks_of, present, resize, split


@attrs.frozen
class Decision:
    """What one policy decided after one optimizer step.

    Args:
        step: how many optimizer steps had been taken: 1, 2, ...
        policy: index into ``method.policies``.
        budget: units that may be kept.
        kept: units that are kept.
        units: all units of the policy.
        threshold: the lowest score among the kept units; None where none is kept.
        lost: names of the units that were kept before and are not now.
        returned: names of the units that were not kept before and are now.
    """

    step: int
    policy: int
    budget: int
    kept: int
    units: int
    threshold: float | None
    lost: tuple[str, ...]
    returned: tuple[str, ...]


class PolicyState:
    """What one policy remembers: which units are kept, and its metric's statistics."""

    def __init__(self, index: int, policy: Policy, blocks: list[Block]) -> None:
        self.index, self.policy, self.blocks = index, policy, blocks
        # Amounts given as an average are for each layer that has such units: AFLoRA's FFN layers alone, say.
        self.layers = len({id(block.module) for block in blocks})
        self.units = sum(block.count for block in blocks)
        self._name_units()
        self.observations = 0
        self.ended = False
        device = blocks[0].tensors[0].device
        # A model without weights is there to be counted: what is kept must be a number all the same.
        device = torch.device("cpu") if device.type == "meta" else device
        self.kept = torch.ones(self.units, dtype=torch.bool, device=device)
        self.layout = self._layout()
        self.buffers = {name: self._zeros(self.layout.size) for name in policy.metric.buffers}
        self.still = self._zeros(0)
        self._finite: Tensor | None = None
        self._means: Tensor | None = None  # scores that were made at this step, for the decision after it

    def _name_units(self) -> None:
        self.unit_names = [name for block in self.blocks for name in block.unit_names()]
        self.parts = torch.tensor([len(block.parts) for block in self.blocks for _ in range(block.count)])

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, device=self.layout.device)

    def _layout(self) -> Layout:
        # Where losing is final, the losers are not ranked again.
        if self.policy.action.reversible:
            present = [True] * len(self.blocks)
        else:
            present = [bool(kept.any()) for kept in split(self.kept, self.blocks)]
        # What has been cut away whole has no score.
        present = [there and any(p.numel() for p in b.tensors) for there, b in zip(present, self.blocks, strict=True)]
        return Layout(self.blocks, present, self.policy.metric.reads)

    def follow_device(self) -> None:
        """Move the statistics to where the model has gone since attach."""
        first = self.blocks[0]
        device = first.tensor(first.parts[0]).device
        if device == self.layout.device:
            return
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
        pieces = [scores[live[id(p)]] if id(p) in live else self.still[still[id(p)]] for p in new.still]
        self.still = torch.cat(pieces).clone() if pieces else self._zeros(0)
        self.buffers = {name: new.move(flat, old) for name, flat in self.buffers.items()}
        self.layout, self._means = new, None

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a decision is taken after optimizer step `step` (1, 2, ...)."""
        number = step - 1 + self.policy.scheduler.first_step
        return not self.ended and self.policy.scheduler.due(number, total_steps=total_steps)

    def observe(self, controller: "Controller", scale: Tensor | None) -> None:
        """Take in one optimizer step, whose gradients still carry a factor `scale` if it is not None."""
        if self.ended or not self.policy.metric.buffers or not self.layout.live:
            return
        assert controller.total_steps is not None
        step = controller.step + (self.policy.metric.measure == "before-step")
        number = step - 1 + self.policy.scheduler.first_step
        if not self.policy.scheduler.observes(number, total_steps=controller.total_steps):
            return
        self.observations += 1
        grads = self.layout.grads()
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
        if not (self._observe_pieces(scale) if done is None else done[0]):
            self._not_finite(controller, f"at step {step}")

    def _observe_pieces(self, scale: Tensor | None) -> bool:
        """The same by the metric's own tensor operations. False: gradients are not finite, and nothing was changed."""
        finite = self.layout.finite()
        waits = self.layout.device.type != "cpu"
        if not waits and not finite:
            return False
        for weight, grad, state in self.layout.each(self.buffers):
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
    ) -> tuple[Tensor, float | None]:
        """Which units to keep.

        Args:
            controller: whom to tell of gradients that were not finite.
            budget: how many.
            share: the same as a share of all, not cut to an integer.
            standing: bool [units], False for those that a proximal step has taken out; None for no such step.

        Returns:
            bool [units], and the lowest score that is kept (None where nothing is).
        """
        if self._finite is not None and not self._finite:
            self._not_finite(controller, f"before step {controller.step}")
        self._finite = None
        # A score that is not a number (diverged weights) ranks last.
        scores = torch.nan_to_num(self.scores(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        candidates = torch.ones_like(self.kept) if self.policy.action.reversible else self.kept
        candidates = candidates if standing is None else candidates & standing
        parts = self.parts.to(scores.device)
        kept = self.policy.action.select(Ballot(scores, candidates, budget, share, self.entries, parts))
        self._means = None
        return kept, float(scores[kept].min()) if bool(kept.any()) else None

    def rebuild(
        self, components: Mapping[str, tuple[int, ...] | None], counts: Mapping[str, int], kept: Tensor
    ) -> None:
        """Take over blocks of other ranks.

        Args:
            components: by layer name the numbers of the components that are left; None where none was cut.
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

    def end(self) -> None:
        """After the last decision: the statistics have done their work."""
        self.ended = True
        self.buffers = {}
        self.still = self._zeros(0)


class Controller:
    """All policies of one run and their state.

    Args:
        method: the method.
        modules: layer name to adapter.
        trained: ``id`` of every parameter that trains when the run begins.
    """

    def __init__(self, method: Method, modules: Mapping[str, nn.Module], trained: set[int]) -> None:
        self.method, self.modules, self._trained = method, modules, trained
        self.step = 0
        self.total_steps: int | None = None
        self.history: list[Decision] = []
        self._warned: set[str] = set()
        self._scale: Tensor | None = None
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
        if any(state.policy.action.cuts(last=True) for state in self.policies):
            self._check_cuttable()
        self._tally = Tally(modules, parts, trained)
        self._survey()
        self._components: dict[str, tuple[int, ...] | None] = {}
        self.starts = self.counts
        self.initial_ranks = self.ranks()

    # ---- the loop ----

    def check_schedules(self, total_steps: int) -> None:
        """Raise LrkitError where a schedule does not fit a run of so many steps."""
        for state in self.policies:
            scheduler = state.policy.scheduler
            scheduler.bounds(total_steps)
            amounts = {"units": state.units, "layers": state.layers, "total_steps": total_steps}
            first = scheduler.budget(-1, **amounts)
            last = scheduler.budget(scheduler.first_step + total_steps, **amounts)
            if last > first:
                raise LrkitError(
                    f"{type(scheduler).__name__}: target {scheduler.target!r} is {last} of {state.units} units, above start "
                    f"{scheduler.start!r}, which is {first}: a budget never grows"
                )

    def begin(self, total_steps: int) -> None:
        """Check every schedule against the length of the run, and go by it. Raises LrkitError where one does not fit."""
        self.check_schedules(total_steps)
        self.total_steps = total_steps
        for state in self.policies:
            scheduler = state.policy.scheduler
            first, end = scheduler.first_step, scheduler.end(total_steps)
            if not first <= end < first + total_steps:
                self.warn(
                    f"end {state.index}",
                    f"{type(scheduler).__name__}: the last decision is due at step {end}, and the run's steps are numbered "
                    f"{first} to {first + total_steps - 1}: the budget will not be reached",
                )

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

    def before_step(self, scale: Tensor | None = None) -> None:
        """Called when the optimizer is about to step.

        Args:
            scale: a factor that the gradients still carry; None for none.
        """
        self._scale = scale
        for state in self.policies:
            state.follow_device()
            if state.policy.metric.measure == "before-step":
                state.observe(self, scale)

    def after_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Called when the optimizer has stepped.

        Returns:
            Whether tensors have stopped training, or have become smaller.
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
                budget = scheduler.budget(number, total_steps=total, units=state.units, layers=state.layers)
                share = scheduler.share(number, total_steps=total, units=state.units, layers=state.layers)
                lost, moved = self._decide(state, budget, share, optimizer)
                changed |= moved
                froze |= lost and not action.reversible
                last = number == scheduler.end(self.total_steps)
                if last:
                    state.end()
                if action.cuts(last=last):
                    froze |= self._cut(self._masked(split(state.kept, state.blocks), state.blocks), optimizer)
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
        standing = state.policy.action.proximal(state.blocks, share, optimizer)
        kept, threshold = state.decide(self, budget, share, standing)
        before, state.kept = state.kept, kept
        state.policy.action.apply(state.blocks, kept, optimizer)
        lost = (before & ~kept).nonzero().flatten().tolist()
        returned = (kept & ~before).nonzero().flatten().tolist()
        self.history.append(
            Decision(
                step=self.step,
                policy=state.index,
                budget=budget,
                kept=int(kept.sum()),
                units=state.units,
                threshold=threshold,
                lost=tuple(state.unit_names[i] for i in lost),
                returned=tuple(state.unit_names[i] for i in returned),
            )
        )
        if lost and not state.policy.action.reversible:
            for other in self.policies:
                other.relayout()
        return bool(lost), bool(lost or returned)

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
        return [state for state in self.policies if state.policy.action.unit == "component"]

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
        values = self._tally.sums / self.step if self.step else self._tally.now.double()
        return dict(zip(self._tally.names, values.tolist(), strict=True))

    # ---- cutting ----

    def _check_cuttable(self) -> None:
        parts = [part for part in self.method.parameterization.parts if part.axis is not None]
        tensors = [id(part.of(module)) for module in self.modules.values() for part in parts]
        if len(set(tensors)) < len(tensors):
            raise LrkitError("layers share their matrices, and each has a mask of its own: they cannot be cut")

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
            self._cut(self._masked(list(kept.values()), masking[0].blocks), optimizer)
        return self.ranks()

    def _masked(self, masks: Sequence[Tensor], blocks: Sequence[Block]) -> dict[str, Tensor]:
        """Layer name to bool [rank]: what stays of each layer that has masked components."""
        parts = [part for part in self.method.parameterization.parts if part.axis is not None]
        stays = {}
        for block, mask in zip(blocks, masks, strict=True):
            there = present(block.module, parts)
            stays[block.name] = mask.to(there.device) | there
        return {name: keep for name, keep in stays.items() if not bool(keep.all())}

    @torch.no_grad()
    def _cut(self, stays: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None) -> bool:
        """Cut components out of parameters, statistics and the optimizer's state.

        Args:
            stays: layer name to bool [rank], True for what stays. Other layers are left alone.
            optimizer: the one whose state is cut.

        Returns:
            Whether anything was cut.
        """
        cuts = {
            id(part.of(self.modules[name])): (part.of(self.modules[name]), part.axis, keep.nonzero().flatten())
            for name, keep in stays.items()
            for part in self.method.parameterization.parts
            if part.axis is not None
        }

        def left(flat: Tensor, p: nn.Parameter) -> Tensor:
            if id(p) not in cuts:
                return flat
            _, axis, index = cuts[id(p)]
            return flat.view(p.shape).index_select(axis, index.to(flat.device)).flatten()

        statistics = []
        for state in self.policies:
            live, still = state.layout.slices(), state.layout.still_slices()
            statistics.append(
                (
                    {
                        name: {id(p): left(flat[live[id(p)]], p) for p in state.layout.live}
                        for name, flat in state.buffers.items()
                    },
                    {} if state.ended else {id(p): left(state.still[still[id(p)]], p) for p in state.layout.still},
                )
            )
        for tensor, axis, index in cuts.values():
            if optimizer is not None:
                _cut_state(optimizer, tensor, axis, index)
            resize(tensor, tensor.detach().index_select(axis, index))
            # Optimizers are not made for tensors without entries: leave none to them.
            tensor.requires_grad_(len(index) > 0 and tensor.requires_grad)
        for name, keep in stays.items():
            before = self._components.get(name) or tuple(range(len(keep)))
            self._components[name] = tuple(n for n, stay in zip(before, keep.tolist(), strict=True) if stay)
        ranks = self.ranks()
        for state, (buffers, stills) in zip(self.policies, statistics, strict=True):
            kept = state.kept
            if state.policy.action.unit == "component":
                masks = zip(split(state.kept, state.blocks), state.blocks, strict=True)
                kept = torch.cat([m[stays[b.name].to(m.device)] if b.name in stays else m for m, b in masks])
            state.rebuild(self._components, ranks, kept)
            empty = state.kept.new_zeros(0, dtype=torch.float32)
            state.buffers = {
                name: torch.cat([empty, *(pieces[id(p)] for p in state.layout.live)])
                for name, pieces in buffers.items()
            }
            if not state.ended:
                state.still = torch.cat([empty, *(stills[id(p)] for p in state.layout.still if id(p) in stills)])
        self._survey()
        return bool(cuts)

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
            "policies": [{"observations": s.observations, "ended": s.ended} for s in self.policies],
            "history": [attrs.asdict(d) | {"lost": list(d.lost), "returned": list(d.returned)} for d in self.history],
            "components": {name: list(numbers) for name, numbers in self._components.items() if numbers is not None},
            "sums": self._tally.named(self._tally.sums),
        }
        return tensors, data

    def check_state(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Raise LrkitError where a state is not one of this run; change nothing."""
        self._check_data(data)
        if self.total_steps is not None and data["total_steps"] not in (None, self.total_steps):
            raise LrkitError(
                f"the state is of a run of {data['total_steps']} steps, this one is bound for {self.total_steps}: "
                "the schedule would be another one"
            )
        ranks, shapes = data["ranks"], self.shapes(data["ranks"])
        frozen: set[int] = set()
        for state, saved in zip(self.policies, data["policies"], strict=True):
            prefix = f"policy.{state.index}"
            expected = {f"{prefix}.kept", f"{prefix}.still"}
            if not saved["ended"]:
                expected |= {f"{prefix}.buffer.{name}" for name in state.policy.metric.buffers}
            given = {name for name in tensors if name.startswith(f"{prefix}.")}
            if given != expected:
                raise _misfit(f"{', '.join(sorted(given ^ expected))} missing or not expected")
            kept = tensors[f"{prefix}.kept"]
            counts = counts_of(state, ranks)
            if kept.dtype != torch.bool or kept.shape != (sum(counts),):
                raise _misfit(f"{prefix}.kept is not bool [{sum(counts)}]")
            if state.policy.action.freezes:
                for block, keep in zip(state.blocks, torch.split(kept, counts), strict=True):
                    frozen |= set() if bool(keep.any()) else {id(tensor) for tensor in block.tensors}
        for state, saved in zip(self.policies, data["policies"], strict=True):
            prefix = f"policy.{state.index}"
            size = {True: 0, False: 0}
            for block, keep in zip(
                state.blocks, torch.split(tensors[f"{prefix}.kept"], counts_of(state, ranks)), strict=True
            ):
                if saved["ended"] or not (state.policy.action.reversible or bool(keep.any())):
                    continue
                for part in block.parts:
                    if state.policy.metric.reads == "all" or part.core:
                        tensor = block.tensor(part)
                        size[id(tensor) in frozen] += shapes.get(id(tensor), tensor.shape).numel()
            for name in (n for n in tensors if n.startswith((f"{prefix}.buffer.", f"{prefix}.still"))):
                wanted = size[name == f"{prefix}.still"]
                if tensors[name].dtype != torch.float32 or tensors[name].shape != (wanted,):
                    raise _misfit(f"{name} is not float32 [{wanted}]")

    def _check_data(self, data: Mapping[str, Any]) -> None:
        def whole(value: object, optional: bool = False) -> bool:
            return (optional and value is None) or (
                isinstance(value, int) and not isinstance(value, bool) and value >= 0
            )

        if not whole(data["step"]) or not whole(data["total_steps"], optional=True):
            raise _misfit("step and total_steps are not whole numbers")
        policies = data["policies"]
        if not isinstance(policies, list) or len(policies) != len(self.policies):
            raise _misfit(f"policies is not a list of {len(self.policies)}")
        for saved in policies:
            if (
                not isinstance(saved, dict)
                or not whole(saved.get("observations"))
                or type(saved.get("ended")) is not bool
            ):
                raise _misfit("policies lack observations or ended")
        for key in ("sums", "ranks"):
            table = data[key]
            if not isinstance(table, dict) or set(table) != set(self.modules) or not all(map(whole, table.values())):
                raise _misfit(f"{key} are not whole numbers for the layers of this run")
        components = data["components"]
        good = isinstance(components, dict) and set(components) <= set(self.modules)
        for name, numbers in components.items() if good else ():
            good &= isinstance(numbers, list) and all(map(whole, numbers)) and len(numbers) == data["ranks"][name]
            good = good and numbers == sorted(set(numbers)) and all(n < self.initial_ranks[name] for n in numbers)
        if not good:
            raise _misfit("components are not the numbers of what is left of each layer that was cut")
        if data["total_steps"] is None and data["step"]:
            raise _misfit("steps have been taken, and total_steps is missing")
        fields = {field.name for field in attrs.fields(Decision)}
        history = data["history"]
        good = isinstance(history, list) and all(isinstance(d, dict) and set(d) == fields for d in history)
        for d in history if good else ():
            good &= all(whole(d[key]) for key in ("step", "policy", "budget", "kept", "units"))
            good &= d["threshold"] is None or isinstance(d["threshold"], float)
            good &= all(isinstance(d[k], list) and all(isinstance(n, str) for n in d[k]) for k in ("lost", "returned"))
        if not good:
            raise _misfit("history is not a list of decisions")

    def load_state(self, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
        """Take over a state that `check_state` has passed. The adapters' tensors must be loaded before."""
        self.step = data["step"]
        if self.total_steps is None and data["total_steps"] is not None:
            self.begin(data["total_steps"])
        self.history = [
            Decision(**{**d, "lost": tuple(d["lost"]), "returned": tuple(d["returned"])}) for d in data["history"]
        ]
        self._components = {name: tuple(numbers) for name, numbers in data["components"].items()}
        for state, saved in zip(self.policies, data["policies"], strict=True):
            kept = tensors[f"policy.{state.index}.kept"].to(state.kept.device, copy=True)
            state.rebuild(self._components, data["ranks"], kept)
            state.observations, state.ended = saved["observations"], saved["ended"]
            # Only what the loaded tensors do not hold is made again; a mask is never applied a second time, since λ may
            # have moved since.
            state.policy.action.restore(state.blocks, state.kept)
        for state in self.policies:
            prefix = f"policy.{state.index}"
            state.layout = state._layout()  # once all is frozen again
            device = state.layout.device
            state.still = tensors[f"{prefix}.still"].to(device, copy=True)
            state.buffers = {
                name: tensors[f"{prefix}.buffer.{name}"].to(device, copy=True)
                for name in (() if state.ended else state.policy.metric.buffers)
            }
        self._tally.load(self.step, data["sums"])
        self._survey()


def counts_of(state: PolicyState, ranks: Mapping[str, int]) -> list[int]:
    """Units of each block of a policy at given ranks."""
    return [ranks[block.name] if block.kind == "component" else block.count for block in state.blocks]


def _cut_state(optimizer: torch.optim.Optimizer, tensor: nn.Parameter, axis: int, index: Tensor) -> None:
    """Cut an optimizer's state for one tensor."""
    for value in list(optimizer.state.get(tensor, {}).values()):
        if not isinstance(value, Tensor):
            continue
        if value.shape == tensor.shape:
            value.data = value.index_select(axis, index.to(value.device))
        elif value.ndim > 0:
            # State of another shape (Adafactor's factors) cannot be cut: it begins anew.
            optimizer.state.pop(tensor, None)
    if not len(index):
        optimizer.state.pop(tensor, None)


def _misfit(what: str) -> LrkitError:
    return LrkitError(f"the state does not fit: {what}")
