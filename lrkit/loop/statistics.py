"""A metric's memory of a policy's entries, and the scores that follow from it.

This is the one seam for the compiled path (`lrkit.loop.native`): metrics know nothing of it, and neither does the loop.
"""

from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor, nn

from lrkit.loop.layout import GradientOf, Layout, own_gradient
from lrkit.loop.native import kernel_of
from lrkit.loop.resizing import Resized
from lrkit.metrics import Metric
from lrkit.shards import held


@attrs.frozen
class Observed:
    """The outcome of one observation.

    Args:
        finite: False if a gradient was not finite; nothing was changed then.
        missing: how many of the tensors that train have no gradient: they count as zero.
        of: how many tensors train.
    """

    finite: bool = True
    missing: int = 0
    of: int = 0


class Statistics:
    """A metric's buffers over a layout: one entry per number that still trains, and last scores of those that do not.

    Args:
        metric: the metric.
        layout: where each entry lies.
        buffers: by the metric's names [layout.held] each; zero by default.
        still: last scores of entries that stopped training [layout.still_held]; zero by default.
        observations: how many steps have been observed.
    """

    def __init__(
        self,
        metric: Metric,
        layout: Layout,
        buffers: Mapping[str, Tensor] | None = None,
        still: Tensor | None = None,
        observations: int = 0,
    ) -> None:
        self.metric, self.layout, self.observations = metric, layout, observations
        self._kernel = kernel_of(metric)
        self.buffers = {n: self._zeros(layout.held) for n in metric.buffers} if buffers is None else dict(buffers)
        self.still = self._zeros(layout.still_held) if still is None else still
        self._finite: Tensor | None = None  # on a device: not looked at before somebody waits for it
        self._means: Tensor | None = None  # scores that were made with the last observation

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float32, device=self.layout.device)

    def observe(self, scale: Tensor | None, of: GradientOf = own_gradient, *, scoring: bool = False) -> Observed:
        """Take in one optimizer step.

        Args:
            scale: a factor that the gradients still carry; None for none.
            of: gives a tensor's gradient.
            scoring: whether `scores` is asked right after it.
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

    def whole(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return the buffers [layout.size] and the last scores of what is still [layout.still_size], of all processes."""
        buffers = {name: self.layout.whole(flat) for name, flat in self.buffers.items()}
        return buffers, self.layout.whole(self.still, still=True)

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
        return self.layout.reduce(self.entries(), still, self.metric.reduce, draw)

    def decided(self) -> None:
        """Forget the scores that were made for a decision."""
        self._means = None

    def follow(self, layout: Layout, resized: Mapping[int, Resized] | None = None) -> "Statistics":
        """Return the statistics over another layout: after a freeze, a thaw or a resize.

        A tensor that has stopped training since keeps its last scores. New entries are zero.

        Args:
            layout: the new one.
            resized: how tensors were resized, by their ``id``.
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
        return self._over(layout, buffers, still)

    def moved(self, layout: Layout) -> "Statistics":
        """Return the same over a layout of the same entries on another device."""
        return self._over(layout, self.buffers, self.still)

    def _over(self, layout: Layout, buffers: Mapping[str, Tensor], still: Tensor) -> "Statistics":
        here = {name: flat.to(layout.device) for name, flat in buffers.items()}
        made = Statistics(self.metric, layout, here, still.to(layout.device), self.observations)
        made._finite = self._finite
        return made
