"""How many parameters each layer trains, now and on average: a few tensor operations a decision."""

from collections.abc import Collection, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from lrkit.units import Part


class Tally:
    """Trainable parameters in effect, layer by layer: frozen tensors and masked components do not count.

    This is how AdaLoRA's paper counts (Σ rank · (d_in + d_out)); the core values, which it leaves out, are in. A layer's
    count is what it trains whatever the mask, and a share for each component that is kept. Only a freeze or a cut changes
    these two numbers; a mask changes how many are kept.

    Args:
        modules: layer name to adapter.
        parts: the parameterization's declaration.
        trained: ``id`` of every parameter that trains when the run begins.
        beside: names of further places to tensors, of which those count that are in no adapter.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parts: Sequence[Part],
        trained: set[int],
        beside: Mapping[str, Sequence[nn.Parameter]],
    ) -> None:
        axes = {part.name: part.axis for part in parts}
        self.names = [*modules, *beside]
        self._place = {name: index for index, name in enumerate(self.names)}
        self._tensors: list[list[tuple[nn.Parameter, int | None]]] = []
        seen: set[int] = set()
        for module in modules.values():
            mine = [(p, axes.get(key)) for key, p in module.named_parameters() if id(p) in trained - seen]
            seen |= {id(p) for p, _ in mine}
            self._tensors.append(mine)
        self._tensors += [[(p, None) for p in tensors if id(p) in trained - seen] for tensors in beside.values()]
        self.sums = torch.zeros(len(self.names), dtype=torch.int64)
        self._settled = 0
        self._layer_of_unit: Tensor | None = None
        self.survey(None)
        self.now = self._fixed

    def survey(self, masked: Sequence[tuple[str, int]] | None) -> None:
        """Look at the tensors: after a freeze, a cut, or a load.

        Args:
            masked: name and rank of each layer that has components under a mask; None where no policy masks any.
        """
        ranked = {} if masked is None else dict(masked)
        fixed, each = [], []
        for name, tensors in zip(self.names, self._tensors, strict=True):
            live = [(p, axis) for p, axis in tensors if p.requires_grad]
            by_rank = [p.numel() // max(1, p.shape[axis]) for p, axis in live if name in ranked and axis is not None]
            fixed.append(sum(p.numel() for p, axis in live if not (name in ranked and axis is not None)))
            each.append(sum(by_rank))
        self._fixed, self._each = torch.tensor(fixed), torch.tensor(each)
        self._layer_of_unit = None
        if masked is not None:
            layers = torch.tensor([self._place[name] for name, _ in masked])
            self._layer_of_unit = layers.repeat_interleave(torch.tensor([rank for _, rank in masked]))

    def count(self, step: int, kept: Tensor | None) -> None:
        """Take note of what trains from the step after `step` on.

        Args:
            step: optimizer steps so far.
            kept: bool [components], those that no policy masks; None where no policy masks any.
        """
        self.settle(step)
        self.now = self._fixed
        if kept is not None:
            assert self._layer_of_unit is not None
            ranks = torch.zeros_like(self._fixed).index_add_(0, self._layer_of_unit, kept.cpu().long())
            self.now = self._fixed + self._each * ranks

    def would_be(
        self, shapes: Mapping[int, Sequence[int]], frozen: Collection[int], kept: Mapping[str, int]
    ) -> dict[str, int]:
        """Layer name to what it would train.

        Args:
            shapes: of tensors that would be of another shape than now, by ``id``.
            frozen: ``id`` of tensors that would not train.
            kept: layer name to the components that no policy masks, for those that have a mask.
        """
        found = {}
        for name, tensors in zip(self.names, self._tensors, strict=True):
            count = 0
            for p, axis in tensors:
                shape = shapes.get(id(p), p.shape)
                if id(p) not in frozen and (size := prod(shape)):
                    masked = axis is not None and name in kept
                    count += size // shape[axis or 0] * kept[name] if masked else size
            found[name] = count
        return found

    def settle(self, step: int) -> None:
        """Add up the steps since the last time."""
        self.sums = self.sums + self.now * (step - self._settled)
        self._settled = step

    def load(self, step: int, sums: Mapping[str, int]) -> None:
        """Go on from a state's sums."""
        self._settled = step
        self.sums = torch.tensor([int(sums[name]) for name in self.names], dtype=torch.int64)

    @property
    def counts(self) -> dict[str, int]:
        """Layer name to the trainable parameters now in effect: frozen tensors and masked components do not count."""
        return self._named(self.now)

    @property
    def totals(self) -> dict[str, int]:
        """Layer name to trainable parameters, summed over the steps so far."""
        return self._named(self.sums)

    def on_average(self, step: int) -> dict[str, float]:
        """Return layer name to trainable parameters averaged over the steps so far; those now, before the first step."""
        self.settle(step)
        values = self.sums.double() / step if step else self.now.double()
        return dict(zip(self.names, values.tolist(), strict=True))

    def _named(self, values: Tensor) -> dict[str, int]:
        return dict(zip(self.names, values.tolist(), strict=True))
