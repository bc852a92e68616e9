"""A metric's memory of a policy's entries, and the scores that follow from it.

This is the one seam for the compiled path (`lrkit.loop.native`): metrics know nothing of it, and neither does the loop.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lrkit.loop.layout import GradientOf, Layout, own_gradient
from lrkit.loop.native import kernel_of
from lrkit.loop.pieces import Look, as_is
from lrkit.loop.remembered import Carried, Observed, Peers, carried_over, none_of, unchanged
from lrkit.loop.resizing import Resized
from lrkit.metrics import Metric
from lrkit.shards import held
from lrkit.units import Block


class Statistics:
    """A metric's buffers over a layout: one entry per number that still trains, and last scores of those that do not.

    Args:
        metric: the metric.
        layout: where each entry lies.
        buffers: by the metric's names [layout.held] each; zero by default.
        still: last scores of entries that stopped training [layout.still_held]; zero by default.
        observations: how many steps have been observed.
        memory: what is remembered of each unit, by the metric's names [units]; zero by default.
    """

    by_gradient: ClassVar[bool] = True  # of layers that no gradient reaches there is nothing to remember

    def __init__(
        self,
        metric: Metric,
        layout: Layout,
        buffers: Mapping[str, Tensor] | None = None,
        still: Tensor | None = None,
        observations: int = 0,
        memory: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.metric, self.layout, self.observations = metric, layout, observations
        self._kernel = kernel_of(metric)
        self.buffers = {n: self._zeros(layout.held) for n in metric.buffers} if buffers is None else dict(buffers)
        self.still = self._zeros(layout.still_held) if still is None else still
        self.memory = none_of(metric, layout) if memory is None else dict(memory)
        self._finite: Tensor | None = None  # on a device: not looked at before somebody waits for it
        self._means: Tensor | None = None  # scores that were made with the last observation

    @classmethod
    def lay(
        cls,
        blocks: Sequence[Block],
        present: Sequence[bool],
        reads: Literal["all", "core", "component", "nothing"],
        look: Look = as_is,
    ) -> Layout:
        """Lay out the entries of the blocks that are ranked. Units that were cut away whole have none."""
        there = [
            there and any(0 not in look(p)[0] for p in b.tensors) for there, b in zip(present, blocks, strict=True)
        ]
        return Layout(blocks, there, reads, look)

    @classmethod
    def restored(cls, metric: Metric, layout: Layout, saved: Mapping[str, Tensor], observations: int) -> "Statistics":
        """Make those of a saved run from the tensors that `saved` gave, or from none if the policy has ended."""
        here = {name: flat.to(layout.device, copy=True) for name, flat in saved.items()}
        buffers = {name: layout.mine(here[f"buffer.{name}"]) for name in metric.buffers if here}
        memory = {name: here[f"memory.{name}"] for name in metric.memory if here}
        still = layout.mine(here["still"], still=True) if here else None
        return cls(metric, layout, buffers, still, observations, memory)

    @classmethod
    def blank(cls, metric: Metric, layout: Layout) -> dict[str, Tensor]:
        """Return tensors of the names, shapes and types that `saved` has."""
        sizes = {"still": layout.still_size, **{f"buffer.{name}": layout.size for name in metric.buffers}}
        sizes |= {f"memory.{name}": layout.units for name in metric.memory}
        return {name: torch.empty(size, dtype=torch.float32, device="meta") for name, size in sizes.items()}

    def held(self) -> list[Tensor]:
        """Return all tensors that this process holds for it: for counting bytes."""
        return [self.still, *self.buffers.values(), *self.memory.values(), *self.layout.index]

    @property
    def reads(self) -> dict[str, nn.Module]:
        """The layers whose rows are read: none."""
        return {}

    def take(self, name: str, x: Tensor, g: Tensor | None, labelled: Tensor | None, peers: Peers | None) -> None:
        """Take in rows of a layer: none are read."""

    def kept_of(self, name: str) -> dict[str, Tensor]:
        """Return what is kept of a layer as a whole: nothing."""
        return {}

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float32, device=self.layout.device)

    def observe(
        self, scale: Tensor | None, of: GradientOf = own_gradient, *, scoring: bool = False, peers: Peers | None = None
    ) -> Observed:
        """Take in one optimizer step.

        Args:
            scale: a factor that the gradients still carry; None for none.
            of: gives a tensor's gradient.
            scoring: whether `scores` is asked right after it.
            peers: the processes that train together. Each has the gradients of all: nothing has to be told.
        """
        if not self.metric.buffers or not self.layout.live:
            return Observed()
        self.observations += 1
        grads = self.layout.grads(of)
        missing = len(self.layout.live) - len(grads)
        done = None
        if self._kernel is not None and not missing and scale is None:
            scoring = scoring and not self.layout.still
            mean, deviation = self.buffers["importance"], self.buffers["uncertainty"]
            done = self.layout.native.observe(self._kernel, grads, mean, deviation, scoring=scoring)
            self._means = done[1] if done is not None and done[0] and scoring else None
        finite = self._observe_pieces(scale, of) if done is None else done[0]
        return Observed(finite, missing, len(self.layout.live))

    def _observe_pieces(self, scale: Tensor | None, of: GradientOf) -> bool:
        """Observe by the metric's own tensor operations. False: gradients are not finite, and nothing was changed."""
        finite = self.layout.finite(of)
        waits = self.layout.device.type != "cpu"
        if not waits and not finite:
            return False
        for weight, grad, state in self.layout.each(self.buffers, of):
            # Avoid a device sync: if a gradient is not finite, the buffers are rolled back on the device, and `skipped`
            # reads the flag later.
            before = {name: flat.clone() for name, flat in state.items()} if waits else {}
            self.metric.observe(
                weight, grad if scale is None else grad / scale.to(grad.device), state, self.observations
            )
            for name, flat in before.items():
                state[name].copy_(torch.where(finite, state[name], flat))
        if waits:
            self._finite = finite if self._finite is None else self._finite & finite
        return True

    def skipped(self) -> bool:
        """Say whether gradients on a device were not finite since the last call."""
        flag, self._finite = self._finite, None
        return flag is not None and not flag

    def entries(self) -> Tensor:
        """Return the entry-wise scores of what still trains [layout.size]."""
        return self.layout.whole(self._held_entries())

    def _held_entries(self) -> Tensor:
        """Return those of what this process holds [layout.held]."""
        return self.metric.score(self.layout.weights(), self.buffers)

    def saved(self) -> dict[str, Tensor]:
        """Return all tensors by the names that a state has for them, with the entries of all processes."""
        buffers = {f"buffer.{name}": self.layout.whole(flat) for name, flat in self.buffers.items()}
        still = self.layout.whole(self.still, still=True)
        return {"still": still, **buffers, **{f"memory.{name}": values for name, values in self.memory.items()}}

    def scores(self, draw: Callable[[], Tensor]) -> Tensor:
        """Return unit scores [units], -inf for a unit that is out for good.

        Args:
            draw: gives a random number for each unit [units], for a metric that asks for them.
        """
        if self._kernel is not None and not self.layout.still:
            mean, deviation = self.buffers["importance"], self.buffers["uncertainty"]
            if self.layout.native.usable(mean, deviation):
                means = self._means if self._means is not None else self.layout.native.score(mean, deviation)
                return self.layout.reduce_means(means)
        still = self.layout.whole(self.still, still=True)
        return self.layout.reduce(self.entries(), still, self.metric.reduce, draw, self.memory)

    def decided(self, kept: Tensor) -> None:
        """Forget the scores that were made for a decision, and let the metric take it in."""
        self._means = None
        self.metric.decided(kept, self.memory)

    def follow(
        self, layout: Layout, resized: Mapping[int, Resized] | None = None, units: Carried = unchanged
    ) -> "Statistics":
        """Return the statistics over another layout: after a freeze, a thaw or a resize.

        A tensor that has stopped training since keeps its last scores. New entries are zero.

        Args:
            layout: the new one.
            resized: how tensors were resized, by their ``id``.
            units: how numbers of units follow.
        """
        old, resized = self.layout, resized or {}

        def carried(p: nn.Parameter, flat: Tensor, *, still: bool) -> Tensor:
            span = old.spans.get(id(p))
            # A tensor that trains again begins anew; one that stops while it is resized has no scores for fresh components.
            if span is None or (span.still and not still) or (still and not span.still and id(p) in resized):
                return self._zeros(held(p).numel())
            piece = span.of(flat, self.still)
            return (resized[id(p)].of(piece) if id(p) in resized else piece).reshape(-1)

        stops = any(id(p) in old.spans and not old.spans[id(p)].still and id(p) not in resized for p in layout.still)
        last = self._held_entries() if stops else self._zeros(old.held)
        still = torch.cat([self._zeros(0), *(carried(p, last, still=True) for p in layout.still)])
        buffers = {
            name: torch.cat([self._zeros(0), *(carried(p, flat, still=False) for p in layout.live)])
            for name, flat in self.buffers.items()
        }
        return self._over(layout, buffers, still, carried_over(self.memory, units))

    def moved(self, layout: Layout) -> "Statistics":
        """Return the same over a layout of the same entries on another device."""
        return self._over(layout, self.buffers, self.still, self.memory)

    def _over(
        self, layout: Layout, buffers: Mapping[str, Tensor], still: Tensor, memory: Mapping[str, Tensor]
    ) -> "Statistics":
        here, units = ({name: t.to(layout.device) for name, t in each.items()} for each in (buffers, memory))
        made = Statistics(self.metric, layout, here, still.to(layout.device), self.observations, units)
        made._finite = self._finite
        return made
