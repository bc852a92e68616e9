"""The components of all layers: which of them a mask holds down, how they are cut and added, and what trains meanwhile."""

import functools
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from lrkit.actions import Verdict
from lrkit.errors import LrkitError
from lrkit.loop.policy import PolicyState
from lrkit.loop.resizing import Ranks, Resize, Resized, resize_layer
from lrkit.loop.run import Run
from lrkit.loop.tally import Tally
from lrkit.units import evened, maps_of, present, split


@attrs.frozen(eq=False)
class Components:
    """The components of a run.

    Args:
        run: the run.
        policies: the state of each policy.
        ranks: the components that each layer stores.
        tally: counts what trains.
        off: ``id`` of each tensor that somebody froze by hand, a LoRA-FA's A for example: it stays frozen.
    """

    run: Run
    policies: Sequence[PolicyState]
    ranks: Ranks
    tally: Tally
    off: set[int] = attrs.field(factory=set)

    @property
    def _masking(self) -> list[PolicyState]:
        return [state for state in self.policies if not state.fate.counts]

    @property
    def _kept(self) -> Tensor | None:
        masks = [state.kept for state in self._masking]
        return functools.reduce(torch.logical_and, masks) if masks else None

    def kept(self) -> dict[str, Tensor]:
        """Return layer name to bool [rank]: the components that no policy masks. Layers without such units are absent."""
        kept = self._kept
        if kept is None:
            return {}
        blocks = self._masking[0].blocks  # the same for every policy on components
        return dict(zip((block.name for block in blocks), split(kept, blocks), strict=True))

    def count(self, step: int) -> None:
        """Count what trains from the step after `step` on, after units were masked or came back."""
        self.tally.count(step, self._kept)

    def survey(self, step: int) -> None:
        """Count anew, after a freeze, a resize or a load."""
        masking = self._masking
        self.tally.survey([(block.name, block.count) for block in masking[0].blocks] if masking else None)
        self.count(step)

    def settle(self, *, changed: bool) -> None:
        """Let a tensor train only if nobody has it frozen; statistics follow if any stopped, or trains again."""
        for p in self._tensors if self.off else ():
            p.requires_grad_(p.requires_grad and id(p) not in self.off)
        for state in self.policies:
            state.fate.restore(state.blocks, state.kept)
        for state in self.policies if changed else ():
            state.follow()

    def begin(self, step: int) -> None:
        """Follow what somebody has frozen by hand, or lets train again, before a run goes on after `step`."""
        self.look()
        self.settle(changed=False)  # for an optimizer that takes what trains, all may have been let train
        self.survey(step)

    def look(self) -> None:
        """See what somebody has frozen by hand since the last look, or lets train again. A policy's decision comes after."""
        tensors = self._tensors
        if self.off or not all(p.requires_grad for p in tensors):
            frozen = self.frozen() | self.run.idle(self.ranks.now())
            by_hand = [p for p in tensors if p.numel() and id(p) not in frozen]
            self.off.difference_update(id(p) for p in by_hand if p.requires_grad)
            self.off.update(id(p) for p in by_hand if not p.requires_grad)

    @functools.cached_property  # a resize keeps the objects
    def _tensors(self) -> list[Tensor]:
        """Return what trains at first in the layers and in the policies' units."""
        adapters = (p for module in self.run.modules.values() for p in module.parameters())
        units = (p for state in self.policies for block in state.blocks for p in block.tensors)
        return [p for p in {id(p): p for p in (*adapters, *units)}.values() if id(p) in self.run.trained]

    def frozen(self) -> set[int]:
        """Return the ``id`` of each tensor that a policy has frozen."""
        return {each for state in self.policies for each in state.fate.frozen(state.blocks, state.kept)}

    def asleep(self) -> set[int]:
        """Return the ``id`` of each tensor that does not train now, and may after a later decision."""
        wakes: set[int] = set()
        if self.run.grows:
            wakes = {id(p) for module in self.run.modules.values() for p in module.parameters() if not p.numel()}
        stays: set[int] = set()
        for state in self.policies:
            frozen = state.fate.frozen(state.blocks, state.kept)
            if state.wakes:
                wakes |= frozen
            else:
                stays |= frozen
        return wakes - stays

    def renew(
        self, state: PolicyState, verdict: Verdict, optimizer: torch.optim.Optimizer | None, seed: int
    ) -> tuple[str, ...]:
        """Cut and add the components that a policy's verdict says. Returns the names of the new ones, drawn from `seed`."""
        if not (verdict.cut or verdict.fresh):
            return ()
        fresh = verdict.fresh or (0,) * len(state.blocks)
        resizes = {}
        for block, keep, count in zip(state.blocks, split(verdict.kept, state.blocks), fresh, strict=True):
            keep = keep if verdict.cut else torch.ones_like(keep)
            if count or not bool(keep.all()):
                resizes[block.name] = Resize(keep.nonzero().flatten(), count)
        if not resizes:
            return ()
        new = self.resize(resizes, optimizer, verdict.core, torch.Generator().manual_seed(seed), state)
        return tuple(f"{name}[{number}]" for name, numbers in new.items() for number in numbers)

    def compact(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Cut components that are masked and add nothing (see `lrkit.units.present`). Every policy must have ended."""
        kept = self.kept()
        if kept:
            self.run.check_cuttable()
        stays = {}
        for name, mask in kept.items():
            there = present(self.run.modules[name], self.run.parts)
            stays[name] = evened(mask.to(there.device) | there, maps_of(self.run.modules[name]))
        resizes = {name: Resize(keep.nonzero().flatten()) for name, keep in stays.items() if not bool(keep.all())}
        self.resize(resizes, optimizer)

    @torch.no_grad()
    def resize(
        self,
        resizes: Mapping[str, Resize],
        optimizer: torch.optim.Optimizer | None,
        core: float = 0.0,
        generator: torch.Generator | None = None,
        state: PolicyState | None = None,
    ) -> dict[str, tuple[int, ...]]:
        """Cut components of layers, and add fresh ones behind them; masks, statistics and the optimizer's state follow.

        Args:
            resizes: what to do, by layer name. Other layers are left alone.
            optimizer: whose state follows; None for none.
            core: the core value of fresh components.
            generator: what their other parts are drawn from; None if there are none.
            state: the policy that adds them: they may be drawn from what its metric has kept of the layers.

        Returns:
            The numbers of each layer's fresh components.
        """
        if not resizes:
            return {}
        tensors: dict[int, Resized] = {}
        fresh = {}
        for name, how in resizes.items():
            memory = {} if state is None else state.statistics.kept_of(name)
            new = self._drawn(name, how.fresh, core, generator, memory) if how.fresh else {}
            trained = self.run.trained - self.off
            tensors |= resize_layer(self.run.modules[name], self.run.parts, how, new, optimizer, trained)
            fresh[name] = self.ranks.take(name, how)
        for state in self.policies:
            # A tensor that was frozen, then cut away whole, and has grown again stays frozen.
            state.fate.restore(state.blocks, state.kept)
        numbers = {name: self.ranks.numbers(name) for name in self.run.ranks}
        for state in self.policies:
            state.resize(resizes, tensors, numbers)
        return fresh

    def _drawn(
        self,
        name: str,
        count: int,
        core: float,
        generator: torch.Generator | None,
        memory: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return the slices of a layer's fresh components, by the part's name."""
        module, parameterization = self.run.modules[name], self.run.method.parameterization
        assert generator is not None
        drawn, new = parameterization.fresh(module, count, generator, memory), {}
        for part in self.run.parts:
            tensor = part.of(module)
            if part.core:
                new[part.name] = tensor.new_full((count,), core)
                continue
            shape = [count if axis == part.axis else size for axis, size in enumerate(tensor.shape)]
            if part.name not in drawn or list(drawn[part.name].shape) != shape:
                raise LrkitError(f"{parameterization!r}: fresh must give {part.name} of {name} as {shape}")
            new[part.name] = drawn[part.name].to(tensor)
        return new
